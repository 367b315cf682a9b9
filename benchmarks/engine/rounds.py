"""The same conversations with one KV cache after the other: without a prefix cache, on the device, with lower tiers.

From the root of the repository:

    python -m benchmarks.engine.rounds --model preset:llama-3-8b --workload trace:sharegpt.csv \\
        --num-conversations 400 --variants none=--no-enable-prefix-caching device= host="--kv-host-gib 64" \\
        --json benchmarks/results/rounds_llama-3-8b.json

A variant is a name and options of the engine, which override the common ones. Each engine is started in turn; the order
is reversed in every second repeat. All have the same number of KV pages on the device: `--kv-fraction` of what the
conversations under way fill at their ends, but at least the longest conversation. The record has every run, and each
variant over the first one. `num_same_completions` counts conversations that got the same tokens as there; with 16-bit
types some do not, where two tokens are almost equally likely. `tools/rounds_picture.py` draws the record. Exit status 1
if a request failed or a variant did not run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.common.document import write_json
from nanoflow.bench.options import BenchConfig
from nanoflow.bench.provenance import header, portable_options, require_clean
from nanoflow.bench.rounds import conversation_metrics, counted, run_engine_rounds
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.conversation_options import ConversationConfig
from nanoflow.conversations import draw_conversations, fitted
from nanoflow.engine.build import resolve_model
from nanoflow.engine.errors import EngineError
from nanoflow.engine.memory import wanted_model_len

Document = dict[str, Any]

_VARIANTS = ("none=--no-enable-prefix-caching", "device=")
_ASKED = OptionGroup(kind=BenchConfig, title="workload and measurement", skip=frozenset({"num_requests", "goodput"}))
_TALK = OptionGroup(kind=ConversationConfig, title="conversations")
_ENGINE = OptionGroup(kind=EngineConfig, title="engine, common to all variants", skip=frozenset({"seed"}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An engine under the name that results have; `options` is what was given for it."""

    name: str
    options: str
    engine: EngineConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run every variant in every repeat; write the record after each, and print the table at the end."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        config, talk = _ASKED.read(args), _TALK.read(args)
        require_clean(config.json, allows_dirty=config.allow_dirty)
        if not args.kv_fraction > 0:
            raise ConfigError(f"--kv-fraction must be positive, got {args.kv_fraction}")
        variants = read_variants(args.variants, _ENGINE.given(args))
        variants = [sized(each, config, talk, args.kv_fraction) for each in variants]
    except ValueError as error:
        parser.error(str(error))
    document = begin(config, talk, variants, args.kv_fraction)
    try:
        is_whole = run_all(variants, config, talk, document)
    except KeyboardInterrupt:
        return 130
    print(table(document["results"]))
    return 0 if is_whole and not any(each["num_failed"] for each in document["results"]) else 1


def make_parser() -> CommandParser:
    """The options; those of one variant are in the text of `--variants`."""
    parser = CommandParser(prog="python -m benchmarks.engine.rounds", description=__doc__)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(_VARIANTS),
        metavar="NAME=OPTIONS",
        help=f"engines to compare, the first is the base (default: {' '.join(_VARIANTS)})",
    )
    parser.add_argument(
        "--kv-fraction",
        type=float,
        default=0.25,
        metavar="X",
        help="KV pages of the device as a part of what the conversations under way fill (default: 0.25)",
    )
    _ASKED.add_to(parser)
    _TALK.add_to(parser)
    _ENGINE.add_to(parser)
    return parser


def read_variants(texts: Sequence[str], common: dict[str, Any]) -> list[Variant]:
    """The engines of `--variants`.

    Raises:
        ConfigError: A text has no name, two have the same, or a value is invalid. An unknown option ends the program.
    """
    variants = []
    for text in texts:
        name, separator, options = text.partition("=")
        if not name or not separator:
            raise ConfigError(f"--variants: {text!r} must be NAME=OPTIONS, as device= or host='--num-pages 512'")
        parser = CommandParser(prog=f"--variants {name}", add_help=False)
        _ENGINE.add_to(parser)
        own = _ENGINE.given(parser.parse_args(shlex.split(options)))
        variants.append(Variant(name=name, options=options, engine=EngineConfig(**{**common, **own})))
    if len({each.name for each in variants}) < len(variants):
        raise ConfigError("--variants: each needs a name of its own")
    return variants


