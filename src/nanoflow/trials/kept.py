"""Trials of a search that has not ended, in a file beside the one that it is going to write: a line each, at once.

A trial takes seconds on a GPU and a search has a hundred of them, so one that is interrupted goes on with what it
measured. A trial counts for the very profile, batch and plan that it was of; measuring is `iterations.py`'s.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import msgspec

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.plan import PipelinePlan
from nanoflow.profile.table import Profile
from nanoflow.trials.iterations import Trial


class _Line(msgspec.Struct, kw_only=True, frozen=True):
    """One trial; the profile and the plan by their digests."""

    profile: str
    shape: BatchShape
    plan: str
    gain: float


class KeptTrials:
    """Gains by batch and plan, those of a run before included.

    Args:
        path: The file; it need not be there.
        profile: What the plans were searched with.
    """

    def __init__(self, path: Path, profile: Profile) -> None:
        self._path = path
        self._profile = hashlib.sha256(profile.to_json()).hexdigest()[:12]
        self._gains = {(line.shape, line.plan): line.gain for line in _lines(path) if line.profile == self._profile}

    def __contains__(self, tried: tuple[BatchShape, PipelinePlan]) -> bool:
        """Whether there is a trial of this plan on this batch."""
        shape, plan = tried
        return (shape, plan.digest) in self._gains

    def __getitem__(self, tried: tuple[BatchShape, PipelinePlan]) -> float:
        """Time sequentially / under the plan."""
        shape, plan = tried
        return self._gains[shape, plan.digest]

    def add(self, trial: Trial) -> None:
        """Keep a trial, at once."""
        line = _Line(profile=self._profile, shape=trial.shape, plan=trial.plan.digest, gain=trial.gain)
        self._gains[line.shape, line.plan] = line.gain
        with self._path.open("ab") as file:
            # The line break comes first: it ends a line that was cut off.
            file.write(b"\n" + msgspec.json.encode(line))

    def forget(self) -> None:
        """Remove the file: the search has ended, or begins anew."""
        self._gains.clear()
        self._path.unlink(missing_ok=True)


def _lines(path: Path) -> list[_Line]:
    """Those that are whole: a run may have ended in the middle of one."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            lines.append(msgspec.json.decode(text, type=_Line))
    return lines
