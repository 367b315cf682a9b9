"""What every record begins with: when, by which command, on which machine, from which sources, with which settings.

A number without these cannot be judged or measured again. What was measured is added by whoever writes the record
(`record.py`, `benchmarks/common/document.py`).
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanoflow.bench.machine import REVISION_VARIABLE, detect_machine, detect_software, git_revision
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.messages import EngineFacts

OptionsT = TypeVar("OptionsT")

DIRTY = "-dirty"
_KEY_FLAG = "--api-key"
_KEPT_FOR_GOOD = ("benchmarks", "results")


def header(benchmark: str) -> dict[str, Any]:
    """The head of a record of a benchmark that runs now, as plain data."""
    return {
        "benchmark": benchmark,
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "machine": dataclasses.asdict(detect_machine()),
        "software": dataclasses.asdict(detect_software()),
    }


def command(argv: Sequence[str] | None = None) -> str:
    """The command that runs now, as anyone could type it: folders of this machine are left out.

    Args:
        argv: With the interpreter first; this process's own if not given.
    """
    words = list(sys.orig_argv if argv is None else argv)
    if words and Path(words[0]).name.startswith("python"):
        # A script that stands beside the interpreter is a command of its own.
        words = words[1:] if len(words) > 1 and Path(words[1]).name == "nanoflow" else ["python", *words[1:]]
    return shlex.join(portable(word) for word in _without_keys(words))


def _without_keys(words: Sequence[str]) -> list[str]:
    """The words of a command with stars for the value of `--api-key`."""
    shown = [f"{_KEY_FLAG}=***" if word.startswith(f"{_KEY_FLAG}=") else word for word in words]
    return ["***" if before == _KEY_FLAG else word for before, word in zip(("", *shown), shown, strict=False)]


def portable(text: str) -> str:
    """A text in which a file is named by its place in the current folder, or by its name alone."""
    here = f"{Path.cwd()}/"
    return re.sub(r"(?<![\w./])/(?:[\w.+-]+/)*([\w.+-]+)", r"\1", text.replace(here, ""))


def portable_options(options: OptionsT) -> OptionsT:
    """Options in which files are named as `portable` names them."""
    texts = {
        field.name: portable(value)
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
        if isinstance(value := getattr(options, field.name), str)
    }
    return dataclasses.replace(options, **texts)  # type: ignore[type-var]


def settings_of(config: EngineConfig, facts: EngineFacts) -> dict[str, Any]:
    """What an engine ran with: every option, those that were not given as the engine chose them.

    Args:
        config: As it was given.
        facts: Of the engine.
    """
    given = dataclasses.asdict(portable_options(config))
    chosen = {name: value for name, value in dataclasses.asdict(facts).items() if name in given}
    return {
        **given,
        **chosen,
        "was_given": sorted(name for name in ("max_batch_tokens", "max_num_seqs") if given[name] is not None),
        "plan": facts.plan,
        "book": None if facts.book is None else facts.book.digest,
        "fallback": None if facts.book is None else facts.book.plans[0].digest,
        "num_plans": 0 if facts.book is None else len(facts.book.plans) - 1,
    }


def require_clean(path: Path | str | None, *, allows_dirty: bool = False) -> None:
    """Refuse to measure for a record that is kept, if nobody could say from which sources.

    Args:
        path: Where the record is to be written; None and places outside `benchmarks/results` are always allowed.
        allows_dirty: Write it nevertheless; the record says that it is from sources that no revision has.

    Raises:
        ConfigError: There are changes without a commit, or there is no revision at all.
    """
    if path is None or allows_dirty or not _is_kept(Path(path)):
        return
    revision = git_revision()
    if revision is None:
        raise ConfigError(
            f"{path} would not say which sources were measured: set {REVISION_VARIABLE} to their revision, or give "
            "--allow-dirty"
        )
    if revision.endswith(DIRTY):
        raise ConfigError(
            f"{path} would be of sources with changes that no revision has: commit them, write elsewhere, or give "
            "--allow-dirty"
        )


def _is_kept(path: Path) -> bool:
    folders = path.absolute().parts
    return any(folders[place : place + 2] == _KEPT_FOR_GOOD for place in range(len(folders) - 1))
