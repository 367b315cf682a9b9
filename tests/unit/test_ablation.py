"""`benchmarks/ablation.py`: books of rungs, what is run again, the document and table of a ladder; on no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from benchmarks import ablation, rungs
from benchmarks.ladder import NANO_BATCHES, Prediction, book_of, make_ladder, options_of, table

from nanoflow.bench.workload import Lengths, under_way
from nanoflow.cli.main import main as nanoflow
from nanoflow.config import ConfigError
from nanoflow.cost.table import Profile
from nanoflow.plan.book import StoredBook, load_book
from nanoflow.plan.plan import Mechanism
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.search.iteration import graphs_of
from nanoflow.search.shapes import batch_of

CPU = ("--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--no-bounds")
SMALL = ("--max-batch-tokens", "512", "--max-num-seqs", "256")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An estimated profile of the embedded model, with pairs on partitions."""
    path = tmp_path_factory.mktemp("profile") / "a100.json"
    assert nanoflow(["profile", "default", "-o", str(path), "--estimate", "a100-80", "--max-batch-tokens", "512"]) == 0
    return path


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    return Profile.load(path)


def _main(path: Path, folder: Path, *options: str) -> int:
    return ablation.main(["--profile", str(path), "--json-folder", str(folder), *SMALL, *options])


def _record(rung: str, rates: list[float], **changes: Any) -> dict[str, Any]:
    """A made-up record; `changes` are options of workload and engine, bounds, and how many iterations were planned."""
    fallback, planned = {"name": "sequential", "digest": "s"}, {"name": "cut", "digest": "c"}
    is_planned = rung != "sequential"
    options = {"max_batch_tokens": 512, "max_num_seqs": 256, "gpu_memory_utilization": 0.9, "dtype": "bfloat16"}
    run = {
        "energy_per_token_j": changes.get("energy_per_token_j", 0.02),
        "num_failed": 0,
        "num_short": 0,
        "plan_iterations": {"s": 25, "c": 75} if is_planned else {"s": 100},
        "steady": {"total_tokens_per_s": 1500.0, "energy_per_token_j": 0.01} if is_planned else None,
    }
    return {
        "created_utc": "2026-11-24T00:00:00+00:00",
        "machine": {
            "cpu_name": "a CPU",
            "gpus": [{"name": changes.get("gpu", "NVIDIA H200"), "power_limit_w": 700.0, "driver_version": "580"}],
        },
        "software": {"git_revision": "abc", "cuda": "13.0", "packages": {"torch": "2.11", "triton": "3.6"}},
        "model": {
            "weights": "random",
            "book": {"digest": f"book of {rung}", "plans": [fallback, planned] if is_planned else [fallback]},
        },
        "workload": {"workload": changes.get("workload", "64/8"), "num_requests": 10, "seed": changes.get("seed", 0)},
        "config": {"model": "preset:llama-3-8b", **options},
        "repeats": [{**run, "total_tokens_per_s": rate} for rate in rates],
        "bounds": changes.get("bounds"),
    }


RECORDS = {
    "llama-3-8b_64-8_sequential.json": _record(
        "sequential", [990.0, 1010.0], bounds={"serial_tokens_per_s": 1250.0, "optimal_tokens_per_s": 2000.0}
    ),
    "llama-3-8b_64-8_nano-batches.json": _record("nano-batches", [900.0, 900.0]),
    "llama-3-8b_64-8_partition.json": _record("partition", [1100.0, 1120.0]),
}


def _prediction(name: str, rate: float) -> Prediction:
    record = RECORDS[name]
    return Prediction(
        workload="64/8",
        rung=name.removesuffix(".json").rpartition("_")[2],
        book=book_of(record) or "",
        profile="p",
        options=options_of(record),
        total_tokens_per_s=rate,
        energy_per_token_j=0.021,
    )


