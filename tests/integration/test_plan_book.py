"""A plan book from a file, end to end with the default model: the same greedy tokens, and proof of what was chosen."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.bench.measurement_window import ProgressRecorder
from nanoflow.config import EngineConfig
from nanoflow.engine.book_facts import BookFacts
from nanoflow.engine.build import resolve_model
from nanoflow.engine.llm import LLM
from nanoflow.engine.messages import EngineStats
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import BookLimits, MadeFor, PlanEntry, StoredBook
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.request import SamplingParams
from tests.integration.test_cli_end_to_end import NANOFLOW, run_cli

BUDGET = 64
PROMPTS = ("import ", "def main() -> None:\n    print(", "class Engine:\n")


@dataclass(frozen=True, kw_only=True)
class Book:
    """A book on disk: `few` for 2 to 6 decodes alone; `many`, which has room for more, for 7 to 64 tokens."""

    path: Path
    stored: StoredBook

    @property
    def digests(self) -> dict[str, str]:
        return {plan.name: plan.digest for plan in self.stored.plans}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    config, _ = resolve_model(EngineConfig())
    graph = build_graph(config, None)
    few, many = nanobatch_plan(graph, 6, [1, 3], "few"), nanobatch_plan(graph, 80, [5, 32], "many")
    stored = StoredBook(
        entries=(
            PlanEntry(plan=few, min_tokens=2, max_tokens=6, min_decode_share=1.0),
            PlanEntry(plan=many, min_tokens=7, max_tokens=BUDGET),
        ),
        made_for=MadeFor(model="default", gpu="cpu"),
    )
    path = tmp_path_factory.mktemp("book") / "book.json"
    path.write_bytes(stored.to_json())
    return Book(path=path, stored=stored)


class ChoiceRecorder(ProgressRecorder):
    """Notes which plan ran how large a batch: (tokens, tokens that are no decodes, digest)."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[tuple[int, int, str | None]] = []

    def observe_step(self, stats: EngineStats) -> None:
        super().observe_step(stats)
        self.choices.append((stats.iteration_tokens, stats.prefill_tokens, stats.plan_digest))


def run_in_process(plan: Path | None) -> tuple[list[list[int]], ChoiceRecorder, BookFacts]:
    recorder = ChoiceRecorder()
    with LLM(plan=None if plan is None else str(plan), max_batch_tokens=BUDGET) as llm:
        llm.observe(recorder)
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        assert llm.facts.book is not None
        return [output.outputs[0].token_ids for output in outputs], recorder, llm.facts.book


@pytest.fixture(scope="module")
def sequential() -> tuple[list[list[int]], str]:
    """Tokens without a book, and the digest of the one plan that ran."""
    tokens, recorder, _ = run_in_process(None)
    (digest,) = recorder.plan_iterations
    return tokens, digest


def test_the_engine_runs_within_the_limits_of_the_book(
    book: Book, sequential: tuple[list[list[int]], str], tmp_path: Path
) -> None:
    path = tmp_path / "book.json"
    own = BookLimits(max_batch_tokens=BUDGET + 8, max_num_seqs=3)
    path.write_bytes(dataclasses.replace(book.stored, limits=own).to_json())
    with LLM(plan=str(path), num_pages=200) as llm:
        assert (llm.facts.max_batch_tokens, llm.facts.max_num_seqs) == (BUDGET + 8, 3)
        assert llm.facts.limits is not None and llm.facts.limits.max_num_seqs_origin == "book"
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == sequential[0]
    with LLM(plan=str(path), num_pages=200, max_num_seqs=2) as llm:
        assert (llm.facts.max_batch_tokens, llm.facts.max_num_seqs) == (BUDGET + 8, 2)


def test_the_book_decides_and_the_tokens_stay_the_same(book: Book, sequential: tuple[list[list[int]], str]) -> None:
    expected, fallback = sequential
    tokens, recorder, facts = run_in_process(book.path)
    assert tokens == expected and all(len(completion) == 12 for completion in tokens)
    assert {plan.name: plan.digest for plan in facts.plans} == {"sequential": fallback, **book.digests}
    assert facts.digest == book.stored.digest
    for num_tokens, num_prefill_tokens, digest in recorder.choices:
        is_few = 2 <= num_tokens <= 6 and num_prefill_tokens == 0
        is_many = num_tokens >= 7
        assert digest == (book.digests["many"] if is_many else book.digests["few"] if is_few else fallback)
    assert recorder.plan_iterations[book.digests["few"]] >= 6
    assert recorder.plan_iterations[book.digests["many"]] >= 1


def test_generate(book: Book, sequential: tuple[list[list[int]], str]) -> None:
    done = run_cli(
        *("generate", *PROMPTS, "--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--json"),
        *("--plan", str(book.path), "--max-batch-tokens", str(BUDGET)),
    )
    assert done.stderr == ""
    assert [json.loads(line)["token_ids"] for line in done.stdout.splitlines()] == sequential[0]


def test_a_book_for_a_larger_budget_is_one_line(book: Book) -> None:
    error = run_cli("generate", "x", "--plan", str(book.path), "--max-batch-tokens", "32", status=1).stderr
    assert error.startswith(f"nanoflow: error: {book.path}: plan 'many' is for batches of up to 64 tokens")
    assert "--max-batch-tokens" in error and error.count("\n") == 1


def test_bench_throughput_records_what_was_chosen(book: Book, tmp_path: Path) -> None:
    run_cli(
        *("bench", "throughput", "--workload", "16/8", "--num-requests", "6", "--no-bounds"),
        *("--plan", str(book.path), "--max-batch-tokens", str(BUDGET), "--json", str(tmp_path / "run.json")),
    )
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["plan"] == f"book ({book.stored.digest}) of 2 plans"
    assert record["model"]["book"]["digest"] == book.stored.digest
    assert record["model"]["book"]["plans"][1:] == [
        {"name": name, "digest": digest} for name, digest in book.digests.items()
    ]
    (run,) = record["repeats"]
    assert run["plan_iterations"][book.digests["few"]] >= 1 and run["plan_iterations"][book.digests["many"]] >= 1


@pytest.fixture(scope="module")
def server_url(book: Book) -> Iterator[str]:
    argv = (*NANOFLOW, "serve", "--port", "0", "--plan", str(book.path), "--max-batch-tokens", str(BUDGET))
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(line for line in process.stdout if line.startswith("nanoflow serves ")).split()[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130)
    finally:
        process.kill()


def test_bench_serve_and_metrics(book: Book, server_url: str, tmp_path: Path) -> None:
    run_cli(
        *("bench", "serve", "--url", server_url, "--workload", "16/8", "--num-requests", "6"),
        *("--json", str(tmp_path / "run.json")),
    )
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["plan"] == f"book ({book.stored.digest}) of 2 plans"
    assert [plan["name"] for plan in record["model"]["book"]["plans"]] == ["sequential", "few", "many"]
    text = httpx.get(server_url.removesuffix("/v1") + "/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    named = {
        sample.labels["name"]: (sample.labels["digest"], sample.labels["book"], sample.value)
        for sample in samples
        if sample.name == "nanoflow:plan_info"
    }
    assert named.pop("sequential")[1:] == (book.stored.digest, 1)
    assert named == {name: (digest, book.stored.digest, 1) for name, digest in book.digests.items()}
    counted = {sample.labels["plan"]: sample.value for sample in samples if sample.name == "nanoflow:iterations_total"}
    assert counted["few"] >= 1 and counted["many"] >= 1
