"""Settings in turn: what runs in which order, what is not run twice, and what a setting is worth; no engine runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.common import in_turn
from benchmarks.common.apart import RunFailed
from benchmarks.engine import limits, sampled
from benchmarks.ladder import whole_runs

from nanoflow.bench.options import ThroughputConfig
from nanoflow.bench.provenance import command, portable, require_clean, settings_of
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.book_facts import BookFacts, PlanName
from nanoflow.models.config_json import load
from nanoflow.models.locate import locate_model
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, PlanEntry, StoredBook, load_book
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.run_metrics import RequestRecord, measure
from tests.unit.test_bench import FakeLLM
from tests.unit.test_serving import rendered

REQUEST = RequestRecord(num_prompt_tokens=6, num_requested_tokens=3, num_output_tokens=3, finished_s=1.0)
FALLBACK = PlanName(name="sequential", digest="f")


class Engines:
    """Instead of engines in processes of their own: notes what they are given; a run takes `seconds` of its name."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.broken_at: int | None = None

    def run_apart(
        self, engine: EngineConfig, configs: Sequence[ThroughputConfig], deadline_s: float | None = None
    ) -> Iterator[BenchRecord]:
        self.groups.append([f"{config.workload} {config.temperature}" for config in configs])
        for config in configs:
            if self.broken_at is not None and sum(map(len, self.groups)) > self.broken_at:
                raise RunFailed("out of memory")
            yield self.record(engine, config)

    def record(self, engine: EngineConfig, config: ThroughputConfig) -> BenchRecord:
        plans = () if engine.plan is None else (PlanName(name="cut", digest="c"),)
        facts = dataclasses.replace(
            FakeLLM.facts,
            max_batch_tokens=engine.max_batch_tokens or 7,
            max_num_seqs=engine.max_num_seqs or 5,
            book=BookFacts(digest="b", plans=(FALLBACK, *plans)),
        )
        # The larger the budget, the faster, and half as fast if sampled.
        run = measure([REQUEST], (2.0 if config.temperature else 1.0) / facts.max_batch_tokens, {})
        counts = {"f": 1, "c": 3} if plans else {"f": 4}
        return make_record(
            "throughput",
            model={},
            plan=None,
            workload=config,
            config=engine,
            repeats=[dataclasses.replace(run, plan_iterations=counts)],
            settings=settings_of(engine, facts),
        )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    fake = Engines()
    monkeypatch.setattr(in_turn, "run_apart", fake.run_apart)
    return fake


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = build_graph(load(locate_model("default", None)), None)
    entry = PlanEntry(plan=nanobatch_plan(graph, 64, [32]), min_tokens=33, max_tokens=64)
    path = tmp_path_factory.mktemp("books") / "book.json"
    path.write_bytes(StoredBook(entries=(entry,), limits=BookLimits(max_batch_tokens=64, max_num_seqs=12)).to_json())
    return path


def _whole_runs(path: Path, *options: str) -> int:
    return whole_runs.main(["--model", "default", "--workloads", "6/3:1", "9/3:1", "--json", str(path), *options])


