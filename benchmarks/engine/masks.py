"""What masks of structured output take of the thread that queues work on the device: milliseconds an iteration.

An iteration of `--rows` requests that are held to a shape is played without a model: the masks of all rows, a token for
each that its mask allows, and the note of these tokens. Counted is the time that this thread computes; other threads
compute masks meanwhile, whose wall time is told too. While a GPU runs the layers, both are hidden as far as they are
shorter. From the root of the repository:

    python -m benchmarks.engine.masks --rows 128 256 --shapes list string --json masks.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.document import write_document
from benchmarks.common.vocabulary import write_vocabulary
from benchmarks.engine.structured import SHAPES
from nanoflow.batch import Joined
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser
from nanoflow.executor.constraints import Constraints
from nanoflow.grammars.compiled import Grammars, vocabulary
from nanoflow.request import SamplingParams

_NUM_WARM = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each number of rows and shape, and write the record."""
    args = parse_args(argv)
    require_clean(args.json, allows_dirty=args.allow_dirty)
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), args.vocab_size)
        text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    if args.cores is not None:
        # By which `Constraints` chooses its threads.
        os.cpu_count = lambda: args.cores
    grammars = Grammars(lambda: vocabulary(text, vocab_size=args.vocab_size, eos_token_ids=[0]))
    points = []
    for num_rows in args.rows:
        for name in args.shapes:
            points.append(measured(grammars, num_rows, name, args))
            print(f"{num_rows:>5} rows, {name:<8}", {key: points[-1][key] for key in ("thread_ms", "wall_ms")})
    grammars.close()
    if args.json is not None:
        options = {name: getattr(args, name) for name in ("vocab_size", "iterations", "cores")}
        write_document(args.json, "masks", options=options, points=points)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.engine.masks", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[128], help="requests at once (default: 128)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["list", "string"], help="default: list, string")
    parser.add_argument("--vocab-size", type=int, default=128_256, help="tokens of the vocabulary (default: 128256)")
    parser.add_argument("--cores", type=int, help="as on a machine with so many cores (default: those that there are)")
    parser.add_argument("--iterations", type=int, default=15, help="how many count (default: 15)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    parser.add_argument("--allow-dirty", action="store_true", help="also write a record of sources that no commit has")
    return parser.parse_args(argv)


def measured(grammars: Grammars, num_rows: int, name: str, args: argparse.Namespace) -> Mapping[str, Any]:
    """Medians over iterations, in milliseconds."""
    device, rows = torch.device("cpu"), np.arange(num_rows, dtype=np.int32)
    constraints = Constraints(num_rows=num_rows, vocab_size=args.vocab_size, device=device, grammars=grammars)
    params = SamplingParams(structured_outputs=SHAPES[name])  # type: ignore[arg-type]
    prompt = np.zeros(1, np.int32)
    errors = constraints.join(
        [
            Joined(row=row, params=params, seed=0, token_ids=prompt, num_prompt_tokens=1, stop_token_ids=())
            for row in range(num_rows)
        ]
    )
    if errors:
        raise RuntimeError(f"a grammar has failed: {errors}")
    thread_ms, wall_ms = [], []
    for _ in range(_NUM_WARM + args.iterations):
        began = time.thread_time(), time.perf_counter()
        words = constraints.masks(rows).words.numpy().view(np.uint8)
        between = time.thread_time(), time.perf_counter()
        token_ids = [np.flatnonzero(np.unpackbits(each, bitorder="little"))[-1] for each in words]
        drawn = torch.from_numpy(np.array(token_ids))
        again = time.thread_time(), time.perf_counter()
        constraints.note(drawn)
        thread_ms.append(1e3 * (between[0] - began[0] + time.thread_time() - again[0]))
        wall_ms.append(1e3 * (between[1] - began[1] + time.perf_counter() - again[1]))
    found = {"thread_ms": thread_ms, "wall_ms": wall_ms}
    medians = {key: round(statistics.median(values[_NUM_WARM:]), 3) for key, values in found.items()}
    return {"rows": num_rows, "shape": name, **medians}


if __name__ == "__main__":
    sys.exit(main())
