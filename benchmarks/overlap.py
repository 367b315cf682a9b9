"""One iteration under the plans that overlap: measured on this GPU beside what the profile predicts.

For each batch: sequential, nano-batches on one lane, and every way to divide the device that the profile has pairs of,
each sustained, with energy; the gain over sequential is measured and predicted. From the root of the repository:

    python -m benchmarks.overlap --profile benchmarks/results/profile_llama-3-8b_h200.json \\
        --batches 2048:683:1280:1024 1024:1024:768:1 --json overlap.json

A batch is TOKENS:DECODES:KEYS:PROMPT: tokens in all, decodes with so many keys each, the rest prompts of so
many tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from nanoflow.batch import DenseBatch, Joined
from nanoflow.bench.machine import detect_machine, detect_software
from nanoflow.config import DType, EngineConfig
from nanoflow.cost.table import Profile
from nanoflow.device.energy import gpu_energy_j
from nanoflow.engine.build import build_engine
from nanoflow.executor.worker import Worker
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.book import PlanEntry, StoredBook
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.request import SamplingParams
from nanoflow.search.iteration import IterationModel
from nanoflow.search.search import Search

PAGE_SIZE = 16
SETTLE_S, MEASURE_S = 0.4, 1.2
# Batches queued at once: enough that the device never waits.
IN_FLIGHT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A batch: tokens, decodes, keys of each, tokens of each prompt among the others."""

    num_tokens: int
    num_decodes: int
    context: int
    prompt: int

    @staticmethod
    def parse(text: str) -> Spec:
        """TOKENS:DECODES:KEYS:PROMPT."""
        num_tokens, num_decodes, context, prompt = (int(part) for part in text.split(":"))
        return Spec(num_tokens=num_tokens, num_decodes=num_decodes, context=context, prompt=prompt)

    def requests(self) -> list[tuple[int, int]]:
        """(tokens computed before, tokens now), decodes first; of a prompt that does not fit, its first tokens."""
        left = self.num_tokens - self.num_decodes
        chunks = [self.prompt] * (left // self.prompt) + ([left % self.prompt] if left % self.prompt else [])
        return [(self.context - 1, 1)] * self.num_decodes + [(0, chunk) for chunk in chunks]

    def batch(self) -> DenseBatch:
        """It, with pages at random places."""
        before, now = np.array(self.requests()).T
        pages = -(-(before + now) // PAGE_SIZE)
        tables = np.zeros((len(now), int(pages.max())), np.int32)
        tables[np.arange(tables.shape[1]) < pages[:, None]] = np.random.default_rng(0).permutation(int(pages.sum()))
        request = np.repeat(np.arange(len(now)), now)
        start = np.concatenate(([0], np.cumsum(now)))
        positions = before[request] + np.arange(len(request)) - start[request]
        return DenseBatch(
            iteration=0,
            rows=np.arange(len(now), dtype=np.int32),
            epochs=np.zeros(len(now), np.int64),
            num_decodes=self.num_decodes,
            query_start=start.astype(np.int32),
            context_len=(before + now).astype(np.int32),
            token_ids=np.random.default_rng(1).integers(0, 1000, len(request), dtype=np.int32),
            is_fed_back=np.zeros(len(request), np.bool_),
            positions=positions.astype(np.int32),
            slots=(tables[request, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE).astype(np.int64),
            page_tables=tables,
            sampled=np.arange(len(now), dtype=np.int32),
            joined=tuple(_joined(row) for row in range(len(now))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan on one batch; gains are over the sequential plan."""

    batch: str
    plan: str
    digest: str
    time_s: float
    energy_j: float | None
    predicted_s: float
    gain: float
    predicted_gain: float


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row a plan, write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--batches", nargs="+", required=True)
    parser.add_argument("--max-num-seqs", type=int, default=1280)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    profile = Profile.load(args.profile)
    specs = {text: Spec.parse(text) for text in args.batches}
    model = IterationModel(profile)
    plans = {text: list(candidates(profile, model, spec.batch().shape)) for text, spec in specs.items()}
    rows = []
    for row in measure(profile, model, specs, plans, args.max_num_seqs):
        rows.append(row)
        energy = "" if row.energy_j is None else f"{row.energy_j:8.2f} J"
        print(
            f"{row.batch:<20} {row.plan:<44} {row.time_s * 1e3:8.2f} ms (predicted {row.predicted_s * 1e3:6.2f})"
            f" {energy}"
            f"  gain {row.gain:.3f} (predicted {row.predicted_gain:.3f})",
            flush=True,
        )
    if args.json is not None:
        document = {
            "benchmark": "overlap",
            "machine": dataclasses.asdict(detect_machine()),
            "software": dataclasses.asdict(detect_software()),
            "model": profile.model,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def candidates(profile: Profile, model: IterationModel, shape: BatchShape) -> Iterator[PipelinePlan]:
    """Sequential, nano-batches, and what a quick search tries."""
    num_tokens = shape.num_tokens
    yield sequential_plan(model.graph, num_tokens)
    middle = round(num_tokens / 256) * 128
    yield nanobatch_plan(model.graph, num_tokens, [middle])
    attempts = Search(profile, shape, is_quick=True).run().attempts
    yield from (attempt.plan for attempt in sorted(attempts, key=lambda attempt: attempt.makespan_s)[:4])


def measure(
    profile: Profile,
    model: IterationModel,
    specs: dict[str, Spec],
    plans: dict[str, list[PipelinePlan]],
    max_num_seqs: int,
) -> Iterator[Row]:
    """Every plan of every batch on one engine."""
    most = max(spec.num_tokens for spec in specs.values())
    distinct = {plan.digest: plan for some in plans.values() for plan in some}
    # No batch of the engine's own fits, so its warm-up is the usual one.
    entries = tuple(
        PlanEntry(plan=plan, min_tokens=1, max_tokens=plan.num_tokens, min_decode_context=1e12)
        for plan in distinct.values()
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plans.json"
        path.write_bytes(StoredBook(entries=entries).to_json())
        config = EngineConfig(
            model=profile.model,
            load_format="random",
            dtype=cast(DType, profile.dtype),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=most,
            max_model_len=max(spec.context + spec.prompt for spec in specs.values()),
            plan=str(path),
        )
        engine = build_engine(config)
    for text, spec in specs.items():
        batch, sequential = spec.batch(), (math.nan, math.nan)
        for plan in plans[text]:
            time_s, energy_j = sustained(engine.worker, batch, plan)
            predicted_s = model.predict(batch.shape, plan).iteration_s
            if plan is plans[text][0]:
                sequential = (time_s, predicted_s)
            yield Row(
                batch=text,
                plan=plan.name,
                digest=plan.digest,
                time_s=time_s,
                energy_j=energy_j,
                predicted_s=predicted_s,
                gain=sequential[0] / time_s,
                predicted_gain=sequential[1] / predicted_s,
            )
    engine.close()


def sustained(worker: Worker, batch: DenseBatch, plan: PipelinePlan) -> tuple[float, float | None]:
    """Seconds and joules of one iteration among many back to back."""
    # The first compiles, the second captures.
    for _ in range(3):
        worker.launch(batch, plan).result()
    batch = dataclasses.replace(batch, joined=())
    once_s = _run(worker, batch, plan, 3)
    _run(worker, batch, plan, math.ceil(SETTLE_S / once_s))
    count = math.ceil(MEASURE_S / once_s)
    start_j = gpu_energy_j()
    time_s = _run(worker, batch, plan, count)
    stop_j = gpu_energy_j()
    return time_s, None if start_j is None or stop_j is None else (stop_j - start_j) / count


def _run(worker: Worker, batch: DenseBatch, plan: PipelinePlan, count: int) -> float:
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    queued = []
    for _ in range(count):
        queued.append(worker.launch(batch, plan))
        if len(queued) > IN_FLIGHT:
            queued.pop(0).result()
    for each in queued:
        each.result()
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / count


def _joined(row: int) -> Joined:
    return Joined(
        row=row,
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        seed=0,
        token_ids=np.zeros(1, np.int32),
        num_prompt_tokens=1,
        stop_token_ids=(),
    )


if __name__ == "__main__":
    sys.exit(main())
