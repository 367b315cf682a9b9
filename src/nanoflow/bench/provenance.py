"""The head of every record: time, command, machine, revision of the sources, and settings.

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
from nanoflow.engine.book_facts import BookFacts
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
    """The running command in a form that can be typed elsewhere: folders of this machine are removed.

    Args:
        argv: The command line with the interpreter first; None for that of this process.
    """
    words = list(sys.orig_argv if argv is None else argv)
    if words and Path(words[0]).name.startswith("python"):
        # A script beside the interpreter is a command of its own.
        words = words[1:] if len(words) > 1 and Path(words[1]).name == "nanoflow" else ["python", *words[1:]]
    return shlex.join(portable(word) for word in _without_keys(words))


def _without_keys(words: Sequence[str]) -> list[str]:
    """The words of a command; the value of `--api-key` is replaced by stars."""
    shown = [f"{_KEY_FLAG}=***" if word.startswith(f"{_KEY_FLAG}=") else word for word in words]
    return ["***" if before == _KEY_FLAG else word for before, word in zip(("", *shown), shown, strict=False)]


def portable(text: str) -> str:
    """The path of a file relative to the current folder, or else its name alone."""
    here = f"{Path.cwd()}/"
    return re.sub(r"(?<![\w./])/(?:[\w.+-]+/)*([\w.+-]+)", r"\1", text.replace(here, ""))


def portable_options(options: OptionsT) -> OptionsT:
    """Options whose file names are changed as by `portable`."""
    texts = {
        field.name: portable(value)
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
        if isinstance(value := getattr(options, field.name), str)
    }
    return dataclasses.replace(options, **texts)  # type: ignore[type-var]


def facts_of(facts: EngineFacts) -> dict[str, Any]:
    """The facts of an engine for a record: of its plans the names and digests, not what is drawn of them."""
    book = None if facts.book is None else BookFacts(digest=facts.book.digest, plans=facts.book.plans)
    return dataclasses.asdict(dataclasses.replace(facts, book=book))


def settings_of(config: EngineConfig, facts: EngineFacts) -> dict[str, Any]:
    """All settings that an engine ran with: every option, with the engine's choice where none was given.

    Args:
        config: The options as given.
        facts: What the engine reports about itself.
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
    """Refuse to measure for a stored record if the sources are not those of a commit.

    Args:
        path: Where the record will be written; None and paths outside `benchmarks/results` are always allowed.
        allows_dirty: Allow it; the record then says that the sources differ from its revision.

    Raises:
        ConfigError: There are changes that are not committed, or there is no revision.
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
