"""Makes the plan books of the rungs of the ladder for given limits and workloads. All is predicted; no GPU is needed.

`nano-batches` cuts every batch in two on one lane: the cost of splitting, without any overlap. `partition`, `stream`,
`beside` and `inside` have the best plan of that mechanism for each kind of batch, even where it is predicted to lose.
`searched` is what the search chooses under these limits; `nanoflow search` also compares limits and tries plans on the
GPU. From the root of the repository:

    python -m benchmarks.ladder.books --profile benchmarks/results/profile_llama-3-8b_h200.json --limits 8192/2048 \\
        --workloads 1024/512 512/1024 --out books

A book is OUT/MODEL_RUNG_TOKENS-SEQS.json, for all of the workloads; a book that exists is not made again. The output
lists the rungs as `benchmarks.ladder.whole_runs` and `benchmarks.ladder.steady` take them. The book of a mechanism
takes minutes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common.rungs import NANO_BATCHES, read_limits
from nanoflow.cli.options import CommandParser
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.models.presets import preset_name
from nanoflow.plan.book import BookLimits, MadeFor, PlanEntry, StoredBook, load_book
from nanoflow.plan.mechanisms import Measured, Mechanism
from nanoflow.plan.plan import PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.profile.interference import Interference
from nanoflow.profile.table import CostTable, Profile
from nanoflow.search.allocate import Allocation
from nanoflow.search.books import covering_cells, search_book
from nanoflow.search.carry import carry_plan, carrying_runs
from nanoflow.search.divide import divisions
from nanoflow.search.emit import emit
from nanoflow.search.problem import groups_of, make_problem
from nanoflow.search.shapes import entry_of, ranked
from nanoflow.search.structure import Effort, solve_structure
from nanoflow.search.workloads import SimulatedWorkloads
from nanoflow.simulate.iteration import IterationModel, graphs_of

SEARCHED = "searched"
RUNGS = (NANO_BATCHES, "stream", "beside", "partition", "inside", SEARCHED)

# Products compute tiles of this many tokens. Batches of at least two tiles are cut, at the border of a tile.
_TILE = 128
# The defaults of the search (`search/search.py`).
_MAX_STAGES, _NUM_NODES, _TIME_LIMIT_S = 3, 300, 60.0
_GPU_MEMORY_UTILIZATION = EngineConfig().gpu_memory_utilization

Iterations = Sequence[tuple[BatchShape, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the books that do not exist, and print the rung of each."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        profile = Profile.load(args.profile)
        tokens, seqs = read_limits(args.limits)
        paths = {rung: path_of(args.out, profile.model, rung, args.limits) for rung in read_names(args.rungs, profile)}
        make_books(
            profile,
            {rung: path for rung, path in paths.items() if not path.exists()},
            BookLimits(max_batch_tokens=tokens, max_num_seqs=seqs),
            args.workloads,
            num_requests=args.num_requests,
        )
    except ValueError as error:
        parser.error(str(error))
    for rung, path in paths.items():
        if load_book(path).plans:
            print(f"{rung}={path}")
        else:
            print(f"{rung}: {path} has no plan, so this rung would be sequential", file=sys.stderr)
    return 0


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.ladder.books", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="file written by nanoflow profile; names the model")
    parser.add_argument("--workloads", nargs="+", required=True, metavar="WORKLOAD", help="IN/OUT or trace:FILE.csv")
    parser.add_argument("--limits", required=True, metavar="TOKENS/SEQS", help="token budget and requests at once")
    parser.add_argument("--rungs", nargs="+", metavar="RUNG", help=f"{', '.join(RUNGS)} (default: all there are)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the books")
    parser.add_argument(
        "--num-requests",
        type=int,
        default=1500,
        metavar="N",
        help="requests to simulate of each workload (default: 1500)",
    )
    return parser


def path_of(folder: Path, model: str, rung: str, limits: str) -> Path:
    """Path of the book of a rung."""
    name = preset_name(model) or Path(model).name
    return folder / f"{name}_{rung}_{limits.replace('/', '-')}.json"


def read_names(names: Sequence[str] | None, profile: Profile) -> tuple[str, ...]:
    """The rungs to make, in the ladder's order; all for which the profile has pairs if none are named.

    Raises:
        ConfigError: There is no such rung, or the profile has no pairs of its mechanism.
    """
    mechanisms = {pair.mechanism.value for pair in profile.pairs}
    there = [rung for rung in RUNGS if rung in (NANO_BATCHES, SEARCHED) or rung in mechanisms]
    for name in names or ():
        if name not in RUNGS:
            raise ConfigError(f"there is no rung {name!r}; known: {', '.join(RUNGS)}")
        if name not in there:
            raise ConfigError(f"the profile has no pairs of {name}; it has {', '.join(there)}")
    return tuple(rung for rung in there if not names or rung in names)


def make_books(
    profile: Profile, paths: Mapping[str, Path], limits: BookLimits, workloads: Sequence[str], *, num_requests: int
) -> None:
    """Write a book for each rung, for all workloads together.

    Args:
        profile: Measured times of operations.
        paths: Path by rung; existing files are replaced.
        limits: Limits under which the plans will run; stored in the books.
        workloads: Names of workloads (`draw_lengths`).
        num_requests: Requests to simulate of each workload.

    Raises:
        ConfigError: A workload is invalid, or the memory cannot hold its longest request.
    """
    simulated = SimulatedWorkloads(
        profile, workloads, num_requests=num_requests, seed=0, gpu_memory_utilization=_GPU_MEMORY_UTILIZATION
    )
    iterations = simulated.batches(limits) if any(rung != NANO_BATCHES for rung in paths) else []
    made_for = MadeFor(model=profile.model, gpu=profile.setup.gpu, num_gpus=profile.setup.num_gpus)
    for rung, path in paths.items():
        entries = tuple(entries_of(profile, rung, iterations, limits.max_batch_tokens))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(StoredBook(entries=entries, made_for=made_for, limits=limits).to_json())


def entries_of(profile: Profile, rung: str, iterations: Iterations, max_batch_tokens: int) -> Iterator[PlanEntry]:
    """The entries of the book of a rung.

    Args:
        profile: Measured times of operations.
        rung: Its name; the name of a mechanism unless it is nano-batches or searched.
        iterations: Every iteration of sequential runs, with its time in seconds; not needed for nano-batches.
        max_batch_tokens: The token budget.
    """
    if rung == NANO_BATCHES:
        yield from nano_batches(graphs_of(profile)[0], max_batch_tokens)
    elif rung == SEARCHED:
        found = search_book(profile, iterations, max_batch_tokens=max_batch_tokens, time_limit_s=_TIME_LIMIT_S)
        yield from (each.entry for each in found if each.entry is not None)
    else:
        yield from forced(profile, Mechanism(rung), iterations, max_batch_tokens)


def nano_batches(graph: OpGraph, max_batch_tokens: int) -> Iterator[PlanEntry]:
    """Every batch of two tiles or more is cut near the middle; sizes under one plan differ by an eighth at most."""
    smallest, size = 2 * _TILE, 2 * _TILE
    while smallest <= max_batch_tokens:
        size = min(size, max_batch_tokens)
        plan = nanobatch_plan(graph, size, [middle_of(size)], f"nano-batches of {middle_of(size)}")
        yield PlanEntry(plan=plan, min_tokens=smallest, max_tokens=size)
        smallest, size = size + 1, size + max(size // 8 // _TILE, 1) * _TILE


def middle_of(num_tokens: int) -> int:
    """The multiple of a tile that is nearest to half of the tokens."""
    return max(round(num_tokens / 2 / _TILE), 1) * _TILE


def forced(
    profile: Profile,
    mechanism: Mechanism,
    iterations: Iterations,
    max_batch_tokens: int,
) -> Iterator[PlanEntry]:
    """For each cell the plan of a mechanism with the largest predicted gain, even if it is below 1."""
    model = IterationModel(profile)
    plans: dict[str, PipelinePlan] = {}
    for cell in covering_cells(iterations, max_batch_tokens):
        plans |= {plan.digest: plan for plan in plans_of(profile, mechanism, cell.median_batch)}
        best = ranked(plans.values(), cell, model.iteration_s)
        if best:
            yield entry_of(best[0][1], cell)


def plans_of(profile: Profile, mechanism: Mechanism, shape: BatchShape) -> Iterator[PipelinePlan]:
    """A plan for each way to divide the device in two once, or for each run of products that carry.

    On plain streams a share is a result of the measurement and cannot be set; here it is treated as one that can.
    """
    graph = graphs_of(profile)[0]
    middle = middle_of(shape.num_tokens)
    if not 0.2 <= middle / shape.num_tokens <= 0.8:
        return
    if mechanism.traits.measured is Measured.CARRIED:
        shares = Interference(profile, graph).carry.shares
        for share, carrying in itertools.product(shares, carrying_runs(graph)):
            yield carry_plan(graph, shape.num_tokens, middle, share, carrying)
        return
    splits = {group.name: (middle,) for group in groups_of(graph)}
    problem = make_problem(graph, CostTable(profile, graph), shape, splits)
    for division in divisions(problem, Interference(_only(profile, mechanism), graph), [mechanism]):
        effort = Effort(num_nodes=_NUM_NODES, time_limit_s=_TIME_LIMIT_S)
        schedule = solve_structure(division.problem, max_stages=_MAX_STAGES, effort=effort)
        if schedule is not None:
            allocation = Allocation(mechanism=mechanism, schedule=schedule, shares=division.shares)
            yield emit(division.problem, allocation, f"{division.name}, 2 nano-batches at {middle}")


def _only(profile: Profile, mechanism: Mechanism) -> Profile:
    """The profile with pairs of one mechanism."""
    return replace(profile, pairs=tuple(pair for pair in profile.pairs if pair.mechanism is mechanism))


if __name__ == "__main__":
    sys.exit(main())
