"""`nanoflow search`: from a profile to plans, for one batch shape or for all that a workload produces.

The search is `search/`'s; here are its options, what it says on the way, and the file that it ends in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, option

if TYPE_CHECKING:
    from nanoflow.cost.table import Profile
    from nanoflow.graph.operation import BatchShape
    from nanoflow.plan.book import PlanEntry
    from nanoflow.plan.plan import PipelinePlan
    from nanoflow.search.iteration import IterationModel
    from nanoflow.search.search import SearchResult

_TEACH = """\
Find the pipeline plans that a profile predicts to be fastest. Without --decodes a
plan is searched for each batch shape that the workload produces, and those that win
over the sequential plan become a plan book; with --decodes the file is the one plan
for that batch, sequential if nothing wins. A search ends by itself, at the latest
after --time-limit seconds a shape. docs/auto-search.md has the mathematics."""

_EXAMPLES = """\
  nanoflow profile preset:llama-3-8b -o profile.json --max-batch-tokens 8192
  nanoflow search profile.json -o plans.json --workload 1024/512 --max-batch-tokens 8192
  nanoflow search profile.json -o plan.json --max-batch-tokens 2048 --decodes 1024 --context 768
  nanoflow serve preset:llama-3-8b --plan plans.json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """What to search plans for."""

    workload: str = option("512/512", "Mean lengths: prompt tokens/output tokens")
    max_batch_tokens: int = option(2048, "Token budget: tokens of the largest batch")
    max_num_seqs: int = option(1024, "Most requests that decode at once")
    decodes: int | None = option(None, "Search for one batch only, with so many decodes; its other tokens are prompts")
    context: float | None = option(None, "Keys that each of these decodes sees; from the workload if not given")
    time_limit: float = option(60.0, "Seconds for one batch shape at most")

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_num_seqs", "time_limit"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.decodes is not None and not 0 <= self.decodes <= self.max_batch_tokens:
            raise ConfigError(
                f"decodes must be from 0 to max_batch_tokens ({self.max_batch_tokens}), got {self.decodes}"
            )
        if self.context is not None and (self.decodes is None or self.context <= 0):
            raise ConfigError("context needs --decodes and must be positive")


_OPTIONS = OptionGroup(kind=SearchConfig, title="batches")


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow search`."""
    parser = add_command(commands, "search", "find the fastest pipeline plans for a profile", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} PROFILE -o FILE [options]"
    parser.add_argument("profile", metavar="PROFILE", type=Path, help="File written by nanoflow profile")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="File for the plan or plans")
    parser.add_argument("--quiet", action="store_true", help="Print only what was found")
    _OPTIONS.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print a line a shape, write the file."""
    from nanoflow.cost.table import Profile
    from nanoflow.plan.book import MadeFor, StoredBook
    from nanoflow.search.iteration import IterationModel
    from nanoflow.search.shapes import entry_of

    config = _OPTIONS.read(args)
    profile = Profile.load(args.profile)
    if not args.output.parent.is_dir():
        raise ConfigError(f"cannot write {args.output}: there is no folder {args.output.parent}")
    model, entries = IterationModel(profile), []
    for shape in _shapes(config):
        print(_describe(shape), flush=True)
        result = _search(profile, shape, config.time_limit, is_quiet=args.quiet)
        print("\n".join(f"  {line}" for line in _summary(model, shape, result)), flush=True)
        if config.decodes is not None:
            args.output.write_bytes(result.plan.to_json())
        elif len(result.plan.lanes) > 1:
            entry = entry_of(result.plan, shape, _mean_lengths(config.workload)[0], _gain(model, result.plan))
            print(f"  {_range(entry)}", flush=True)
            entries += [] if entry is None else [entry]
    if config.decodes is None:
        setup = profile.setup
        made_for = MadeFor(model=profile.model, gpu=setup.gpu, num_gpus=setup.num_gpus)
        args.output.write_bytes(StoredBook(entries=tuple(entries), made_for=made_for).to_json())
        print(f"{args.output}: {len(entries)} plans; every other batch runs sequentially")
    return 0


def _gain(model: IterationModel, plan: PipelinePlan) -> Callable[[BatchShape], float]:
    def gain(shape: BatchShape) -> float:
        return model.predict(shape).iteration_s / model.predict(shape, plan).iteration_s

    return gain


def _range(entry: PlanEntry | None) -> str:
    """Where a plan is used."""
    if entry is None:
        return "not used: an iteration wins less than 1 %"
    return (
        f"used for {entry.min_tokens:,} to {entry.max_tokens:,} tokens, {entry.min_decode_share:.0%} to "
        f"{entry.max_decode_share:.0%} decodes with {entry.min_decode_context:,.0f} to "
        f"{entry.max_decode_context or 0:,.0f} keys"
    )


def _shapes(config: SearchConfig) -> list[BatchShape]:
    from nanoflow.search.shapes import batch_of, workload_shapes

    prompt_tokens, output_tokens = _mean_lengths(config.workload)
    if config.decodes is None:
        return list(
            workload_shapes(
                prompt_tokens,
                output_tokens,
                max_batch_tokens=config.max_batch_tokens,
                max_num_seqs=config.max_num_seqs,
            )
        )
    context = config.context or prompt_tokens + output_tokens / 2
    return [batch_of(config.max_batch_tokens, config.decodes, context, prompt_tokens)]


def _mean_lengths(workload: str) -> tuple[float, float]:
    """Prompt and output tokens of IN/OUT."""
    prompt, separator, output = workload.partition("/")
    if not separator or not prompt.isdecimal() or not output.isdecimal() or not int(prompt) or not int(output):
        raise ConfigError(f"workload must be IN/OUT tokens, as 512/512, got {workload!r}")
    return float(prompt), float(output)


def _describe(shape: BatchShape) -> str:
    context = shape.decode_context / max(shape.num_decode_tokens, 1)
    return f"{shape.num_tokens:,} tokens, {shape.num_decode_tokens:,} of them decodes with {context:,.0f} keys each"


def _search(profile: Profile, shape: BatchShape, time_limit_s: float, *, is_quiet: bool) -> SearchResult:
    from nanoflow.search.search import Search

    def report(line: str) -> None:
        if not is_quiet:
            print(f"  {line}", file=sys.stderr, flush=True)

    return Search(profile, shape, time_limit_s=time_limit_s, report=report).run()


def _summary(model: IterationModel, shape: BatchShape, result: SearchResult) -> list[str]:
    """What was found, layer and iteration."""
    prediction = model.predict(shape, result.plan)
    energy = prediction.energy_per_token_j
    gaps = [attempt.gap for attempt in result.attempts if attempt.plan == result.plan]
    return [
        f"{result.plan.name} ({result.plan.digest}): {result.reason}",
        f"layer {result.makespan_s * 1e6:,.1f} us, sequential {result.sequential_s * 1e6:,.1f} us, "
        f"no order can undercut {result.least_period_s * 1e6:,.1f} us",
        f"iteration {prediction.iteration_s * 1e3:.2f} ms, {prediction.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
        + ("" if energy is None else f", {energy * 1e3:.1f} mJ/token")
        + "".join(f", gap of the shares {gap:.1%}" for gap in gaps)
        + f", searched {result.elapsed_s:.1f} s",
    ]