PREDICTIONS = [
    _prediction("llama-3-8b_64-8_sequential.json", 1000.0),
    _prediction("llama-3-8b_64-8_partition.json", 1050.0),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rungs", "offload"], "there is no rung 'offload'; known: sequential, nano-batches"),
        (["--rungs", "beside"], "no pairs of beside; it has sequential, nano-batches, partition, searched"),
        (["--workloads", "64/8"], "write 64/8:1000"),
        (["--workloads", "64/8:3", "64/8:4"], "two workloads would be written to"),
        (["--workloads", "8000/1000:3"], "a request has 9,000"),
        (["--model", "preset:llama-3-8b"], "the profile is of default, not of preset:llama-3-8b"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--rung", "sequential"], "did you mean '--rungs'"),
        (["--merge"], "there is no record to merge"),
        (["--merge", "--prepare"], "not allowed with"),
    ],
)
def test_what_makes_no_sense_is_refused(
    path: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        _main(path, tmp_path, *options)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_workloads_too_long_for_the_model_are_left_out_and_named(
    profile: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.is_short_enough("64/8", profile) and not ablation.is_short_enough("8000/1000", profile)
    assert "left out: 8000/1000: default is for" in capsys.readouterr().err


def test_nano_batches_cut_every_batch_of_two_tiles_or_more_in_the_middle(profile: Profile) -> None:
    graph = graphs_of(profile)[0]
    entries = list(rungs.nano_batches(graph, 2500))
    covered = [size for entry in entries for size in range(entry.min_tokens, entry.max_tokens + 1)]
    assert covered == list(range(256, 2501))
    for entry in entries:
        entry.plan.validate(graph)
        (cut,) = entry.plan.cuts
        assert cut % 128 == 0 and abs(cut - entry.max_tokens / 2) <= 64 and len(entry.plan.lanes) == 1
        assert entry.max_tokens - entry.min_tokens <= max(entry.max_tokens / 8, 128)
    assert list(rungs.nano_batches(graph, 200)) == []


@pytest.mark.parametrize("mechanism", [Mechanism.PARTITION, Mechanism.BESIDE, Mechanism.STREAM])
def test_a_mechanism_has_plans_even_where_they_lose(profile: Profile, mechanism: Mechanism) -> None:
    pairs = tuple(
        replace(pair, mechanism=mechanism, first_performance=0.3, second_performance=0.3) for pair in profile.pairs
    )
    slow = replace(profile, pairs=pairs)
    run = [(batch_of(tokens, 60, 300.0, 64.0), 1.0) for tokens in (500, 500, 500, 100)]
    (entry,) = rungs.entries_of(slow, mechanism.value, run, 512)
    assert {lane.mechanism for lane in entry.plan.lanes} == {Mechanism.WHOLE, mechanism}
    assert (entry.min_tokens, entry.max_tokens) == (500, 512), "100 tokens are too few to be cut"
    entry.plan.validate(graphs_of(slow)[0])
    assert list(rungs.entries_of(slow, "searched", run, 512)) == [], "it loses, so the search does not take it"


def test_preparing_makes_books_and_predictions_once(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prepare", "--workloads", "40/8:60", "--rungs", "sequential", "nano-batches", "partition")
    assert _main(path, tmp_path, *options) == 0
    books = {file.name for file in (tmp_path / "books").iterdir()}
    assert books == {"default_nano-batches.json", "default_partition.json"}
    stored = json.loads((tmp_path / "predictions_default.json").read_text())
    assert {each["rung"] for each in stored} == {"sequential", "nano-batches", "partition"}
    assert all(each["total_tokens_per_s"] > 0 and each["workload"] == "40/8" for each in stored)
    assert "predicted: 40/8, partition:" in capsys.readouterr().out
    # A book made by hand stays, and is predicted anew.
    graph = graphs_of(Profile.load(path))[0]
    by_hand = tmp_path / "books" / "default_nano-batches.json"
    by_hand.write_bytes(nanobatch_plan(graph, 512, [128]).to_json())
    assert _main(path, tmp_path, *options) == 0
    told = capsys.readouterr().out
    assert "predicted: 40/8, nano-batches:" in told and "partition" not in told and "ranges" not in told
    assert load_book(by_hand).plans[0].cuts == (128,)


def test_only_what_has_no_record_is_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, list[str]]] = []

    def run(task: rungs.Task, rung: str, configs: list[Any]) -> bool:
        ran.append((rung, [config.workload for config in configs]))
        for config in configs:
            record = _record(rung, [100.0], workload=config.workload, seed=config.seed)
            record["workload"]["num_requests"] = config.num_requests
            record["config"] |= {"model": "default"}
            record["model"]["book"]["digest"] = task.book(rung).digest
            task.record_path(config, rung).write_bytes(msgspec.json.encode(record))
        return rung != NANO_BATCHES

    monkeypatch.setattr(ablation, "run_apart", run)
    first, second = ("--workloads", "40/8:60"), ("--workloads", "40/8:60", "50/8:60")
    assert _main(path, tmp_path, *first, "--rungs", "sequential") == 0
    assert _main(path, tmp_path, *second, "--rungs", "sequential", "nano-batches") == 1
    assert ran == [("sequential", ["40/8"]), ("sequential", ["50/8"]), ("nano-batches", ["40/8", "50/8"])]
    assert "failed: nano-batches" in capsys.readouterr().err
    document = json.loads((tmp_path / "ladder_default.json").read_text())
    assert [len(each["rungs"]) for each in document["workloads"]] == [2, 2], "of all runs, not of the last one"
    assert document["workloads"][0]["rungs"][1]["predicted_ratio"] > 0
    # Another number of requests is another run; so is another book.
    with pytest.raises(SystemExit):
        _main(path, tmp_path, "--workloads", "40/8:61", "--rungs", "sequential")
    assert "num_requests is 60, not 61; --force runs it again" in capsys.readouterr().err
    (tmp_path / "books" / "default_nano-batches.json").write_bytes(StoredBook(entries=()).to_json())
    with pytest.raises(SystemExit):
        _main(path, tmp_path, *first, "--rungs", "nano-batches")
    assert "book is" in capsys.readouterr().err
    ran.clear()
    assert _main(path, tmp_path, *first, "--rungs", "sequential", "--force") == 0
    assert ran == [("sequential", ["40/8"])]


def test_a_ladder_has_ratios_shares_and_predictions() -> None:
    (workload,) = make_ladder(RECORDS, PREDICTIONS).workloads
    sequential, cut, overlapped = workload.rungs
    assert [rung.rung for rung in workload.rungs] == ["sequential", "nano-batches", "partition"]
    assert sequential.total_tokens_per_s == 1000.0 and sequential.ratio_to_sequential == 1.0
    assert cut.ratio_to_sequential == pytest.approx(0.9) and cut.predicted_ratio is None
    assert overlapped.ratio_to_sequential == pytest.approx(1.11) and overlapped.predicted_ratio == pytest.approx(1.05)
    assert overlapped.share_of_serial == pytest.approx(1110 / 1250), "bounds know no plan"
    assert overlapped.share_of_optimal == pytest.approx(1110 / 2000)
    assert overlapped.power_w == pytest.approx(0.02 * 1110)
    assert (sequential.planned_part, overlapped.planned_part) == (0.0, 0.75)
    assert (sequential.steady_tokens_per_s, overlapped.steady_tokens_per_s) == (None, 1500.0)
    assert [dict(plan) for plan in overlapped.plans] == [{"name": "cut", "digest": "c"}]


def test_a_ladder_of_some_records_says_what_is_known() -> None:
    record = _record("partition", [100.0], energy_per_token_j=None)
    (workload,) = make_ladder({"llama-3-8b_64-8_partition.json": record}, []).workloads
    (rung,) = workload.rungs
    unknown = (rung.ratio_to_sequential, rung.share_of_serial, rung.energy_per_token_j, rung.power_w)
    assert unknown == (None,) * 4 and workload.serial_tokens_per_s is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 1}, "_partition.json is of another run: seed is 1, not 0"), ({"gpu": "NVIDIA L4"}, "was measured on")],
)
def test_records_that_cannot_be_compared_are_refused(changes: dict[str, Any], message: str) -> None:
    name = "llama-3-8b_64-8_partition.json"
    with pytest.raises(ConfigError, match=message):
        make_ladder({**RECORDS, name: _record("partition", [1.0], **changes)}, [])


