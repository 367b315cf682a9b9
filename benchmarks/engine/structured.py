"""What structured output costs all rows: the time of an iteration with none, half and all rows held to a shape.

One engine is loaded once. A run has `--rows` requests of the same length, which decode together. In runs with a shape
half of the rows have it, then all. A tokenizer of the model's size is made, so that masks are as wide as in use. From
the root of the repository:

    python -m benchmarks.engine.structured --model preset:llama-3-8b --rows 64 --json structured_llama-3-8b.json

Times are medians of `--repeats` runs, in milliseconds an iteration, of decodes alone: the time of a run with
`--output-len` tokens less that of one with half of them, so that prompts and compilation do not count. Beside them are
tokens/s of a request between its first token and its last, the median of those without the shape ("free") and of those
with it ("held").

With `--speculative` two engines run in turn, with drafts and without, and what is told is tokens/s of whole runs in
which all rows have the shape:

    python -m benchmarks.engine.structured --model default --rows 8 --output-len 128 --speculative ngram:8
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.document import write_document
from benchmarks.common.vocabulary import write_vocabulary
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser
from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.engine.build import resolve_model
from nanoflow.engine.llm import LLM
from nanoflow.outputs import RequestOutput
from nanoflow.request import SamplingParams

# Each goes on for longer than any run. A string of JSON, objects, objects that are mostly forced, and repetitions that
# are counted.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "string": {"json": {"type": "string", "minLength": 100_000}},
    "list": {
        "json": {
            "type": "array",
            "minItems": 100_000,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
                "required": ["name", "size", "kind"],
                "additionalProperties": False,
            },
        }
    },
    "keys": {
        "json": {
            "type": "array",
            "minItems": 100_000,
            "items": {
                "type": "object",
                "properties": {f"{name}_of_the_order": {"type": "boolean"} for name in ("state", "price", "place")},
                "required": [f"{name}_of_the_order" for name in ("state", "price", "place")],
                "additionalProperties": False,
            },
        }
    },
    "counted": {"regex": "[a-z ]{5000,}"},
}
_PROMPT_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the record."""
    args = parse_args(argv)
    require_clean(args.json, allows_dirty=args.allow_dirty)
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), resolve_model(EngineConfig(model=args.model))[0].vocab_size)
        limits: dict[str, Any] = {"max_num_seqs": args.rows, "max_model_len": _PROMPT_TOKENS + args.output_len}
        options = {"model": args.model, **({} if args.model == DEFAULT_MODEL else {"tokenizer": folder}), **limits}
        with LLM(**options) as llm:
            device = llm.facts.device
            if args.speculative is None:
                found = measured(llm, args)
            else:
                with LLM(**options, speculative=args.speculative) as drafting:
                    found = compared({"without": llm, "with": drafting}, args)
    print(json.dumps(found, indent=1))
    if args.json is not None:
        names = ("model", "rows", "output_len", "repeats", "shapes", "speculative")
        given = {name: getattr(args, name) for name in names}
        kind = "iteration_ms" if args.speculative is None else "tokens_per_s"
        write_document(args.json, "structured", options=given, device=device, **{kind: found})
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.engine.structured", description=__doc__)
    parser.add_argument("--model", default="preset:llama-3-8b", help="model (default: preset:llama-3-8b)")
    parser.add_argument("--rows", type=int, default=64, help="requests at once (default: 64)")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of a completion (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which (default: all)")
    parser.add_argument("--speculative", default=None, help="as nanoflow serve has it, e.g. ngram:8 (default: none)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    parser.add_argument("--allow-dirty", action="store_true", help="also write a record of sources that no commit has")
    return parser.parse_args(argv)


def measured(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds an iteration, by shape and number of rows with it."""
    runs: dict[str, Any] = {"none": _told("none", _iteration_ms(llm, args, None, 0))}
    for name in args.shapes:
        runs[name] = {
            str(count): _told(f"{name}, {count} rows", _iteration_ms(llm, args, SHAPES[name], count))
            for count in (1, args.rows // 2, args.rows)
        }
    return runs


def _told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The same, said at once: a run that is broken off leaves what it knew."""
    print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def compared(engines: Mapping[str, LLM], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of whole runs by shape, number of rows and engine; the engines run in turn."""
    runs: dict[str, Any] = {}
    for name, shape in ((name, SHAPES[name]) for name in args.shapes):
        for count in sorted({1, max(args.rows // 2, 1), args.rows}):
            rates: dict[str, list[float]] = {each: [] for each in engines}
            for repeat in range(1 + args.repeats):
                for each, llm in engines.items():
                    rate = count * args.output_len / _run(llm, count, args.output_len, shape, count).took_s
                    # In the first run what is needed is compiled.
                    rates[each] += [rate] if repeat else []
            runs.setdefault(name, {})[str(count)] = {each: statistics.median(values) for each, values in rates.items()}
    return runs


def _iteration_ms(llm: LLM, args: argparse.Namespace, shape: Mapping[str, Any] | None, count: int) -> dict[str, Any]:
    times, rates = [], []
    for _ in range(args.repeats):
        whole, half = (_run(llm, args.rows, length, shape, count) for length in (args.output_len, args.output_len // 2))
        times.append(1e3 * (whole.took_s - half.took_s) / (args.output_len - args.output_len // 2))
        rates.append(whole.rates)
    each = {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "tokens_per_s": each}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Seconds of a run, and tokens/s of the median request of each class."""

    took_s: float
    rates: dict[str, float]


def _run(llm: LLM, rows: int, length: int, shape: Mapping[str, Any] | None, count: int) -> _Run:
    """Run requests of which `count` have the shape, spread evenly among all: the first ones start first."""
    free = SamplingParams(max_tokens=length, ignore_eos=True)
    # An end of sequence may be a word of the made vocabulary as well.
    never = dict.fromkeys(llm.facts.eos_token_ids, -100.0)
    held = SamplingParams(max_tokens=length, structured_outputs=shape, logit_bias=never)  # type: ignore[arg-type]
    params = [held if (row + 1) * count // rows > row * count // rows else free for row in range(rows)]
    prompts = [[(row * 7 + place) % 250 for place in range(_PROMPT_TOKENS)] for row in range(rows)]
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    took_s = time.perf_counter() - start_s
    for output in outputs:
        if len(output.outputs[0].token_ids) != length:
            raise RuntimeError(f"a run has ended early: {output.error or output.outputs[0].text[-80:]!r}")
    kinds = {"held": held, "free": free}
    classes = {
        name: [output for output, one in zip(outputs, params, strict=True) if one is kind]
        for name, kind in kinds.items()
    }
    rates = {name: statistics.median(map(_tokens_per_s, some)) for name, some in classes.items() if some}
    return _Run(took_s=took_s, rates=rates)


def _tokens_per_s(output: RequestOutput) -> float:
    """Of a request, from its first token to its last."""
    times = output.metrics
    assert times is not None and times.first_token_s is not None and times.last_token_s is not None
    return (len(output.outputs[0].token_ids) - 1) / (times.last_token_s - times.first_token_s)


if __name__ == "__main__":
    sys.exit(main())
