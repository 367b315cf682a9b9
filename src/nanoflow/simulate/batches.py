"""The batches that requests make an engine run, and what each takes, by simulation: what plans are searched for.

Two runs have between them what an engine meets: all requests at once, which begin together and end together, and
requests that come as others leave, as a server with enough to do has them.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.graph.operation import BatchShape
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.simulate.iteration import IterationModel, Recorded
from nanoflow.simulate.serving import Cluster, simulate
from nanoflow.workload import Lengths, under_way


def batches_of(
    model: IterationModel, lengths: Sequence[Lengths], limits: SchedulerLimits, seed: int
) -> list[tuple[BatchShape, float]]:
    """Every iteration of both runs, and its time in seconds.

    Args:
        model: What an iteration takes.
        lengths: Of the requests.
        limits: Of the scheduler.
        seed: Of the requests that are under way when the second run begins.

    Raises:
        ConfigError: There is no request.
    """
    recorded = Recorded(model)
    num_keys = limits.num_pages * limits.page_size
    first = under_way(lengths, num_keys, limits.max_num_seqs, limits.max_batch_tokens, seed) if lengths else []
    for run in (lengths, [*first, *lengths]):
        simulate(Cluster(limits=limits, iterations=recorded, num_replicas=1), run, [0.0] * len(run))
    return recorded.iterations
