"""`nanoflow search`: from a profile to plans, for one batch shape or for all that a workload produces.

The search is `search/`'s; here are its options, what it says on the way, and the file that it ends in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, option

if TYPE_CHECKING:
    from nanoflow.cost.table import Profile
    from nanoflow.graph.operation import BatchShape
    from nanoflow.plan.book import StoredBook
    from nanoflow.plan.plan import PipelinePlan
    from nanoflow.profiler.kept_trials import KeptTrials
    from nanoflow.search.books import FoundPlan
    from nanoflow.search.iteration import IterationModel
    from nanoflow.search.search import SearchResult

_TEACH = """\
Find the pipeline plans that a profile predicts to be fastest. Without --decodes the
workloads are simulated, and a plan is searched for each kind of batch that they
produce; those that win over the sequential plan become a plan book. With --decodes
the file is the one plan for that batch, sequential if nothing wins. With --measure,
on the GPU of the profile, plans that may win are run for a second each, and only
those that do win stay; for rare batches, those that are safely predicted to. A search
ends by itself, at the latest after --time-limit seconds a kind of batch.
docs/auto-search.md has the mathematics."""

_EXAMPLES = """\
  nanoflow profile preset:llama-3-8b -o profile.json --max-batch-tokens 8192
  nanoflow search profile.json -o plans.json --workloads 1024/512 trace:lengths.csv --max-batch-tokens 8192 --measure
  nanoflow search profile.json -o plan.json --max-batch-tokens 2048 --decodes 683 --context 1280 --prompt-tokens 1024
  nanoflow serve preset:llama-3-8b --plan plans.json"""

# Settling, capturing and measuring, for one plan.
_TRIAL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """What to search plans for."""

    num_requests: int = option(1500, "Requests of each workload to simulate, once all at once and once as others leave")
    max_batch_tokens: int = option(2048, "Token budget: tokens of the largest batch")
    max_num_seqs: int = option(1024, "Most requests that run at once")
    gpu_memory_utilization: float = option(0.9, "Part of a GPU's memory for weights and KV cache")
    seed: int = option(0, "Seed of the lengths that are drawn from traces")
    decodes: int | None = option(None, "Search for one batch only, with so many decodes; its other tokens are prompts")
    context: float = option(768.0, "Keys that each of these decodes sees")
    prompt_tokens: float = option(512.0, "Mean length of that batch's prompts")
    time_limit: float = option(60.0, "Seconds for one kind of batch at most")

    def __post_init__(self) -> None:
        for name in ("num_requests", "max_batch_tokens", "max_num_seqs", "time_limit", "context", "prompt_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.decodes is not None and not 0 <= self.decodes <= self.max_batch_tokens:
            raise ConfigError(
                f"decodes must be from 0 to max_batch_tokens ({self.max_batch_tokens}), got {self.decodes}"
            )


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
        help="prompt tokens/output tokens of every request, or trace:FILE.csv (default: 512/512)",
    )
    parser.add_argument("--measure", action="store_true", help="Keep only plans that win on this machine's GPU")
    parser.add_argument(
        "--fresh", action="store_true", help="With --measure: try again what an interrupted search tried"
    )
    parser.add_argument("--quiet", action="store_true", help="Print only what was found")
    _OPTIONS.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, print a line a batch, write the file."""
    from nanoflow.cost.table import Profile

    config = _OPTIONS.read(args)
    profile = Profile.load(args.profile)
    if not args.output.parent.is_dir():
        raise ConfigError(f"cannot write {args.output}: there is no folder {args.output.parent}")
    if config.decodes is not None:
        if args.measure:
            raise ConfigError("--measure is for plan books: leave out --decodes, and name --workloads")
        args.output.write_bytes(_one_plan(profile, config, config.decodes, is_quiet=args.quiet).to_json())
    else:
        kept = _kept_trials(args.output, profile, is_fresh=args.fresh) if args.measure else None
        book = _book(profile, config, args.workloads, kept, is_quiet=args.quiet)
        args.output.write_bytes(book.to_json())
        if kept is not None:
            kept.forget()
        num_plans = f"{len(book.plans)} plan{'' if len(book.plans) == 1 else 's'}"
        print(f"{args.output}: {num_plans} in {len(book.entries)} ranges; every other batch runs sequentially")
    return 0


def _one_plan(profile: Profile, config: SearchConfig, num_decodes: int, *, is_quiet: bool) -> PipelinePlan:
    from nanoflow.search.iteration import IterationModel
    from nanoflow.search.search import Search
    from nanoflow.search.shapes import batch_of

    def report(line: str) -> None:
        if not is_quiet:
            print(f"  {line}", file=sys.stderr, flush=True)

    shape = batch_of(config.max_batch_tokens, num_decodes, config.context, config.prompt_tokens)
    print(_describe(shape), flush=True)
    result = Search(profile, shape, time_limit_s=config.time_limit, report=report).run()
    print("\n".join(f"  {line}" for line in _summary(IterationModel(profile), shape, result)), flush=True)
    return result.plan