def test_workloads_are_in_order_of_their_lengths() -> None:
    records = {
        f"m_{name}_sequential.json": _record("sequential", [1.0], workload=text)
        for name, text in (("lmsys", "trace:lmsys.csv"), ("1024-512", "1024/512"), ("512-512", "512/512"))
    }
    found = [workload.workload for workload in make_ladder(records, []).workloads]
    assert found == ["512/512", "1024/512", "trace:lmsys.csv"]


def test_the_table_has_a_line_a_rung() -> None:
    lines = table(make_ladder(RECORDS, PREDICTIONS)).splitlines()
    assert lines[0] == "64/8 x 10; serial bound 1,250, optimal 2,000 tokens/s"
    assert " ".join(lines[4].split()) == "partition 1,110 (1,100 to 1,120) 1.110 1.050 55.5 88.8 20.0 22 1,500 10.0 75%"
    assert len(lines) == 5 and lines[3].split()[5:7] == ["0.900", "-"]


def test_lengths_of_requests_are_those_of_the_workload(path: Path, tmp_path: Path) -> None:
    args = ablation.make_parser().parse_args(
        ["--profile", str(path), "--json-folder", str(tmp_path), *SMALL, "--workloads", "40/8:60"]
    )
    task = ablation.read_task(args)
    assert task.engine.dtype == "bfloat16" and task.workloads[0].repeats == 3
    iterations = rungs.iterations_of(task, task.workloads[0])
    # All at once, and once more after requests under way; the last token of each is never worked on.
    lengths = [Lengths(num_prompt_tokens=40, num_output_tokens=8)] * 60
    first = under_way(lengths, 1 << 30, 256, 512, task.workloads[0].seed)
    assert len(first) == -(-512 * 8 // 48)
    tokens = [
        length.num_prompt_tokens + length.num_output_tokens - 1 - length.num_computed
        for length in (*lengths, *first, *lengths)
    ]
    assert sum(shape.num_tokens for shape, _ in iterations) == sum(tokens)
    assert task.book("sequential").fallback == sequential_plan(task.graph, 512)


@pytest.mark.slow
def test_two_rungs_on_the_embedded_model(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "lengths.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n40,4\n")
    options = (*CPU, "--workloads", f"trace:{trace}:40", "--rungs", "sequential", "nano-batches", "--repeats", "2")
    assert _main(path, tmp_path, *options, "--git-revision", "abc", "--num-warmup", "1") == 0
    told = capfd.readouterr().out
    assert "nano-batches: trace:" in told and "trace:lengths.csv x 40" in told
    (workload,) = json.loads((tmp_path / "ladder_default.json").read_text())["workloads"]
    sequential, cut = workload["rungs"]
    assert workload["workload"] == "trace:lengths.csv" and workload["num_requests"] == 40
    assert len(cut["total_tokens_per_s_repeats"]) == 2 and cut["num_failed"] == cut["num_short"] == 0
    assert sequential["planned_part"] == 0 and cut["planned_part"] > 0 and cut["predicted_ratio"] > 0
    text = (tmp_path / "default_lengths_nano-batches.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["config"]["plan"] == "default_nano-batches.json"
    assert json.loads(text)["software"]["git_revision"]
    assert _main(path, tmp_path, *options) == 0, "nothing is left to run"
    assert "nano-batches: trace:" not in capfd.readouterr().out