def test_rungs_run_at_their_own_limits_beside_the_best_sequential_one(
    engines: Engines,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "runs.json"
    rungs = ("--rungs", "sequential=32/8", "sequential=128/8", f"searched={book}", "--repeats", "2")
    assert _whole_runs(path, *rungs) == 0
    assert len(engines.groups) == 5, "an engine a rung and repeat, and one where a repeat turns back"
    document = json.loads(path.read_text())
    results = {(each["workload"], each["name"]): each for each in document["results"]}
    searched = results["6/3", "searched"]
    assert searched["base"] == "sequential 128/8" and searched["limits"] == "64/12", "those that the book says"
    assert searched["ratio"] == pytest.approx(0.5) and searched["ratios"] == pytest.approx([0.5, 0.5])
    assert (searched["num_plans"], searched["planned_part"]) == (1, 0.75)
    assert results["9/3", "sequential 32/8"]["ratio"] == pytest.approx(0.25)
    assert results["9/3", "sequential 32/8"]["planned_part"] == 0.0
    run = document["runs"][0]
    assert run["settings"]["goal"] == "throughput" and run["settings"]["was_given"] == [
        "max_batch_tokens",
        "max_num_seqs",
    ]
    assert document["command"] and document["machine"] and document["is_complete"]
    assert "searched" in capsys.readouterr().out
    text, rows = rendered(document, "whole_runs_llama-3-8b", tmp_path / "results", monkeypatch)
    (row,) = (line for line in text.splitlines() if line.startswith("| 6/3 | 1 | 2 | searched |"))
    assert "64 tokens, 12 requests, goal throughput, book b (1 plans)" in row and "| sequential 128/8 | 0.500" in row
    assert rows[3][1].startswith("6/3: 0.500 times the tokens/s (0.500 to 0.500) (1 requests, 2 repeats); 9/3: 0.500")
    assert rows[3][3] == "whole_runs_llama-3-8b" and len(rows) == 5


def test_repeats_go_forwards_and_backwards_in_turn() -> None:
    engine, config = EngineConfig(), ThroughputConfig()
    settings = [in_turn.Setting(name=name, engine=engine, config=config) for name in "abc"]
    order = [(wanted.setting.name, wanted.repeat) for wanted in in_turn.in_order(settings, 3)]
    assert "".join(name for name, _ in order) == "abc" + "cba" + "abc"
    assert [repeat for _, repeat in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_is_there_does_not_run_again_and_what_is_cut_off_is_not_lost(engines: Engines, tmp_path: Path) -> None:
    path, rungs = tmp_path / "runs.json", ("--rungs", "sequential=32/8", "sequential=64/8", "--repeats", "1")
    engines.broken_at = 3
    assert _whole_runs(path, *rungs) == 1
    document = json.loads(path.read_text())
    assert len(document["runs"]) == 2 and not document["is_complete"]
    assert [each["name"] for each in document["results"]] == ["sequential 32/8"] * 2, "what it is worth is there too"
    engines.broken_at, engines.groups = None, []
    assert _whole_runs(path, *rungs) == 0
    assert engines.groups == [["6/3 0.0", "9/3 0.0"]], "the first engine has nothing left to run"
    engines.groups = []
    assert _whole_runs(path, *rungs) == 0 and engines.groups == []
    assert _whole_runs(path, *rungs, "--fresh") == 0 and len(engines.groups) == 2
    engines.groups = []
    assert _whole_runs(path, *rungs, "--fresh", "--time-limit", "0") == 1 and engines.groups == []


@pytest.mark.parametrize(
    ("rung", "message"),
    [
        ("searched=2048/1024", "has no plan book, so it would be sequential"),
        ("searched=balanced", "has no plan book, so it would be sequential"),
        ("sequential=BOOK", "a sequential rung has no plan book"),
        ("searched=EMPTY", "the book has no plan, so the run would be sequential"),
        ("searched=SILENT", "the book says no limits"),
        ("sequential", "is no rung"),
    ],
)
def test_rungs_that_would_not_be_what_they_are_named_are_refused(
    rung: str, message: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").write_bytes(StoredBook(entries=()).to_json())
    (tmp_path / "SILENT").write_bytes(StoredBook(entries=load_book(book).entries).to_json())
    for name, path in (("BOOK", book), ("EMPTY", tmp_path / "EMPTY"), ("SILENT", tmp_path / "SILENT")):
        rung = rung.replace(name, str(path))
    with pytest.raises(SystemExit):
        _whole_runs(tmp_path / "runs.json", "--rungs", "sequential=2/2", rung)
    assert message in capsys.readouterr().err


def test_a_ladder_needs_something_to_compare_with(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _whole_runs(tmp_path / "runs.json", "--rungs", f"searched={book}")
    assert "no sequential rung" in capsys.readouterr().err


def test_kinds_of_sampling_take_turns_on_one_engine(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sampled.json"
    options = ("--model", "default", "--workloads", "6/3:1", "--json", str(path), "--kinds", "top_p", "logprobs")
    assert sampled.main([*options, "--repeats", "2"]) == 0
    assert engines.groups == [["6/3 0.0", "6/3 0.8", "6/3 0.0"] * 2]
    document = json.loads(path.read_text())
    assert {each["name"]: each["ratio"] for each in document["results"]} == pytest.approx(
        {"greedy": 1.0, "top_p": 0.5, "logprobs": 1.0}
    )
    asked = [run["asked"]["sampling"] for run in document["runs"][:3]]
    assert asked == [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95}, {"temperature": 0.0, "logprobs": 5}]
    text, _ = rendered(document, "sampled_llama-3-8b", tmp_path / "results", monkeypatch)
    (row,) = (line for line in text.splitlines() if line.startswith("| 6/3 | 1 | 2 | top_p |"))
    assert "## Sampled" in text and "| greedy | 0.500 (0.500 to 0.500)" in row


def test_chosen_limits_stand_beside_the_best_pair(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    options = ["--model", "default", "--workloads", "6/3:1", "--json", str(path), "--repeats", "1"]
    assert limits.main([*options, "--pairs", "10/2", "14/2"]) == 0
    results = {each["name"]: each for each in json.loads(path.read_text())["results"]}
    default = EngineConfig()
    chosen = (default.max_batch_tokens or 7) / 14
    assert results["chosen for balanced"]["base"] == "14/2"
    assert results["chosen for balanced"]["ratio"] == pytest.approx(chosen)
    with pytest.raises(SystemExit):
        limits.main([*options, "--pairs", "10"])


# --- what records begin with --------------------------------------------------------------------------------------


def test_a_command_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["/usr/bin/python3.11", "-m", "benchmarks.x", "trace:/a/b/lengths.csv", f"{tmp_path}/out/x.json", "512/512"]
    assert command(words) == "python -m benchmarks.x trace:lengths.csv out/x.json 512/512"
    assert command(["/usr/bin/python3", "/opt/bin/nanoflow", "bench"]) == "nanoflow bench"
    assert portable("http://127.0.0.1:8000/v1") == "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize("revision", ["0123-dirty", None])
def test_records_that_are_kept_need_a_clean_revision(revision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.bench.provenance.git_revision", lambda: revision)
    kept = Path("benchmarks/results/run.json")
    with pytest.raises(ConfigError, match="--allow-dirty"):
        require_clean(kept)
    require_clean(kept, allows_dirty=True)
    require_clean(None)
    require_clean(Path("/tmp/run.json"))
    monkeypatch.setattr("nanoflow.bench.provenance.git_revision", lambda: "0123")
    require_clean(kept)


def test_settings_are_those_that_the_engine_chose() -> None:
    facts = dataclasses.replace(FakeLLM.facts, max_batch_tokens=4096, max_num_seqs=512, dtype="bfloat16")
    found: dict[str, Any] = settings_of(EngineConfig(model="/a/b/my-model", goal="latency"), facts)
    assert (found["max_batch_tokens"], found["max_num_seqs"], found["goal"]) == (4096, 512, "latency")
    assert (found["model"], found["dtype"], found["book"]) == ("my-model", "bfloat16", None)