def _kept_trials(output: Path, profile: Profile, *, is_fresh: bool) -> KeptTrials:
    """Those of an interrupted search for this file; ProfileError if plans of the profile cannot be tried here."""
    from nanoflow.profiler.kept_trials import KeptTrials

    _check_machine(profile)
    kept = KeptTrials(output.with_name(f"{output.name}.trials"), profile)
    if is_fresh:
        kept.forget()
    return kept


def _book(
    profile: Profile, config: SearchConfig, workloads: Sequence[str], kept: KeptTrials | None, *, is_quiet: bool
) -> StoredBook:
    """Simulate the workloads and search plans for each kind of batch; try them if there is where to keep trials."""
    from nanoflow.plan.book import MadeFor, StoredBook
    from nanoflow.search.books import search_book

    iterations = [each for workload in workloads for each in _simulated(profile, config, workload)]
    found = []
    for each in search_book(
        profile,
        iterations,
        max_batch_tokens=config.max_batch_tokens,
        time_limit_s=config.time_limit,
        will_be_tried=kept is not None,
    ):
        found.append(each)
        if not is_quiet:
            print(f"  {_cell(each)}", file=sys.stderr, flush=True)
    if kept is not None:
        found = _measured(profile, found, kept, is_quiet=is_quiet)
    gain = 1.0 / (1.0 - sum(each.saved for each in found))
    how = "predicted" if kept is None else "measured"
    print(f"{how} for all of {', '.join(workloads)}: {gain:.3f}x of sequential", flush=True)
    setup = profile.setup
    made_for = MadeFor(model=profile.model, gpu=setup.gpu, num_gpus=setup.num_gpus)
    return StoredBook(entries=tuple(each.entry for each in found if each.entry is not None), made_for=made_for)


def _check_machine(profile: Profile) -> None:
    """ProfileError if the plans of a profile cannot be tried here."""
    from nanoflow.device.detect import resolve_device, use_device
    from nanoflow.profiler.setup import check_same_machine, detect_setup

    device = resolve_device("auto")
    use_device(device)
    check_same_machine(profile, detect_setup(device))


def _measured(profile: Profile, found: Sequence[FoundPlan], kept: KeptTrials, *, is_quiet: bool) -> list[FoundPlan]:
    """Every plan on the middle one of the batches that it may be for; of each kind the best stays, if it wins.

    Batches that are rare keep what is safely predicted to win.
    """
    from nanoflow.device.detect import resolve_device
    from nanoflow.profiler.iterations import measure_trials
    from nanoflow.search.books import divided

    tried, rare = divided(found)
    wanted = [(each.cell.example, plan) for each in tried for plan in each.plans]
    missing = [key for key in wanted if key not in kept]
    if not is_quiet:
        before = f", {len(wanted) - len(missing)} more were tried before" if len(missing) < len(wanted) else ""
        minutes = len(missing) * _TRIAL_S / 60
        print(f"  {len(missing)} plans to try, about {minutes:.0f} minutes{before}", file=sys.stderr, flush=True)
    trials = measure_trials(profile, missing, device=resolve_device("auto"))
    judged = []
    for each in tried:
        keys = [(each.cell.example, plan) for plan in each.plans]
        while not all(key in kept for key in keys):
            kept.add(next(trials))
        judged.append(each.confirmed([kept[key] for key in keys]))
        if not is_quiet:
            print(f"  {_cell(judged[-1])}", file=sys.stderr, flush=True)
    trusted = [each.trusted for each in rare]
    if not is_quiet:
        print(f"  rare batches: {sum(bool(each.plans) for each in trusted)} plans as predicted", file=sys.stderr)
    return [*judged, *trusted]


def _simulated(profile: Profile, config: SearchConfig, workload: str) -> list[tuple[BatchShape, float]]:
    """Every iteration of a workload, and what it takes sequentially."""
    from nanoflow.bench.batches import batches_of
    from nanoflow.bench.simulation import limits_for
    from nanoflow.bench.workload import draw_lengths
    from nanoflow.search.iteration import IterationModel

    model = IterationModel(profile)
    lengths = draw_lengths(workload, config.num_requests, config.seed)
    limits = limits_for(
        profile,
        model.graph,
        lengths,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    return batches_of(model, lengths, limits, config.seed)


def _cell(found: FoundPlan) -> str:
    """The batches of a cell and what they are worth."""
    cell = found.cell
    (low_share, high_share), (low_keys, high_keys) = cell.decode_share, cell.decode_context
    plan = "sequential" if found.entry is None else f"{found.entry.plan.name} ({found.entry.plan.digest})"
    measured = "" if found.measured_gain is None else f", measured {found.measured_gain:.3f}x"
    return (
        f"{found.part:6.1%} of the time: {cell.min_tokens:,} to {cell.max_tokens:,} tokens, {low_share:.0%} to "
        f"{high_share:.0%} decodes with {low_keys:,.0f} to {high_keys:,.0f} keys: {found.gain:.3f}x{measured}, {plan}"
    )


def _describe(shape: BatchShape) -> str:
    context = shape.decode_context / max(shape.num_decode_tokens, 1)
    return f"{shape.num_tokens:,} tokens, {shape.num_decode_tokens:,} of them decodes with {context:,.0f} keys each"


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