def sized(variant: Variant, config: BenchConfig, talk: ConversationConfig, fraction: float) -> Variant:
    """The variant with the device's share of the conversations as its KV pages, unless its options say how many."""
    engine = variant.engine
    if engine.num_pages is not None or engine.kv_cache_gib is not None:
        return variant
    longest = wanted_model_len(engine, resolve_model(engine)[0])
    tokens = [each.num_tokens for each in fitted(draw_conversations(config, talk, vocab_size=1), longest)]
    under_way = min(talk.max_concurrency or len(tokens), len(tokens))
    num_tokens = max(fraction * under_way * sum(tokens) / len(tokens), max(tokens) + engine.page_size)
    return replace(variant, engine=replace(engine, num_pages=-int(-num_tokens // engine.page_size)))


def begin(config: BenchConfig, talk: ConversationConfig, variants: Sequence[Variant], kv_fraction: float) -> Document:
    """The record before the first run."""
    return {
        **plain(header("rounds_in_turn")),
        "workload": plain(portable_options(replace(counted(config, talk), json=None))),
        "conversations": plain(talk),
        "kv_fraction": kv_fraction,
        "variants": [
            {"name": each.name, "options": each.options, "engine": plain(portable_options(each.engine))}
            for each in variants
        ],
        "runs": [],
        "results": [],
    }


def run_all(variants: Sequence[Variant], config: BenchConfig, talk: ConversationConfig, document: Document) -> bool:
    """Run everything in turn, with the results so far written after each run; whether all of it ran."""
    is_whole = True
    for repeat in range(config.repeats):
        for variant in variants if repeat % 2 == 0 else reversed(variants):
            try:
                record = run_engine_rounds(variant.engine, config, talk, repeats=[repeat])
            except (EngineError, ValueError) as error:
                print(f"{variant.name}: {error}", file=sys.stderr, flush=True)
                is_whole = False
                continue
            (metrics,) = conversation_metrics(record)
            document["runs"].append(
                {
                    "variant": variant.name,
                    "repeat": repeat,
                    "model": plain(record.model),
                    "settings": plain(record.settings),
                    "processes": plain(record.processes),
                    "metrics": plain(metrics),
                }
            )
            document["results"] = list(results_of(document["runs"], [each.name for each in variants]))
            print(line(document["runs"][-1]), flush=True)
            if config.json is not None:
                write_json(Path(config.json), document)
    return is_whole


def results_of(runs: Sequence[Document], names: Sequence[str]) -> Iterator[Document]:
    """Each variant over the first one: medians over repeats, and ratios of the same repeats."""
    by_name = {name: {run["repeat"]: run["metrics"] for run in runs if run["variant"] == name} for name in names}
    base = by_name[names[0]]
    for name, own in by_name.items():
        if own:
            yield _result(name, list(own.values()), [(own[each], base[each]) for each in own if each in base])


def _result(name: str, own: Sequence[Document], pairs: Sequence[tuple[Document, Document]]) -> Document:
    return {
        "name": name,
        "num_asked": _median(run["prompt"]["num_asked"] for run in own),
        "num_computed": _median(run["prompt"]["num_computed"] for run in own),
        "asked_over_computed": _median(run["asked_over_computed"] for run in own),
        "hit_rate": _median(run["prompt"]["hit_rate"] for run in own),
        "total_tokens_per_s": _median(run["total_tokens_per_s"] for run in own),
        "ttft_p50_s": _median(_ttft(run, "p50") for run in own),
        "ttft_p99_s": _median(_ttft(run, "p99") for run in own),
        "computed_ratio": _median(_ratio(a["prompt"]["num_computed"], b["prompt"]["num_computed"]) for a, b in pairs),
        "total_tokens_per_s_ratio": _median(_ratio(a["total_tokens_per_s"], b["total_tokens_per_s"]) for a, b in pairs),
        "ttft_p50_ratio": _median(_ratio(_ttft(a, "p50"), _ttft(b, "p50")) for a, b in pairs),
        "num_same_completions": min(
            (sum(x == y for x, y in zip(a["completions"], b["completions"], strict=False)) for a, b in pairs),
            default=None,
        ),
        "num_conversations": own[0]["num_conversations"],
        "num_left_out": own[0]["num_left_out"],
        "num_failed": sum(run["num_failed"] for run in own),
    }


def _ttft(run: Document, part: str) -> float | None:
    return None if run["ttft_s"] is None else run["ttft_s"][part]


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _median(values: Iterator[float | None]) -> float | None:
    """The median of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def line(run: Document) -> str:
    """One run as a line of text."""
    metrics = run["metrics"]
    failed = f", {metrics['num_failed']} FAILED" if metrics["num_failed"] else ""
    return (
        f"{run['repeat']}: {run['variant']} ({run['settings']['num_pages']:,} pages): {metrics['duration_s']:.1f} s, "
        f"prompt tokens computed {metrics['prompt']['num_computed']} of {metrics['prompt']['num_asked']}{failed}"
    )


def table(results: Sequence[Document]) -> str:
    """Every variant as a line of text."""
    lines = [
        f"{'variant':<16}{'computed: 1 of':>16}{'hit rate':>10}{'computed':>10}{'TTFT p50':>11}{'p99 (ms)':>11}"
        f"{'ratio':>8}{'tokens/s':>10}{'ratio':>8}{'same':>8}"
    ]
    for each in results:
        lines.append(
            f"{each['name']:<16}{_shown(each['asked_over_computed'], '.2f'):>16}{_shown(each['hit_rate'], '.1%'):>10}"
            f"{_shown(each['computed_ratio'], '.3f'):>10}"
            f"{_in_ms(each['ttft_p50_s']):>11}{_in_ms(each['ttft_p99_s']):>11}"
            f"{_shown(each['ttft_p50_ratio'], '.3f'):>8}{_shown(each['total_tokens_per_s'], ',.0f'):>10}"
            f"{_shown(each['total_tokens_per_s_ratio'], '.3f'):>8}{_shown(each['num_same_completions'], 'd'):>8}"
        )
    return "\n".join(lines)


def _shown(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def _in_ms(time_s: float | None) -> str:
    return "" if time_s is None else f"{time_s * 1e3:,.1f}"


def plain(value: Any) -> Any:
    """A value as JSON has it; infinity is null there."""
    return msgspec.json.decode(msgspec.json.encode(value))


if __name__ == "__main__":
    sys.exit(main())
