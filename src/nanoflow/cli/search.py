"""`nanoflow search`: from a profile to plans, for one batch shape or for all batches of a workload.

This file has the options and writes the result. `search/` finds plans; `search_book.py` puts a plan book together.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, option

if TYPE_CHECKING:
    from nanoflow.graph.operation import BatchShape
    from nanoflow.plan.plan import PipelinePlan
    from nanoflow.profile.table import Profile
    from nanoflow.search.search import SearchResult
    from nanoflow.simulate.iteration import IterationModel

_TEACH = """\
Find the pipeline plans that a profile predicts to be fastest. Without --decodes the
workloads are simulated under several token budgets and numbers of requests, first
sequentially. Under the limits that could win, a plan is searched for each kind of
batch. The best limits and their plans become a plan book, if they beat the
sequential plan under the limits that are best for it; else the book has those limits
and no plan. A number that is given is kept: --max-batch-tokens 2048 searches under
that budget alone. With --decodes the file is the one plan for that batch, sequential
if nothing wins. With --measure, on the GPU of the profile, plans that may win are
run for a second each, and only those that do win stay; for rare batches, those that
are safely predicted to. Without it nothing is measured: a plan is kept if it is
predicted to win by the --margin, and what was not kept is named with the reason. A
search ends by itself, at the latest after --time-limit
seconds a kind of batch. docs/auto-search.md has the mathematics."""

_EXAMPLES = """\
  nanoflow profile preset:llama-3-8b -o profile.json --max-batch-tokens 8192
  nanoflow search profile.json -o plans.json --workloads 1024/512 trace:lengths.csv --measure
  nanoflow search profile.json -o plans.json --max-batch-tokens 2048 4096 --max-num-seqs 1024
  nanoflow search profile.json -o plans.json --margin 0
  nanoflow search profile.json -o plan.json --max-batch-tokens 2048 --decodes 683 --context 1280 --prompt-tokens 1024
  nanoflow serve preset:llama-3-8b --plan plans.json"""

# Token budget if only one batch is searched for.
_ONE_BATCH = 2048


def _numbers(text: str) -> Any:
    """Declare an option of one or more numbers, None by default."""
    return dataclasses.field(default=None, metadata={"help": text, "nargs": "+"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """What to search plans for."""

    num_requests: int = option(
        1500, "Requests of each workload to simulate: once all sent at once, once each sent as another ends"
    )
    max_batch_tokens: Sequence[int] | None = _numbers(
        "Token budgets to compare: tokens of the largest batch; 1024, 2048, 4096, 8192 and 16384 if not given, as far "
        "as the profile goes (with --decodes: 2048)"
    )
    max_num_seqs: Sequence[int] | None = _numbers(
        "Numbers of requests that run at once to compare; 256, 512, 1024 and 2048 if not given"
    )
    gpu_memory_utilization: float = option(0.9, "Part of a GPU's memory for weights and KV cache")
    kv_host_gib: float = option(
        0.0, "Host memory below the KV cache, GiB: with any, pages are copied beside every iteration"
    )
    seed: int = option(0, "Seed of the lengths that are drawn from traces")
    decodes: int | None = option(
        None, "Search for one batch only, with this number of decodes; its other tokens are prompts"
    )
    context: float = option(768.0, "Keys that each of these decodes sees")
    prompt_tokens: float = option(512.0, "Mean length of that batch's prompts")
    margin: float | None = option(
        None,
        "Percent by which a plan must be predicted to win to be kept without a trial; if not given, 3 with attention "
        "inside products and 8 with other lanes, which is how far off predictions have been",
    )
    time_limit: float = option(60.0, "Longest search for one kind of batch, in seconds")

    def __post_init__(self) -> None:
        for name in ("num_requests", "time_limit", "context", "prompt_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_batch_tokens", "max_num_seqs"):
            for number in getattr(self, name) or ():
                if number <= 0:
                    raise ConfigError(f"{name} must be positive, got {number}")
        if self.kv_host_gib < 0:
            raise ConfigError(f"kv_host_gib must be at least 0, got {self.kv_host_gib}")
        if self.margin is not None and not 0 <= self.margin <= 100:
            raise ConfigError(f"margin must be from 0 to 100 percent, got {self.margin}")
        if self.margin is not None and self.decodes is not None:
            raise ConfigError("margin is for plan books: with --decodes the plan predicted to be fastest is written")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.decodes is not None and not 0 <= self.decodes <= self.num_tokens:
            raise ConfigError(f"decodes must be from 0 to max_batch_tokens ({self.num_tokens}), got {self.decodes}")

    @property
    def num_tokens(self) -> int:
        """Tokens of the single batch that --decodes asks for; ConfigError if several budgets are given."""
        budgets = self.max_batch_tokens or (_ONE_BATCH,)
        if len(budgets) > 1:
            raise ConfigError("--decodes is for one batch: give one --max-batch-tokens")
        return budgets[0]


_OPTIONS = OptionGroup(kind=SearchConfig, title="batches")


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow search`."""
    parser = add_command(commands, "search", "find the fastest pipeline plans for a profile", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} PROFILE -o FILE [options]"
    parser.add_argument("profile", metavar="PROFILE", type=Path, help="File written by nanoflow profile")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="File for the plan or plans")
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["512/512"],
        metavar="WORKLOAD",
        help="prompt tokens/output tokens of every request, a mix of several with shares (8000/100x1,200/1000x12), "
        "or trace:FILE.csv (default: 512/512)",
    )
    parser.add_argument("--measure", action="store_true", help="Keep only plans that win on this machine's GPU")
    parser.add_argument(
        "--fresh", action="store_true", help="With --measure: try again what an interrupted search tried"
    )
    parser.add_argument("--quiet", action="store_true", help="Print only what was found")
    _OPTIONS.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print a line for each batch, and write the file."""
    from nanoflow.cli.search_book import LimitsSearch, kept_trials
    from nanoflow.profile.table import Profile

    config = _OPTIONS.read(args)
    profile = Profile.load(args.profile)
    if not args.output.parent.is_dir():
        raise ConfigError(f"cannot write {args.output}: there is no folder {args.output.parent}")
    if config.decodes is not None:
        if args.measure:
            raise ConfigError("--measure is for plan books: leave out --decodes, and name --workloads")
        args.output.write_bytes(_one_plan(profile, config, config.decodes, is_quiet=args.quiet).to_json())
        return 0
    kept = kept_trials(args.output, profile, is_fresh=args.fresh) if args.measure else None
    book = LimitsSearch(profile, config, args.workloads, kept, is_quiet=args.quiet).book()
    args.output.write_bytes(book.to_json())
    if kept is not None:
        kept.forget()
    num_plans = f"{len(book.plans)} plan{'' if len(book.plans) == 1 else 's'}"
    print(f"{args.output}: {num_plans} in {len(book.entries)} ranges; every other batch runs sequentially")
    return 0


def _one_plan(profile: Profile, config: SearchConfig, num_decodes: int, *, is_quiet: bool) -> PipelinePlan:
    from nanoflow.profile.host_link import copies_of
    from nanoflow.search.search import Search
    from nanoflow.search.shapes import batch_of
    from nanoflow.simulate.iteration import IterationModel, graphs_of

    def report(line: str) -> None:
        if not is_quiet:
            print(f"  {line}", file=sys.stderr, flush=True)

    shape = batch_of(config.num_tokens, num_decodes, config.context, config.prompt_tokens)
    print(_describe(shape), flush=True)
    result = Search(profile, shape, time_limit_s=config.time_limit, report=report).run()
    copies = copies_of(profile, graphs_of(profile)[0], host_gib=config.kv_host_gib)
    model = IterationModel(profile, copies=copies)
    print("\n".join(f"  {line}" for line in _summary(model, shape, result)), flush=True)
    return result.plan


def _describe(shape: BatchShape) -> str:
    context = shape.decode_context / max(shape.num_decode_tokens, 1)
    return f"{shape.num_tokens:,} tokens, {shape.num_decode_tokens:,} of them decodes with {context:,.0f} keys each"


def _summary(model: IterationModel, shape: BatchShape, result: SearchResult) -> list[str]:
    """The result, for a layer and for an iteration."""
    prediction = model.predict(shape, result.plan)
    energy = prediction.energy_per_token_j
    gaps = [attempt.gap for attempt in result.attempts if attempt.plan == result.plan]
    return [
        f"{result.plan.name} ({result.plan.digest}): {result.reason}",
        f"layer {result.makespan_s * 1e6:,.1f} us, sequential {result.sequential_s * 1e6:,.1f} us, "
        f"no order can take less than {result.least_period_s * 1e6:,.1f} us",
        f"iteration {prediction.iteration_s * 1e3:.2f} ms, {prediction.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
        + ("" if energy is None else f", {energy * 1e3:.1f} mJ/token")
        + "".join(f", gap of the shares {gap:.1%}" for gap in gaps)
        + f", searched {result.elapsed_s:.1f} s",
    ]
