"""What the order of lines makes of a whole run of `nanoflow batch`: as they come, and for throughput, in turn.

The file has two parts, each of which may be empty: `--groups` of `--lines` requests that share a beginning, and the
requests of a mix of lengths. All lines are in random order (or kind after kind, with `--in-turn`). From the root of the
repository:

    python -m benchmarks.engine.batch_order --groups 40 --lines 10 --options='--kv-cache-gib 0.015625'
    python -m benchmarks.engine.batch_order --model preset:llama-3-8b --mix 8000/100x200,200/1000x2400 --in-turn \\
        --options=--skip-tokenizer-init

Lengths of the mix are tokens, as its prompts are token ids. Told are seconds of answering without the start, tokens/s
of prompts and completions, and the part of the prompts' tokens that the prefix cache had.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.document import write_document
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser
from nanoflow.config import DEFAULT_MODEL
from nanoflow.workload import kinds_of

ORDERS = ("arrival", "throughput")
_WALL = re.compile(r" in ([\d,.]+) s, [\d,]+ tokens/s")
_NUM_WORDS = 2000
# Token ids that every model has, and that end nothing.
_TOKEN_IDS = range(10, 250)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the command.

    Attributes:
        order: `--order`.
        wall_s: Seconds of answering.
        prompt_tokens, completion_tokens: Of all answers.
        cached_tokens: How many of the prompts' tokens the prefix cache had.
    """

    order: str
    wall_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of prompts and completions."""
        return (self.prompt_tokens + self.completion_tokens) / self.wall_s


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a line each, and write the record after each."""
    args = parse_args(argv)
    require_clean(args.json, allows_dirty=args.allow_dirty)
    runs = list[Run]()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.jsonl"
        source.write_text("".join(_line(*each) for each in enumerate(_bodies(args))), encoding="utf-8")
        for repeat in range(args.repeats):
            for order in ORDERS:
                runs.append(measured(source, Path(name) / f"{order}-{repeat}.jsonl", order, args))
                print(_text(runs[-1]), flush=True)
                if args.json is not None:
                    _write(args, runs)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.engine.batch_order", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model (default: the embedded one)")
    parser.add_argument("--groups", type=int, default=0, help="groups of requests that begin alike (default: 0)")
    parser.add_argument("--lines", type=int, default=10, help="requests of each group (default: 10)")
    parser.add_argument("--words", type=int, default=150, help="words of a group's beginning (default: 150)")
    parser.add_argument("--output-len", type=int, default=8, help="tokens of a group's completions (default: 8)")
    parser.add_argument("--mix", metavar="IN/OUTxREQUESTS,IN/OUTxREQUESTS", help="further requests (default: none)")
    parser.add_argument("--in-turn", action="store_true", help="kind after kind as they are named, instead of shuffled")
    parser.add_argument(
        "--options", default="", metavar="TEXT", help="of the engine, as --options='--kv-cache-gib 1' (default: none)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="runs of each order (default: 2)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    parser.add_argument("--allow-dirty", action="store_true", help="also write a record of sources that no commit has")
    args = parser.parse_args(argv)
    if not args.groups and args.mix is None:
        parser.error("there are no requests: give --groups, --mix or both")
    return args


def measured(source: Path, output: Path, order: str, args: argparse.Namespace) -> Run:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "nanoflow", "batch", str(source), "-o", str(output), "--order", order]
    command += ["--model", args.model, *shlex.split(args.options)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    found = _WALL.search(done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    usages = [json.loads(line)["response"]["body"]["usage"] for line in output.read_text(encoding="utf-8").splitlines()]
    return Run(
        order=order,
        wall_s=float(found[1].replace(",", "")),
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        completion_tokens=sum(usage["completion_tokens"] for usage in usages),
        cached_tokens=sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for usage in usages),
    )


def _bodies(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests, in the order of the file."""
    draw, found = random.Random(0), list[dict[str, Any]]()
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(_NUM_WORDS)]
    for _ in range(args.groups):
        beginning = " ".join(draw.choices(words, k=args.words))
        for _ in range(args.lines):
            prompt = f"{beginning} {' '.join(draw.choices(words, k=10))}"
            found.append({"prompt": prompt, "max_tokens": args.output_len, "ignore_eos": True})
    for length in [] if args.mix is None else kinds_of(args.mix):
        token_ids = draw.choices(_TOKEN_IDS, k=length.num_prompt_tokens)
        found.append({"prompt": token_ids, "max_tokens": length.num_output_tokens, "ignore_eos": True})
    if not args.in_turn:
        draw.shuffle(found)
    return found


def _text(run: Run) -> str:
    cached = run.cached_tokens / run.prompt_tokens
    return f"{run.order:<11}{run.wall_s:8.1f} s {run.tokens_per_s:10,.0f} tokens/s, {cached:.1%} of prompts cached"


def _write(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    names = ("model", "groups", "lines", "words", "output_len", "mix", "in_turn", "options", "repeats")
    options = {name: getattr(args, name) for name in names}
    write_document(args.json, "batch_order_run", options=options, runs=list(map(dataclasses.asdict, runs)))


def _line(number: int, body: dict[str, Any]) -> str:
    line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(line) + "\n"


if __name__ == "__main__":
    sys.exit(main())
