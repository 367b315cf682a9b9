"""`nanoflow plan show`: what it draws of which files, and what it says of bad ones."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from nanoflow.cli import plan as command
from nanoflow.cli.options import CommandParser
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, BookPrediction, MadeFor, PlanEntry, StoredBook, WorkloadPrediction
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.profile.table import SAMPLING, Point, Profile, Setup
from tests.toy_models import write_toy_model

GRAPH = build_graph(preset_config("llama-3.2-1b"), None)
HALVES = nanobatch_plan(GRAPH, 256, [128], name="halves")
WHOLE = sequential_plan(GRAPH, 64)


def show(*argv: str | Path) -> int:
    parser = CommandParser(prog="nanoflow")
    command.add_parser(parser.add_subparsers(prog="nanoflow"))
    args = parser.parse_args(["plan", "show", *map(str, argv)])
    status: int = args.run(args)
    return status


def shown(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert show(*argv) == 0
    return capsys.readouterr().out


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_bytes(HALVES.to_json())
    return path


@pytest.fixture
def book_file(tmp_path: Path) -> Path:
    entries = (
        PlanEntry(plan=WHOLE, min_tokens=1, max_tokens=64),
        PlanEntry(plan=HALVES, min_tokens=65, max_tokens=256, min_decode_share=0.25, max_decode_context=900.0),
    )
    path = tmp_path / "book.json"
    path.write_bytes(StoredBook(entries=entries, made_for=MadeFor(model="preset:x", gpu="H200")).to_json())
    return path


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    """A profile of the toy model with SwiGLU fused, in which every operation takes 10 us whatever its size."""
    folder = tmp_path / "toy"
    folder.mkdir()
    config = json.loads((write_toy_model(folder) / "config.json").read_text())
    names = [op.name for op in fuse_swiglu(GRAPH).operations()]
    points = tuple(Point(operation=name, num_tokens=64, time_s=10e-6) for name in [*names, SAMPLING])
    setup = Setup(gpu="H200", memory_bytes=1e9)
    path = tmp_path / "profile.json"
    path.write_bytes(Profile(model="toy", config=config, setup=setup, is_fused=True, points=points).to_json())
    return path


def test_without_a_profile_only_the_order_is_drawn(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    lines = shown(capsys, plan_file, "--width", "200", "--layers", "1").splitlines()
    assert lines[0] == "halves, order only: as wide as its tokens"
    assert lines[1].startswith("whole   A:an░░")
    assert lines[2].startswith("tokens  0") and "compute" not in "".join(lines)


def test_a_model_says_what_bounds_each_operation(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    text = shown(capsys, plan_file, "--model", "preset:llama-3.2-1b")
    assert "\ncompute" in text and "\nmemory" in text and "\nnetwork" not in text


def test_a_fused_plan_finds_the_fused_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "fused.json"
    path.write_bytes(sequential_plan(fuse_swiglu(GRAPH), 64).to_json())
    assert "\ncompute" in shown(capsys, path, "--model", "preset:llama-3.2-1b")


def test_a_book_is_listed_and_a_name_or_digest_chooses(
    capsys: pytest.CaptureFixture[str], book_file: Path, tmp_path: Path
) -> None:
    head, titles, first, second = shown(capsys, book_file).splitlines()
    assert head == "plans for preset:x on 1 x H200; --name NAME draws one"
    assert " ".join(titles.split()) == "name digest tokens decode share context keys lanes us a layer"
    assert first.split() == ["sequential", WHOLE.digest, "1-64", "0.00-1.00", "0-", "0-", "1", "-"]
    assert second.split() == ["halves", HALVES.digest, "65-256", "0.25-1.00", "0-900", "0-", "1", "-"]
    for name in ("halves", HALVES.digest):
        assert shown(capsys, book_file, "--name", name).startswith("halves, order only")
    with pytest.raises(ValueError, match="unknown plan 'halfs'; known: sequential, halves"):
        show(book_file, "--name", "halfs")
    drawn = shown(capsys, book_file, "--svg", tmp_path / "x.svg")
    assert f"drawing sequential ({WHOLE.digest}), the plan that runs most of the time" in drawn
    assert (tmp_path / "x.svg").exists() and "sequential, order only" in drawn


def test_an_empty_book(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "book.json"
    path.write_bytes(StoredBook(entries=()).to_json())
    assert shown(capsys, path).startswith("the plan book has no plans: every batch runs sequentially, ")
    assert shown(capsys, path, "--profile", "nowhere.json").startswith("the plan book has no plans: ")
    with pytest.raises(ValueError, match="has no plan to draw: every batch runs sequentially"):
        show(path, "--svg", tmp_path / "x.svg")
    with pytest.raises(ValueError, match="no plan 'best': the plan book has no plans"):
        show(path, "--name", "best")


def test_a_book_says_under_which_limits_it_is_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, other = (BookLimits(max_batch_tokens=tokens, max_num_seqs=512) for tokens in (2048, 8192))
    workload = WorkloadPrediction(
        workload="1024/512", num_requests=1400, sequential_tokens_per_s=20_000.0, tokens_per_s=21_000.0
    )
    book = StoredBook(
        entries=(), limits=best, prediction=BookPrediction(sequential_limits=other, workloads=(workload,))
    )
    path = tmp_path / "book.json"
    path.write_bytes(book.to_json())
    assert shown(capsys, path).splitlines()[:-1] == [
        "best limits: 2,048 tokens, 512 requests",
        "sequential best: 8,192 tokens, 512 requests",
        "1024/512 x 1,400: 21,000 tokens/s, predicted, sequentially 20,000: 1.050x of the best sequential run",
        "the plan book has no plans: every batch runs sequentially, which is what was predicted to be fastest",
    ]


def test_a_picture_is_written(capsys: pytest.CaptureFixture[str], plan_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    shown(capsys, plan_file, "--svg", picture)
    root = ET.fromstring(picture.read_text(encoding="utf-8"))
    assert len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == 3 * len(HALVES.nano_operations)


def test_perfetto_gets_a_thread_for_each_lane_and_an_event_for_each_span(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, profile_file: Path
) -> None:
    path, written = tmp_path / "fused.json", tmp_path / "trace.json"
    plan = nanobatch_plan(fuse_swiglu(GRAPH), 64, [32], name="mine")
    path.write_bytes(plan.to_json())
    shown(capsys, path, "--profile", profile_file, "--layers", "2", "--chrome-trace", written)
    events = json.loads(written.read_bytes())["traceEvents"]
    named = {(each["name"], each["pid"]): each["args"]["name"] for each in events if each["ph"] == "M"}
    spans = [each for each in events if each["ph"] == "X"]
    assert named["process_name", 0].startswith("mine, predicted") and {each["pid"] for each in spans} == {0}
    assert len(spans) == 2 * len(plan.nano_operations) and {each["args"]["layer"] for each in spans} == {0, 1}
    assert all(each["dur"] > 0 and each["cat"] in ("compute", "memory") for each in spans)
    ends = dict[int, float]()
    for each in spans:  # those of one lane follow each other
        assert each["ts"] >= ends.get(each["tid"], 0.0) - 1e-6
        ends[each["tid"]] = each["ts"] + each["dur"]


def test_with_a_profile_the_prediction_stands_beside_the_sequential_plan(
    capsys: pytest.CaptureFixture[str], profile_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "fused.json"
    path.write_bytes(nanobatch_plan(fuse_swiglu(GRAPH), 64, [32], name="mine").to_json())
    text = shown(capsys, path, "--profile", profile_file, "--decodes", "16")
    # Nine operations twice, for decodes and prompts are dealt over both halves.
    assert text.startswith(
        "mine, predicted for 16 decodes with 1,024 keys in 64 tokens: 180.0 us a layer, "
        "50.0 % slower than one after the other (90.0 us)\n"
    )
    assert "\ncompute" in text


@pytest.mark.parametrize(
    ("ranges", "options", "batch"),
    [
        ({}, (), "32 decodes with 1,024 keys"),
        ({"min_decode_share": 0.25, "max_decode_share": 0.5}, (), "24 decodes with 1,024 keys"),
        (
            {"min_decode_share": 0.25, "max_decode_share": 0.5, "min_keys": 90.0, "max_keys": 210.0},
            (),
            "24 decodes with 400",
        ),
        ({"min_decode_context": 500.0, "max_decode_context": 900.0}, (), "32 decodes with 700 keys"),
        (
            {"min_decode_share": 0.25, "max_decode_share": 0.5},
            ("--decodes", "8", "--context", "9"),
            "8 decodes with 9 keys",
        ),
    ],
)
def test_a_plan_of_a_book_is_drawn_for_a_batch_that_it_is_for(
    capsys: pytest.CaptureFixture[str],
    profile_file: Path,
    tmp_path: Path,
    ranges: dict[str, float],
    options: tuple[str, ...],
    batch: str,
) -> None:
    plan = nanobatch_plan(fuse_swiglu(GRAPH), 64, [32], name="mine")
    entry = PlanEntry(plan=plan, min_tokens=33, max_tokens=64, **ranges)
    path = tmp_path / "book.json"
    path.write_bytes(StoredBook(entries=(entry,)).to_json())
    assert f"mine, predicted for {batch}" in shown(capsys, path, "--profile", profile_file, *options)


def test_a_plan_for_another_form_of_the_model_is_refused(plan_file: Path, profile_file: Path) -> None:
    with pytest.raises(ValueError, match="has no operation 'activation' in its layer"):
        show(plan_file, "--profile", profile_file)


def test_a_trace_is_drawn_below(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = {"norm": "_rms_norm", "proj": "nvjet_tst", "append": "_rope_append", "activation": "_swiglu"}
    attentions = {"decode_attention": "decode_program", "prefill_attention": "prefill_program"}
    launched = [
        attentions.get(nano.operation) or names[nano.operation.rpartition("_")[2]]
        for _, nano in WHOLE.issue_order(GRAPH.num_layers)
    ]
    events = [
        {"cat": "kernel", "name": name, "ts": 5.0 * place, "dur": 5.0, "args": {"stream": 7}}
        for place, name in enumerate([*launched, "_rms_norm", "nvjet_tst"])
    ]
    trace, plan = tmp_path / "trace.json", tmp_path / "plan.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    plan.write_bytes(WHOLE.to_json())
    text = shown(capsys, plan, "--trace", trace, "--model", "preset:llama-3.2-1b", "--layers", "2")
    assert "sequential, order only" in text and "sequential, measured: 50.0 us a layer" in text
    with pytest.raises(ValueError, match="--trace needs --profile or --model"):
        show(plan, "--trace", trace)
    with pytest.raises(ValueError, match="an iteration: is it of whole iterations"):
        show(plan, "--trace", trace, "--model", "preset:llama-3.2-1b", "--decodes", "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decodes", "257"], "--decodes must be from 0 to the plan's 256 tokens, got 257"),
        (["--context", "0"], "--context must be positive, got 0"),
        (["--layers", "0"], "--layers must be positive, got 0"),
        (["--width", "10"], "a width of 10 columns is too small"),
        (["--profile", "nowhere.json"], "cannot read profile nowhere.json"),
    ],
)
def test_bad_options_are_named(plan_file: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show(plan_file, *options)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match=r"cannot read plan .*plan\.json"):
        show(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="neither a pipeline plan"):
        show(path)


def test_a_terminal_without_block_characters_gets_ascii(plan_file: Path) -> None:
    code = (
        "import sys; from nanoflow.cli import plan; from nanoflow.cli.options import CommandParser;"
        "parser = CommandParser(); plan.add_parser(parser.add_subparsers());"
        f"args = parser.parse_args(['plan', 'show', {str(plan_file)!r}]); args.run(args);"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr.decode()
    assert b"order only" in result.stdout and b"A-" in result.stdout
