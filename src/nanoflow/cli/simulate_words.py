"""What `nanoflow simulate` says of a run, for people and as JSON; options and runs are in `simulate.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoflow.profile.table import Profile
    from nanoflow.simulate.iteration import IterationModel
    from nanoflow.simulate.serving import SimulatedRun
    from nanoflow.simulate.talking import SimulatedTalk


def describe_iteration(model: IterationModel, num_tokens: int, num_decodes: int, context: float) -> Iterator[str]:
    """One iteration."""
    from nanoflow.search.shapes import batch_of

    prediction = model.predict(batch_of(num_tokens, num_decodes, context, context))
    energy = prediction.energy_per_token_j
    yield f"{num_tokens:,} tokens, {num_decodes:,} of them decodes with {context:,.0f} keys each"
    yield f"  plan        {prediction.simulation.timeline.name}"
    yield f"  layer       {prediction.makespan_s * 1e6:,.1f} us"
    yield f"  iteration   {prediction.iteration_s * 1e3:,.2f} ms"
    if prediction.copies_s:
        yield f"  copies      {prediction.copies_s * 1e3:,.2f} ms beside it"
    yield f"  throughput  {prediction.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    yield f"  energy      {'not known' if energy is None else f'{energy * 1e3:,.1f} mJ/token'}"


def describe_run(profile: Profile, what: str, result: SimulatedRun) -> Iterator[str]:
    """A whole run.

    Args:
        profile: Where.
        what: Workload and arrivals.
        result: The run.
    """
    metrics = result.metrics
    kind = "measured" if profile.setup.is_measured else "estimated"
    gpus = f"{result.num_gpus:,} x {profile.setup.gpu}"
    yield f"{profile.model} on {gpus} ({kind} profile), {result.num_replicas:,} replicas"
    yield what
    yield f"  duration      {metrics.duration_s:,.1f} s, {result.num_iterations:,} iterations"
    yield f"  throughput    {metrics.total_tokens_per_s:,.0f} tokens/s, {result.tokens_per_s_per_gpu:,.0f} a GPU"
    yield f"  requests      {metrics.requests_per_s:,.2f} /s"
    rows = {"TTFT": metrics.ttft_s, "TPOT": metrics.tpot_s, "latency/token": metrics.normalized_latency_s}
    for name, found in rows.items():
        if found is not None:
            shown = (found.mean, found.p50, found.p90, found.p99)
            mean, p50, p90, p99 = (f"{value * 1e3:,.1f}" for value in shown)
            yield f"  {name:<14}mean {mean} ms, p50 {p50}, p90 {p90}, p99 {p99}"
    energy = metrics.energy_per_token_j
    yield f"  energy        {'not known' if energy is None else f'{energy * 1e3:,.1f} mJ/token'}"
    yield f"  batch         {result.mean_batch_tokens:,.0f} tokens on average"
    yield f"  KV cache      {result.peak_page_share:.0%} at most, {result.num_preemptions:,} preemptions"
    for name, counts in result.tiers.items():
        if name != "device":
            yield (
                f"  {f'KV {name}':<14}{counts.hits:,} of {counts.queries:,} tokens found, "
                f"{counts.stored_bytes / 2**30:,.1f} GiB stored, {counts.loaded_bytes / 2**30:,.1f} GiB loaded"
            )
    if len(result.tiers) > 1:
        yield f"  loads         {result.num_loads:,}"


def document(
    profile: Profile, options: Mapping[str, Any], result: SimulatedRun, talk: SimulatedTalk | None = None
) -> dict[str, object]:
    """The result and its inputs as JSON; infinite rates are texts, which JSON lacks as numbers.

    Conversations have what the record of `nanoflow bench rounds` has for a repeat, under `rounds`.
    """
    return {
        "simulation": {name: _jsonable(value) for name, value in options.items()},
        "model": profile.model,
        "setup": dataclasses.asdict(profile.setup),
        "result": dataclasses.asdict(result),
        **({} if talk is None else {"rounds": dataclasses.asdict(talk.metrics)}),
    }


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and math.isinf(value) else value
