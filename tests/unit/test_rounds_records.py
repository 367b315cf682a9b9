"""Records of conversations: the benchmark that runs engines in turn, the picture, and the part of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from benchmarks.common.stub_facts import stub_facts
from benchmarks.engine import rounds as in_turn

from nanoflow.bench.options import BenchConfig
from nanoflow.bench.provenance import settings_of
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.conversation_options import ConversationConfig
from nanoflow.engine.errors import EngineError
from nanoflow.round_metrics import AskedRound, ConversationMetrics, measure_conversations
from nanoflow.run_metrics import RequestRecord

ROOT = Path(__file__).resolve().parents[2]


def metrics(hit_rate: float, *, ttft_s: float = 1.0, completions: Sequence[str] = ("a", "b")) -> ConversationMetrics:
    """Two conversations of two rounds, of 100 and 200 prompt tokens, of which so many are cached."""
    asked = [
        AskedRound(
            conversation=place,
            round=number,
            record=RequestRecord(
                num_prompt_tokens=100 * number,
                num_requested_tokens=10,
                num_output_tokens=10,
                first_token_s=ttft_s * number,
                finished_s=ttft_s * number + 1,
            ),
            num_cached_tokens=round(100 * number * hit_rate),
            num_repeated_tokens=0,
        )
        for place in range(2)
        for number in (1, 2)
    ]
    return measure_conversations(asked, ttft_s * 10, {}, num_left_out=0, tiers={}, completions=completions)


class FakeRuns:
    """Stands for `run_engine_rounds`: a record at once, with more hits and other completions on a larger page."""

    def __init__(self, broken: str | None = None) -> None:
        self.calls: list[tuple[EngineConfig, int]] = []
        self._broken = broken

    def __call__(
        self, engine: EngineConfig, config: BenchConfig, talk: ConversationConfig, repeats: Sequence[int]
    ) -> BenchRecord:
        self.calls.append((engine, repeats[0]))
        if self._broken == str(engine.page_size):
            raise EngineError("it does not start")
        is_large = engine.page_size == 32
        found = metrics(
            0.75 if is_large else 0.5,
            ttft_s=0.25 if is_large else 1.0 + repeats[0],
            completions=("a", "x") if is_large else ("a", "b"),
        )
        facts = stub_facts(num_pages=engine.num_pages)
        return make_record(
            "rounds",
            model={"name": engine.model},
            plan=None,
            workload=config,
            config=None,
            repeats=[found],
            settings=settings_of(engine, facts),
        )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(in_turn, "run_engine_rounds", fake)
    return fake


SMALL = ("--workload", "100/60", "--num-conversations", "8", "--rounds", "3")
VARIANTS = ("--variants", "small=", "large=--page-size 32")


def test_variants_take_turns_and_stand_over_the_first(
    runs: FakeRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "run.json"
    assert in_turn.main([*SMALL, *VARIANTS, "--repeats", "2", "--json", str(path), "--kv-fraction", "0.5"]) == 0
    assert [(engine.page_size, repeat) for engine, repeat in runs.calls] == [(16, 0), (32, 0), (32, 1), (16, 1)]
    # Half of 8 conversations of 3 rounds of 160 tokens.
    assert [engine.num_pages for engine, _ in runs.calls[:2]] == [1920 // 16, 1920 // 32]
    document = json.loads(path.read_text())
    assert document["benchmark"] == "rounds_in_turn" and document["kv_fraction"] == 0.5
    assert [(run["variant"], run["repeat"]) for run in document["runs"]] == [
        ("small", 0),
        ("large", 0),
        ("large", 1),
        ("small", 1),
    ]
    assert document["variants"][1]["options"] == "--page-size 32"
    assert document["variants"][1]["engine"]["page_size"] == 32
    small, large = document["results"]
    assert (small["num_computed"], small["computed_ratio"], small["ttft_p50_ratio"]) == (300, 1.0, 1.0)
    assert (large["num_computed"], large["computed_ratio"]) == (150, 0.5)
    assert large["asked_over_computed"] == 4.0 and large["hit_rate"] == 0.75
    # Ratios are of the same repeat: 0.25 / 1 and 0.25 / 2.
    assert large["ttft_p50_ratio"] == pytest.approx((0.25 + 0.125) / 2)
    assert (small["num_same_completions"], large["num_same_completions"], large["num_conversations"]) == (2, 1, 2)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("0: small (120 pages)") and shown[-1].split()[:4] == ["large", "4.00", "75.0%", "0.500"]


def test_pages_hold_at_least_the_longest_conversation(runs: FakeRuns) -> None:
    assert in_turn.main([*SMALL, "--variants", "a=", "b=--num-pages 77", "--kv-fraction", "0.01"]) == 0
    assert [engine.num_pages for engine, _ in runs.calls] == [3 * 160 // 16 + 1, 77]


def test_the_common_cache_is_of_the_conversations_under_way(runs: FakeRuns) -> None:
    assert in_turn.main([*SMALL, "--variants", "a=", "--kv-fraction", "1", "--max-concurrency", "2"]) == 0
    assert runs.calls[0][0].num_pages == 2 * 3 * 160 // 16


def test_common_options_are_those_of_each_variant_unless_it_has_its_own(runs: FakeRuns) -> None:
    assert in_turn.main([*SMALL, "--page-size", "8", "--max-num-seqs", "5", *VARIANTS]) == 0
    assert [(engine.page_size, engine.max_num_seqs) for engine, _ in runs.calls] == [(8, 5), (32, 5)]


def test_a_variant_that_does_not_start_is_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeRuns(broken="16")
    monkeypatch.setattr(in_turn, "run_engine_rounds", fake)
    path = tmp_path / "run.json"
    assert in_turn.main([*SMALL, *VARIANTS, "--json", str(path)]) == 1
    assert capsys.readouterr().err == "small: it does not start\n"
    (large,) = json.loads(path.read_text())["results"]
    assert (large["name"], large["computed_ratio"], large["num_same_completions"]) == ("large", None, None)


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Interrupted(FakeRuns):
        def __call__(
            self, engine: EngineConfig, config: BenchConfig, talk: ConversationConfig, repeats: Sequence[int]
        ) -> BenchRecord:
            if self.calls:
                raise KeyboardInterrupt
            return super().__call__(engine, config, talk, repeats)

    monkeypatch.setattr(in_turn, "run_engine_rounds", Interrupted())
    path = tmp_path / "run.json"
    assert in_turn.main([*SMALL, *VARIANTS, "--json", str(path)]) == 130
    assert len(json.loads(path.read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants", "device"], "'device' must be NAME=OPTIONS"),
        (["--variants", "=--num-pages 4"], "must be NAME=OPTIONS"),
        (["--variants", "a=", "a=--num-pages 9"], "each needs a name of its own"),
        (["--variants", "a=--num-pages 0"], "num_pages must be positive"),
        (["--variants", "host=--kv-hust-gib 2"], "--variants host: error: unknown option '--kv-hust-gib'"),
        (["--kv-fraction", "0"], "--kv-fraction must be positive, got 0"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--workload", "9000/1"], "longer than the model's 2,048 tokens"),
    ],
)
def test_bad_options_are_found_before_anything_runs(
    flags: list[str], message: str, runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        in_turn.main(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err and not runs.calls


# --- the picture and the page ----------------------------------------------------------------------------------------


@pytest.fixture
def record(runs: FakeRuns, tmp_path: Path) -> Path:
    path = tmp_path / "rounds_tiny.json"
    in_turn.main([*SMALL, *VARIANTS, "--repeats", "2", "--json", str(path)])
    return path


def lone(folder: Path, name: str, hit_rate: float, *, size: int = 0) -> Path:
    """The record of one engine."""
    run = in_turn.plain(metrics(hit_rate))
    for each in run["by_round"]:
        each["prompt"]["num_asked"] += size
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"benchmark": "rounds", "repeats": [run]}))
    return path


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import rounds_picture

    return rounds_picture


def test_the_picture_has_a_line_and_bars_for_each_variant(picture: ModuleType, record: Path, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        picture.main([str(record), "-o", str(tmp_path / name)])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)
    assert text.count('<path class="s0 line') == text.count('<path class="s1 line') == 2
    assert re.findall(r"<title>(\w+, round \d: .*?)</title>", text) == [
        "small, round 1: 100 of 200 computed",
        "large, round 1: 50 of 200 computed",
        "small, round 2: 200 of 400 computed",
        "large, round 2: 100 of 400 computed",
    ]


def test_higher_is_slower_and_bars_are_to_scale(picture: ModuleType, tmp_path: Path) -> None:
    path = lone(tmp_path, "device", 0.5)
    text = picture.svg(picture.read_series(str(path)))
    first, second = map(float, re.findall(r'<circle class="s0" cx="[\d.]+" cy="([\d.]+)"', text)[:2])
    assert first > second, "the second round took twice as long, and y grows downwards"
    heights = [float(height) for height in re.findall(r'class="s0" x="[^>]* height="([\d.]+)" stroke', text)]
    assert heights == [57.5, 115.0]  # a quarter and a half of 230: 100 and 200 of 400


def test_records_of_single_engines_are_compared_by_name(picture: ModuleType, tmp_path: Path) -> None:
    device, host = lone(tmp_path, "device", 0.1), lone(tmp_path, "other", 0.9)
    series = [*picture.read_series(str(device)), *picture.read_series(f"host={host}")]
    assert [each.name for each in series] == ["device", "host"]
    assert ">host</text>" in picture.svg(series)


def test_what_cannot_be_compared_is_refused(
    picture: ModuleType, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device, longer = lone(tmp_path, "device", 0.1), lone(tmp_path, "longer", 0.1, size=8)
    (tmp_path / "other.json").write_text('{"benchmark": "serve"}')
    (tmp_path / "no.json").write_text("{")
    for records, message in (
        ([device, longer], "longer asked other prompts than device"),
        ([tmp_path / "other.json"], "other.json is no record of nanoflow bench rounds"),
        ([f"x={record}"], "names its variants itself: leave x= out"),
        ([tmp_path / "nowhere.json"], "nowhere.json"),
        ([tmp_path / "no.json"], "Expecting property name"),
    ):
        with pytest.raises(SystemExit):
            picture.main([*map(str, records), "-o", str(tmp_path / "x.svg")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.3), (1.0, 1.0), (12.0, 4000.0), (0.05, 90_000.0)])
def test_ticks_enclose_all_values(picture: ModuleType, low: float, high: float) -> None:
    ticks: list[float] = picture._ticks(low, high)
    assert ticks == sorted(set(ticks)) and ticks[0] <= low <= high <= ticks[-1] and 2 <= len(ticks) <= 10


def test_the_page_has_a_table_a_record_and_its_picture(
    monkeypatch: pytest.MonkeyPatch, record: Path, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from rounds_tables import rounds_results

    text: str = rounds_results(record.parent, tmp_path)
    assert "**default**, 8 conversations of 3 rounds, 100/60; the device has 25% of their KV pages." in text
    assert "| small |  | 60 | 1 of 2.00 | 50.0% | 1.000 | 2,250.0 /" in text
    assert "| large | `--page-size 32` | 30 | 1 of 4.00 | 75.0% | 0.500 | 375.0 /" in text
    assert "| 1 of 2 | 0 |" in text and "![" not in text
    (tmp_path / "rounds_tiny.svg").write_text("<svg/>")
    assert "(pictures/rounds_tiny.svg)" in rounds_results(record.parent, tmp_path)
    assert all(len(each) <= 120 for each in text.splitlines() if not each.startswith("|"))


def test_without_records_the_page_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from rounds_tables import rounds_results

    lone(tmp_path, "rounds_single", 0.5)
    assert "`python -m benchmarks.engine.rounds" in rounds_results(tmp_path, tmp_path)


def test_two_variants_need_two_names() -> None:
    with pytest.raises(ConfigError):
        in_turn.read_variants(["a=", "a="], {})
