"""The journal of a search: its trials so far, a line each, in a file beside the book that it is going to write.

A trial takes seconds on a GPU and a search has about a hundred. A search that was interrupted goes on with the trials
of its journal. A trial counts only for the same profile, batch and plan. `iterations.py` measures trials.
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
    """One trial; `profile` and `plan` are digests."""

    profile: str
    shape: BatchShape
    plan: str
    gain: float


class TrialJournal:
    """Measured gains by batch and plan, including those of an earlier, interrupted search.

    Args:
        path: The file; made by the first trial if it does not exist.
        profile: The profile that plans are searched with; trials of another profile are ignored.
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
        """Gain of the plan on the batch: time under the sequential plan / time under this plan."""
        shape, plan = tried
        return self._gains[shape, plan.digest]

    def add(self, trial: Trial) -> None:
        """Append a trial to the file now."""
        line = _Line(profile=self._profile, shape=trial.shape, plan=trial.plan.digest, gain=trial.gain)
        self._gains[line.shape, line.plan] = line.gain
        with self._path.open("ab") as file:
            # The line break comes first, to end a line that an interrupted search left incomplete.
            file.write(b"\n" + msgspec.json.encode(line))

    def forget(self) -> None:
        """Remove the file: the search has ended, or starts again from nothing."""
        self._gains.clear()
        self._path.unlink(missing_ok=True)


def _lines(path: Path) -> list[_Line]:
    """All complete lines; an interrupted search may have left an incomplete one."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            lines.append(msgspec.json.decode(text, type=_Line))
    return lines
