"""The gain of speculative decoding: the same prompts with and without it, at one to eight requests.

From the root of the repository, with a model that can read and write code:

    python -m benchmarks.engine.speculative --model DIR --json benchmarks/results/speculative_NAME.json

Texts: *edit* asks for a file of this package again with one word replaced, greedily, so that most of the answer is in
the prompt; *free* asks for a story at temperature 1, which repeats little. Each request has its own file or story, and
its own seed. The two engines take turns: in each round each engine is loaded, warmed up, and runs every text at every
number of requests. All requests are there at once and have a fixed length.

Rates are output tokens a second. *decode* is between first and last token of each request, summed over requests;
*whole* is all tokens / time of the whole run, prompts included. `num_same` is the number of requests with the same
tokens from both engines; with 16-bit types some may differ where two tokens are almost equally likely. Exit status 1 if
`--check` is given and edits are not faster at some number of requests.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import nanoflow
from benchmarks.common.document import write_document
from nanoflow.bench.provenance import require_clean
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.llm import LLM
from nanoflow.request import SamplingParams

_ENGINE = OptionGroup(
    kind=EngineConfig,
    title="model and engine",
    defaults={"speculative": "ngram:4", "max_num_seqs": 16, "goal": "balanced"},
)
_WORDS = ("self", "return", "int", "rows", "tokens", "request")
_THINGS = (
    "a lighthouse",
    "an old clock",
    "the first snow",
    "a lost letter",
    "a river",
    "two friends",
    "a garden",
    "rain",
)
_TEMPERATURE = {"edit": 0.0, "free": 1.0}
_SPEC = "spec_decode_num_"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of some requests on one engine.

    Attributes:
        text, num_requests, round: Kind of text, number of requests, number of the round.
        is_speculative: Whether drafts were made.
        whole_tokens_per_s, decode_tokens_per_s: Rates of output tokens; see the top of this file.
        num_drafts, num_draft_tokens, num_accepted_tokens: Counts of this run.
        token_ids: Output of each request.
    """

    text: str
    num_requests: int
    round: int
    is_speculative: bool
    whole_tokens_per_s: float
    decode_tokens_per_s: float
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    token_ids: list[list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table and write the record."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.json is not None:
            require_clean(args.json, allows_dirty=args.allow_dirty)
        config = _ENGINE.read(args)
        if config.speculative is None:
            raise ConfigError("speculative is what is compared: give it as ngram:4")
        if min(args.rounds, args.output_tokens - 1, args.prompt_chars, *args.requests) < 1:
            raise ConfigError("rounds, requests and prompt_chars must be at least 1, output_tokens at least 2")
        runs: list[Run] = []
        for number in range(args.rounds):
            for speculative in (None, config.speculative):
                engine = dataclasses.replace(config, speculative=speculative)
                runs += run_engine(engine, args.requests, number, args.output_tokens, args.prompt_chars)
    except ValueError as error:
        parser.error(str(error))
    rows = summarise(runs)
    if args.json is not None:
        options = {name: getattr(args, name) for name in ("requests", "rounds", "output_tokens", "prompt_chars")}
        write_document(
            args.json, "speculative", engine=engine_options(config), options=options, rows=rows, runs=flat(runs)
        )
    is_slower = any(row["text"] == "edit" and row["decode_ratio"] <= 1 for row in rows)
    return 1 if args.check and is_slower else 0


def make_parser() -> CommandParser:
    """The options; the first line of each group says whose they are."""
    parser = CommandParser(prog="python -m benchmarks.engine.speculative", description=__doc__)
    parser.add_argument(
        "--requests", nargs="+", type=int, default=[1, 2, 4, 8], help="requests at once (default: 1 2 4 8)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine (default: 3)")
    parser.add_argument("--output-tokens", type=int, default=192, help="output tokens of each request (default: 192)")
    parser.add_argument("--prompt-chars", type=int, default=2400, help="characters of each file (default: 2400)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    parser.add_argument("--allow-dirty", action="store_true", help="write a record though sources are not committed")
    parser.add_argument("--check", action="store_true", help="exit with 1 if edits are not faster")
    _ENGINE.add_to(parser)
    return parser


def prompts_of(text: str, count: int, num_chars: int) -> list[str]:
    """Prompts of one kind of text, each different."""
    return {"edit": edits, "free": stories}[text](count, num_chars)


def edits(count: int, num_chars: int) -> list[str]:
    """Prompts: a file of this package, the task to copy it with a word replaced, and the beginning of the answer."""
    folder = Path(nanoflow.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in sorted((folder / "scheduler").glob("*.py"))]
    files = [source[:num_chars].rpartition("\n")[0] for source in sources if len(source) >= num_chars] or sources
    prompts = []
    for place in range(count):
        code, word = files[place % len(files)], _WORDS[place % len(_WORDS)]
        first = code.partition("\n")[0]
        ask = f"Write this file again, and replace every `{word}` by `{word}_`."
        prompts.append(f"{ask}\n\n```python\n{code}\n```\n\nThe file again:\n\n```python\n{first}\n")
    return prompts


def stories(count: int, num_chars: int) -> list[str]:
    """Prompts that ask for stories."""
    del num_chars
    return [
        f"Write a long story about {_THINGS[place % len(_THINGS)]}, number {place + 1}.\n\n" for place in range(count)
    ]


def run_engine(
    config: EngineConfig, requests: Sequence[int], number: int, num_tokens: int, num_chars: int
) -> Iterator[Run]:
    """Load an engine, warm it up, and run every text at every number of requests."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with LLM(**options) as llm:
        for text in ("edit", "free"):
            run(llm, config, text, min(requests), number, num_tokens=min(32, num_tokens), num_chars=num_chars)
        for text in ("edit", "free"):
            for count in requests:
                done = run(llm, config, text, count, number, num_tokens=num_tokens, num_chars=num_chars)
                print(line(done), flush=True)
                yield done


def run(llm: LLM, config: EngineConfig, text: str, count: int, number: int, *, num_tokens: int, num_chars: int) -> Run:
    """One run."""
    params = SamplingParams(
        temperature=_TEMPERATURE[text], seed=number, max_tokens=num_tokens, ignore_eos=True, detokenize=False
    )
    before, start_s = counts_of(llm), time.monotonic()
    outputs = llm.generate(prompts_of(text, count, num_chars), params, use_tqdm=False)
    elapsed_s = time.monotonic() - start_s
    token_ids = [output.outputs[0].token_ids for output in outputs]
    if [len(ids) for ids in token_ids] != [num_tokens] * count:
        raise ValueError("a request has not got all of its tokens; max_model_len may be too small")
    times = [output.metrics for output in outputs if output.metrics is not None]
    spans_s = [(one.last_token_s or 0.0) - (one.first_token_s or 0.0) for one in times]
    num_drafts, num_draft_tokens, num_accepted = (now - then for now, then in zip(counts_of(llm), before, strict=True))
    return Run(
        text=text,
        num_requests=count,
        round=number,
        is_speculative=config.speculative is not None,
        whole_tokens_per_s=count * num_tokens / elapsed_s,
        decode_tokens_per_s=sum((num_tokens - 1) / span_s for span_s in spans_s),
        num_drafts=num_drafts,
        num_draft_tokens=num_draft_tokens,
        num_accepted_tokens=num_accepted,
        token_ids=token_ids,
    )


def counts_of(llm: LLM) -> tuple[int, int, int]:
    """Drafts, draft tokens and accepted tokens since the engine was loaded."""
    values = {metric.name.rpartition(":")[2]: int(metric.value) for metric in llm.get_metrics()}
    drafts, tokens, accepted = (values[_SPEC + name] for name in ("drafts", "draft_tokens", "accepted_tokens"))
    return drafts, tokens, accepted


def line(run: Run) -> str:
    """A run as a line of text."""
    kind = "drafts" if run.is_speculative else "plain"
    share = f", {run.num_accepted_tokens / run.num_draft_tokens:.0%} accepted" if run.num_draft_tokens else ""
    rates = f"decode {run.decode_tokens_per_s:8.1f}, whole {run.whole_tokens_per_s:8.1f} tokens/s"
    return f"round {run.round} {run.text} x {run.num_requests} {kind:6} {rates}{share}"


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each text and number of requests: medians, ratios of each round, acceptance."""
    rows = []
    for text, count in sorted({(run.text, run.num_requests) for run in runs}):
        plain, drafted = (
            sorted(
                (one for one in runs if (one.text, one.num_requests, one.is_speculative) == (text, count, kind)),
                key=lambda one: one.round,
            )
            for kind in (False, True)
        )
        pairs = list(zip(plain, drafted, strict=True))
        ratios = [two.decode_tokens_per_s / one.decode_tokens_per_s for one, two in pairs]
        num_tokens = sum(one.num_draft_tokens for one in drafted)
        num_drafts = sum(one.num_drafts for one in drafted)
        num_accepted = sum(one.num_accepted_tokens for one in drafted)
        row = {
            "text": text,
            "num_requests": count,
            "plain_decode_tokens_per_s": median(one.decode_tokens_per_s for one in plain),
            "drafts_decode_tokens_per_s": median(one.decode_tokens_per_s for one in drafted),
            "decode_ratio": median(ratios),
            "decode_ratios": ratios,
            "whole_ratio": median(two.whole_tokens_per_s / one.whole_tokens_per_s for one, two in pairs),
            "acceptance": num_accepted / num_tokens if num_tokens else None,
            "tokens_per_draft": 1 + num_accepted / num_drafts if num_drafts else None,
            "num_same": min(
                sum(a == b for a, b in zip(one.token_ids, two.token_ids, strict=True)) for one, two in pairs
            ),
        }
        rows.append(row)
        shown = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        rates = f"{row['plain_decode_tokens_per_s']:.1f} -> {row['drafts_decode_tokens_per_s']:.1f} tokens/s"
        spread = f"{row['decode_ratio']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), whole {row['whole_ratio']:.2f}x"
        print(f"{text} x {count}: {rates}, {spread}, {shown} accepted, {row['num_same']} of {count} the same")
    return rows


def flat(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as plain data, without their tokens."""
    return [{name: value for name, value in dataclasses.asdict(run).items() if name != "token_ids"} for run in runs]


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """Options of the engine that are not the default; a model's folder by its name alone."""
    found = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return {**found, "model": Path(config.model).name}


if __name__ == "__main__":
    sys.exit(main())
