"""The batches of a server with enough to do, where requests come as others leave, and what each takes, by simulation.

Plans are searched for these and for the batches of requests that begin together and end together, which is what
`serving.py` simulates. `search/workloads.py` puts both together.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoflow.graph.operation import BatchShape
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.simulate.iteration import IterationModel, Recorded
from nanoflow.simulate.serving import Cluster, simulate
from nanoflow.workload import Lengths, under_way


def steady_batches_of(
    model: IterationModel, lengths: Sequence[Lengths], limits: SchedulerLimits, seed: int
) -> list[tuple[BatchShape, float]]:
    """Every iteration of a run that begins with requests under way, and its time in seconds.

    Args:
        model: What an iteration takes.
        lengths: Of the requests, which come after those under way.
        limits: Of the scheduler.
        seed: Of the requests that are under way.

    Raises:
        ConfigError: There is no request.
    """
    recorded = Recorded(model)
    num_keys = limits.num_pages * limits.page_size
    first = under_way(lengths, num_keys, limits.max_num_seqs, limits.max_batch_tokens, seed) if lengths else []
    run = [*first, *lengths]
    simulate(Cluster(limits=limits, iterations=recorded, num_replicas=1), run, [0.0] * len(run))
    return recorded.iterations
