"""`benchmarks/session.py`: which commands run in which order, what is not run twice, what is cut; nothing runs."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks import session
from benchmarks.ladder import steady, whole_runs

from nanoflow.cli.main import build_parser
from nanoflow.models.config_json import load
from nanoflow.models.locate import locate_model
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, BookPrediction, PlanEntry, StoredBook, WorkloadPrediction
from nanoflow.plan.sequential import nanobatch_plan
from tests.unit.test_books import path as profile

__all__ = ["profile"]
TRACES = ("sharegpt", "lmsys", "splitwise")


class Commands:
    """Instead of processes: notes what it is given, and does what the benchmark would leave behind."""

    def __init__(self, book: bytes) -> None:
        self.ran: list[list[str]] = []
        self.broken: str | None = None
        self._book = book

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float | None) -> int | None:
        assert command[:2] == [sys.executable, "-m"] and environment["PATH"]
        words = list(command[2:])
        self.ran.append(words)
        if words[0] == self.broken:
            return 1
        if words[0] == "nanoflow":
            Path(words[words.index("-o") + 1]).write_bytes(self._book)
        elif words[0] == "benchmarks.ladder.books":
            for rung in words[words.index("--rungs") + 1 :]:
                folder = Path(words[words.index("--out") + 1])
                (folder / f"default_{rung}_64-12.json").write_bytes(self._book)
        else:
            record = {"results": [{"name": "searched", "base": "sequential", "ratio": 1.07}]}
            Path(words[words.index("--json") + 1]).write_text(json.dumps(record))
        return 0

    @property
    def names(self) -> list[str]:
        """Of the benchmarks that ran, without their folders."""
        return [words[0].rpartition(".")[2] for words in self.ran]


@pytest.fixture(scope="module")
def book() -> bytes:
    graph = build_graph(load(locate_model("default", None)), None)
    limits = BookLimits(max_batch_tokens=64, max_num_seqs=12)
    prediction = BookPrediction(
        sequential_limits=BookLimits(max_batch_tokens=32, max_num_seqs=8),
        workloads=(WorkloadPrediction(workload="w", num_requests=1, sequential_tokens_per_s=1, tokens_per_s=2),),
    )
    entry = PlanEntry(plan=nanobatch_plan(graph, 64, [32]), min_tokens=33, max_tokens=64)
    return StoredBook(entries=(entry,), limits=limits, prediction=prediction).to_json()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, book: bytes, tmp_path: Path) -> Commands:
    fake = Commands(book)
    monkeypatch.setattr(session, "run_command", fake)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "book.json").write_bytes(book)
    for name in TRACES:
        (tmp_path / f"{name}.csv").write_text("ContextTokens,GeneratedTokens\n5,2\n")
    return fake


def _session(tmp_path: Path, profile: Path, *options: str) -> int:
    given = ["--out", str(tmp_path / "out"), "--traces", str(tmp_path)]
    given += ["--model", "default"]
    files = ["--profile", str(profile), "--book", str(tmp_path / "book.json"), "--sequential", "128/16"]
    return session.main([*given, *files, *options])


def _options(words: Sequence[str]) -> Any:
    """As the command itself reads them."""
    return importlib.import_module(words[0]).make_parser().parse_args(words[1:])


def test_every_piece_is_a_command_that_its_benchmark_understands(
    commands: Commands, tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _session(tmp_path, profile) == 0
    one = ["nanoflow", "books", "whole_runs", "steady"]
    assert commands.names == ["startup"] * 2 + ["sampled"] + ["serving"] * 5 + ["limits"] + one * 8
    for words in commands.ran:
        if words[0] == "nanoflow":
            build_parser().parse_args(words[1:])
        elif words[0] != "benchmarks.engine.startup":
            _options(words)
    whole = next(words for words in commands.ran if words[0] == "benchmarks.ladder.whole_runs")
    (setting, *_) = whole_runs.read_settings(_options(whole))
    assert setting.config.workload == "512/512" and setting.config.num_requests == 1100
    rungs = [text.partition("=") for text in _options(whole).rungs]
    assert [name for name, _, _ in rungs] == ["sequential", "sequential", "searched"]
    assert [what for _, _, what in rungs][:2] == ["128/16", "32/8"], "those given, and those that the search says"
    turns = next(words for words in commands.ran if words[0] == "benchmarks.ladder.steady")
    groups = steady.read_task(_options(turns)).groups
    assert [[rung.name for rung in group] for group in groups] == [
        ["sequential 128/16"],
        ["sequential 64/12", "nano-batches", "partition", "searched"],
        ["sequential 32/8"],
    ]
    told = capsys.readouterr().out
    assert "searched 1.070 of sequential" in told and "41 of 41 done" in told and str(tmp_path) not in told
    # Begun again nothing runs, unless a record is lost or another one is asked for.
    commands.ran.clear()
    assert _session(tmp_path, profile) == 0 and commands.ran == []
    (tmp_path / "out" / "limits_default.json").unlink()
    assert _session(tmp_path, profile) == 0 and commands.names == ["limits"]
    commands.ran.clear()
    assert _session(tmp_path, profile, "--only", "sampled", "startup", "--repeats", "2") == 0
    assert commands.names == ["startup"] * 2 + ["sampled"], "starts are made again, kinds of sampling go on"


def test_a_quick_session_has_fewer_requests_and_records_of_its_own(
    commands: Commands, tmp_path: Path, profile: Path
) -> None:
    assert _session(tmp_path, profile, "--only", "sampled", "serving-default-20", "--quick") == 0
    assert commands.names == ["sampled", "serving"]
    assert _options(commands.ran[0]).workloads == [f"trace:{tmp_path}/sharegpt.csv:375"]
    assert _options(commands.ran[1]).rates == ["20:300"]
    assert _session(tmp_path, profile, "--only", "search-512-512", "--quick", "--no-trials") == 0
    assert "--measure" not in commands.ran[2] and (tmp_path / "out" / "books" / "512-512" / "searched.json").exists()
    assert (tmp_path / "out" / "quick" / "sampled_default.json").exists()


def test_what_fails_is_told_and_tried_again(
    commands: Commands, tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.broken = "benchmarks.engine.sampled"
    only = ("--only", "sampled", "limits")
    assert _session(tmp_path, profile, *only) == 1 and commands.names == ["sampled", "limits"]
    assert "FAILED" in capsys.readouterr().out
    commands.broken = None
    assert _session(tmp_path, profile, *only) == 0 and commands.names == ["sampled", "limits", "sampled"]


def test_nothing_is_begun_that_could_not_end_in_time(
    commands: Commands, tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--only", "startup-plain", "sampled")
    assert _session(tmp_path, profile, *only, "--time-limit", "120") == 1
    assert commands.names == ["sampled"], "a start is not cut, kinds of sampling go on where they were"
    assert 90 <= float(_options(commands.ran[0]).time_limit) <= 105
    assert "startup-plain" in capsys.readouterr().out
    assert _session(tmp_path, profile, *only, "--time-limit", "10") == 1 and len(commands.ran) == 1
    assert _session(tmp_path, profile, *only, "--list") == 1 and len(commands.ran) == 1


def test_what_a_piece_lacks_is_told(
    commands: Commands, tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sharegpt.csv").unlink()
    assert _session(tmp_path, profile, "--only", "sampled", "whole-runs-512-512") == 1 and commands.ran == []
    told = capsys.readouterr().out
    assert "needs sharegpt.csv" in told and "needs searched.json" in told
    # A search in which nothing won leaves nothing to compare.
    folder = tmp_path / "out" / "books" / "512-512"
    folder.mkdir(parents=True)
    (folder / "searched.json").write_bytes(StoredBook(entries=()).to_json())
    assert _session(tmp_path, profile, "--only", "whole-runs-512-512") == 0 and commands.ran == []
    assert "no plan wins" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _session(tmp_path, profile, "--only", "sampling")
    assert "there is no piece 'sampling'" in capsys.readouterr().err


def test_a_command_that_is_cut_ends(tmp_path: Path) -> None:
    note = tmp_path / "ended"
    code = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1] + '.begun').touch()\n"
        "try: time.sleep(60)\n"
        "finally: pathlib.Path(sys.argv[1]).touch()"
    )
    begin_s = time.monotonic()
    assert session.run_command([sys.executable, "-c", code, str(note)], os.environ, 1.0) is None
    assert note.exists() and time.monotonic() - begin_s < 30, "as by Ctrl-C, so that it can tidy up"
    assert session.run_command([sys.executable, "-c", "raise SystemExit(3)"], os.environ, None) == 3
