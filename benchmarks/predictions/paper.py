"""The search and the simulator against the paper: LLaMA-2-70B on 8 A100 at 512/512, from its tables 2 and 3 alone.

    python -m benchmarks.predictions.paper

Assumptions beyond the times of table 2 (2,048 tokens, 80 layers) and the interference of table 3:

1. A product computes whole waves of 128 x 128 tiles on 108 SMs, so the parts of a product take longer than the whole.
   The time of attention and of collectives is proportional to tokens.
2. Table 2 has 1,365 decodes with a mean context of 1,024; at 512/512 a batch of 2,048 tokens has 1,024 decodes with a
   mean context of 768. The time of decode attention is scaled by keys, that of prefill attention by tokens.
3. There are 8 us between two kernels, for a launch; the paper's engine uses no CUDA graphs.
4. Nano-batches alone: four nano-operations for qkv and decode attention, two for all others, as in figure 6.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoflow.cli.options import CommandParser
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import split
from nanoflow.graph.operation import CollectiveDims, LinearDims, Operation
from nanoflow.graph.shard import shard
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import NanoOperation, PipelinePlan
from nanoflow.plan.sequential import WHOLE_LANE
from nanoflow.profile.estimate import paper_pairs
from nanoflow.profile.table import Point, Profile, Setup
from nanoflow.search.search import Search
from nanoflow.search.shapes import batch_of
from nanoflow.simulate.iteration import IterationModel, Prediction

_NUM_GPUS, _NUM_SMS, _TILE = 8, 108, 128
_NUM_TOKENS, _NUM_LAYERS = 2048, 80
_LAUNCH_S = 8e-6
# Table 2, milliseconds of a whole iteration.
_REAL_MS = {
    "qkv_proj": 16.08,
    "o_proj": 16.01,
    "gate_up_proj": 69.92,
    "down_proj": 34.96,
    "decode_attention": 35.60,
    "prefill_attention": 4.56,
    "o_proj_all_reduce": 47.92 / 2,
    "down_proj_all_reduce": 47.92 / 2,
}
_TABLE_DECODES, _TABLE_CONTEXT, _TABLE_PREFILL = 1365, 1024.0, 683
# Tokens/s/GPU, figure 9.
MEASURED = {"non-overlap": 1106.0, "nano-batches only": 982.0, "overlapped": 1323.0}
_BOUNDARY = 768


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One row.

    Attributes:
        name: Name of the rung.
        measured, predicted: Tokens/s/GPU, from the paper and predicted here.
        at_once: Mean number of nano-operations that run at the same time; 1 without overlap.
    """

    name: str
    measured: float
    predicted: float
    at_once: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it if asked."""
    parser = CommandParser(prog="python -m benchmarks.predictions.paper", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds for the search (default: no limit)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(argv)
    rows = compare(args.time_limit)
    print(f"{'LLaMA-2-70B, 8 x A100, 512/512':<34}{'measured':>10}{'predicted':>11}{'error':>8}   tokens/s/GPU")
    for row in rows:
        print(f"{row.name:<34}{row.measured:>10,.0f}{row.predicted:>11,.0f}{row.error:>+8.1%}")
    if args.json is not None:
        document = {"benchmark": "paper", "rows": [[row.name, row.measured, row.predicted] for row in rows]}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(time_limit_s: float = math.inf) -> tuple[Comparison, ...]:
    """The paper's three rungs, predicted. The search stops at its number of nodes, or earlier at a time limit."""
    graph = shard(build_graph(preset_config("llama-2-70b"), None), _NUM_GPUS)
    profile, shape = paper_profile(graph), batch_of(_NUM_TOKENS, _NUM_TOKENS // 2, 768.0, 512.0)
    model = IterationModel(profile)
    found = Search(profile, shape, time_limit_s=time_limit_s).run()
    plans = {"non-overlap": None, "nano-batches only": nano_batches_only(graph), "overlapped": found.plan}
    return tuple(_compared(name, model.predict(shape, plan)) for name, plan in plans.items())


def _compared(name: str, prediction: Prediction) -> Comparison:
    spans = prediction.simulation.timeline.spans
    from_first_to_last_s = max(span.stop_s for span in spans) - min(span.start_s for span in spans)
    return Comparison(
        name=name,
        measured=MEASURED[name],
        predicted=prediction.tokens_per_s_per_gpu,
        at_once=sum(span.stop_s - span.start_s for span in spans) / from_first_to_last_s,
    )


def paper_profile(graph: OpGraph) -> Profile:
    """Tables 2 and 3 as a profile."""
    return Profile(
        model="preset:llama-2-70b",
        config=dict(PRESETS["llama-2-70b"]),
        setup=Setup(gpu="NVIDIA A100 80 GB SXM", num_gpus=_NUM_GPUS, memory_bytes=80e9, is_measured=False),
        launch_gap_s=_LAUNCH_S,
        points=tuple(point for op in graph.operations() for point in _points(op)),
        pairs=tuple(paper_pairs(graph)),
    )


def nano_batches_only(graph: OpGraph) -> PipelinePlan:
    """The paper's nano-operations on one lane, without overlap."""
    halves = split(_NUM_TOKENS, (_BOUNDARY,))
    quarters = split(_NUM_TOKENS, (_BOUNDARY // 2, _BOUNDARY, (_BOUNDARY + _NUM_TOKENS) // 2))
    in_four = {"attn_norm", "qkv_proj", "rope_append", "decode_attention"}
    nano_operations = tuple(
        NanoOperation(operation=op.name, start=tokens.start, stop=tokens.stop, lane=WHOLE_LANE.name)
        for op in graph.layer
        for tokens in (quarters if op.name in in_four else halves)
    )
    return PipelinePlan(
        name="nano-batches", num_tokens=_NUM_TOKENS, lanes=(WHOLE_LANE,), nano_operations=nano_operations
    )


def _points(op: Operation) -> Iterator[Point]:
    whole_s = _REAL_MS.get(op.name, 0.0) / 1e3 / _NUM_LAYERS
    for num_tokens in range(128, _NUM_TOKENS + 1, 128):
        context = _TABLE_CONTEXT if op.name == "decode_attention" else 256.5 if op.name == "prefill_attention" else 0.0
        yield Point(operation=op.name, num_tokens=num_tokens, context=context, time_s=whole_s * _part(op, num_tokens))


def _part(op: Operation, num_tokens: int) -> float:
    """Part of the total time in table 2."""
    if isinstance(op.dims, LinearDims):
        return _waves(op.dims, num_tokens) / _waves(op.dims, _NUM_TOKENS)
    if isinstance(op.dims, CollectiveDims):
        return num_tokens / _NUM_TOKENS
    return num_tokens / {"decode_attention": _TABLE_DECODES, "prefill_attention": _TABLE_PREFILL}.get(
        op.name, _NUM_TOKENS
    )


def _waves(dims: LinearDims, num_tokens: int) -> int:
    tiles = math.ceil(num_tokens / _TILE) * math.ceil(dims.out_features / _TILE)
    return math.ceil(tiles / _NUM_SMS)


if __name__ == "__main__":
    sys.exit(main())
