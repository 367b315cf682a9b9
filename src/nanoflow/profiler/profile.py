"""A whole profile of a model on this machine: everything that is missing in its file, measured and written there.

The file is replaced at once every few points, so a run that is interrupted is continued by the next one. What is
measured stands in `work.py` and `pairs.py`; what a profile is, in `profile/table.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nanoflow.graph.fp8 import in_fp8
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.graph.mxfp4 import in_mxfp4
from nanoflow.graph.operation import KvType, OpKind
from nanoflow.kernels.dispatch import kernels_for
from nanoflow.models.config_json import parse
from nanoflow.models.moe import with_skew
from nanoflow.models.registry import build_graph
from nanoflow.plan.mechanisms import Mechanism, ShareOrigin
from nanoflow.profile.table import PairPoint, Point, Profile, ProfileError, Setup, merged, write_profile
from nanoflow.profiler.alone import measure_alone
from nanoflow.profiler.carry import CarryTask, carry_tasks, measure_carry
from nanoflow.profiler.host_link import host_link_bytes_per_s
from nanoflow.profiler.layer import is_measured, measure_layer
from nanoflow.profiler.pairs import PairTask, PartTask, measure_pairs, measure_parts, pair_tasks, part_tasks
from nanoflow.profiler.setup import check_same_software, detect_setup, static_power_w
from nanoflow.profiler.site import Site
from nanoflow.profiler.sustained import SPANS, Span
from nanoflow.profiler.work import Sizes, Task, num_chunks, tasks

_WRITE_EVERY = 5
# Between two iterations; benchmarks/engine/iteration.py measures 86 to 90 us on one H200.
ITERATION_GAP_S = 100e-6
# What a point takes beside settling and measuring: tensors, a capture, compilation now and then.
_PREPARE_S = {"cuda": 0.1, "cpu": 0.02}
# A pair is measured alone and together, and half of the pairs share what is measured alone.
_PAIR_SPANS = 1.5
# Products inside which attention runs are measured alone, attention too, and both together.
_CARRY_SPANS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a profile still lacks."""

    alone: Sequence[Task]
    parts: Sequence[PartTask]
    pairs: Sequence[PairTask]
    carried: Sequence[CarryTask]

    def __len__(self) -> int:
        return len(self.alone) + len(self.parts) + len(self.pairs) + len(self.carried)

    def estimate_s(self, device: torch.device, span: Span) -> float:
        """About how long it takes."""
        spans = len(self.alone) + len(self.parts) + _PAIR_SPANS * len(self.pairs) + _CARRY_SPANS * len(self.carried)
        return spans * (span.settle_s + span.measure_s + _PREPARE_S[device.type])


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A profile to be made.

    Attributes:
        site: Where and with what to measure; its graph is fused where that is what runs.
        sizes: What to measure.
        profile: What there is so far.
        span: How long to look at each point.
        only: "alone", "pairs" or the name of a mechanism, whose pairs then, to measure just these; None for all.
    """

    site: Site
    sizes: Sizes
    profile: Profile
    span: Span
    only: str | None = None

    @property
    def has_alone(self) -> bool:
        """Whether operations are measured alone."""
        return self.only in (None, "alone")

    @property
    def mechanisms(self) -> frozenset[Mechanism]:
        """Whose pairs are measured."""
        if self.only == "alone":
            return frozenset()
        return frozenset(Mechanism) if self.only in (None, "pairs") else frozenset({Mechanism(self.only)})

    def wanted(self) -> Wanted:
        """What the profile lacks."""
        points = {point.key for point in self.profile.points}
        pairs = {_identity(pair) for pair in self.profile.pairs}
        num_sms, budget = self.profile.setup.num_sms or 0, self.sizes.max_tokens
        alone = tasks(self.site, self.sizes) if self.has_alone else []
        parts = [part for part in part_tasks(self.site, budget, num_sms) if part.mechanism in self.mechanisms]
        beside = [pair for pair in pair_tasks(self.site, budget, num_sms) if pair.mechanism in self.mechanisms]
        carried = [task for task in carry_tasks(self.site, self.sizes, num_sms) if task.mechanism in self.mechanisms]
        return Wanted(
            alone=[task for task in alone if task.key not in points],
            parts=[part for part in parts if _part_key(part, num_sms) not in points],
            pairs=[pair for pair in beside if _pair_identity(pair, num_sms) not in pairs],
            carried=[task for task in carried if task.key not in pairs],
        )


def new_job(
    model: str,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    path: Path,
    kv_type: KvType = KvType.MODEL,
    page_size: int = 16,
    is_quick: bool = False,
    is_fresh: bool = False,
    only: str | None = None,
    is_fp8: bool = False,
    is_mxfp4: bool = False,
    expert_skew: float = 0.0,
) -> Job:
    """A profile to be begun, or to be continued if its file is there and `is_fresh` is not asked for.

    Args:
        model: What the user called it.
        config: Its config.json.
        device, dtype: Where and in which type to measure.
        kv_type: Type of keys and values in the cache.
        sizes: What to measure.
        path: The profile's file.
        page_size: Tokens a page.
        is_quick: Look at each point half as long, after as long a time to settle.
        is_fresh: Begin anew whatever there is.
        only: As `Job` has it.
        is_fp8: Whether products of layers multiply FP8.
        is_mxfp4: Whether weights of experts are in MXFP4.
        expert_skew: How unevenly tokens choose experts.

    Raises:
        ProfileError: The file is no profile, or of another model, type or machine.
    """
    graph = with_skew(build_graph(parse(config), None).with_kv_type(kv_type), expert_skew)
    graph = in_fp8(graph) if is_fp8 else graph
    graph = in_mxfp4(graph) if is_mxfp4 else graph
    is_fused = OpKind.LINEAR_SWIGLU in kernels_for(device, dtype, graph.layer_operations)
    site = Site(graph=fuse_swiglu(graph) if is_fused else graph, device=device, dtype=dtype, page_size=page_size)
    blank = Profile(
        model=model,
        config=json.loads(json.dumps(dict(config))),
        is_fused=is_fused,
        is_fp8=is_fp8,
        is_mxfp4=is_mxfp4,
        expert_skew=expert_skew,
        page_size=page_size,
        dtype=str(dtype).removeprefix("torch."),
        kv_cache_dtype=kv_type,
        setup=detect_setup(device),
        iteration_gap_s=ITERATION_GAP_S,
    )
    profile = blank if is_fresh or not path.exists() else _continued(path, blank)
    return Job(site=site, sizes=sizes, profile=profile, span=_span(device, is_quick=is_quick), only=only)


def _span(device: torch.device, *, is_quick: bool) -> Span:
    """A quick look settles as long: a GPU that has not draws more than its limit, which flatters pairs most."""
    span = SPANS[device.type]
    return replace(span, measure_s=span.measure_s / 2) if is_quick else span


def run_job(job: Job, path: Path, *, show_progress: bool = False) -> Profile:
    """Measure what is missing and write the profile to its file as it grows; the whole profile."""
    from tqdm import tqdm

    profile, fresh = _with_machine(job), list[Point | PairPoint]()
    wanted = job.wanted()
    with tqdm(_measure(job, wanted), total=len(wanted), unit="point", disable=not show_progress) as bar:
        for found in bar:
            bar.set_postfix_str(found.operation if isinstance(found, Point) else f"{found.first} + {found.second}")
            fresh.append(found)
            if len(fresh) == _WRITE_EVERY:
                profile = _written(profile, fresh, path)
                fresh.clear()
    profile = _written(profile, fresh, path)
    gap_s = launch_gap_s(job, profile) if job.has_alone else None
    if gap_s is not None:
        profile = _written(replace(profile, launch_gap_s=gap_s), (), path)
    return profile


@torch.inference_mode()
def launch_gap_s(job: Job, profile: Profile) -> float | None:
    """Time between two operations of a layer: what a layer's sequence takes beyond its points; None without points."""
    num_tokens, chunk = _gap_tokens(job), job.sizes.prefill_chunk
    if num_tokens is None:
        return None
    graph = job.site.graph
    of_size = {
        point.operation: point.time_s
        for point in sorted(profile.points, key=lambda point: -point.context)
        if point.is_on_whole_device and point.num_tokens == num_tokens
    }
    keys = [op.key for kind in graph.layers for op in kind.operations if is_measured(graph, op)]
    if not of_size.keys() >= set(keys):
        return None
    layer_s = measure_layer(job.site, num_tokens, num_chunks(num_tokens, chunk), job.span)
    points_s = sum(of_size[key] for key in keys) / graph.num_layers
    return max(layer_s - points_s, 0.0) / (len(keys) / graph.num_layers)


def _gap_tokens(job: Job) -> int | None:
    """The largest number of tokens, 1,024 at most, at which all of a layer's operations have points."""
    layer = [op for op in job.site.graph.layer_operations if op.kind is not OpKind.DECODE_ATTENTION]
    wanted = tasks(job.site, job.sizes)
    counts = [{task.num_tokens for task in wanted if task.operation == op.key} for op in layer]
    return max((count for count in set.intersection(*counts) if count <= 1024), default=None)


def _measure(job: Job, wanted: Wanted) -> Iterator[Point | PairPoint]:
    return chain(
        measure_alone(job.site, wanted.alone, job.span),
        measure_parts(job.site, wanted.parts, job.span),
        measure_pairs(job.site, wanted.pairs, job.span),
        measure_carry(job.site, wanted.carried, job.span),
    )


def _with_machine(job: Job) -> Profile:
    """The profile with what is of the machine alone: its static power, and its link to the host."""
    profile, setup, device = job.profile, job.profile.setup, job.site.device
    if setup.static_power_w is None:
        profile = replace(profile, setup=replace(setup, static_power_w=static_power_w(device, job.span)))
    if profile.host_link_bytes_per_s is None:
        profile = replace(profile, host_link_bytes_per_s=host_link_bytes_per_s(device, job.span))
    return profile


def _written(profile: Profile, found: Sequence[Point | PairPoint], path: Path) -> Profile:
    points = [item for item in found if isinstance(item, Point)]
    grown = merged(profile, points, [item for item in found if isinstance(item, PairPoint)])
    write_profile(grown, path)
    return grown


def _continued(path: Path, blank: Profile) -> Profile:
    """The profile in a file, if it can be continued as this one."""
    stored = Profile.load(path)
    for name in ("config", "dtype", "kv_cache_dtype", "page_size", "is_fused", "is_fp8", "is_mxfp4", "expert_skew"):
        there, here = getattr(stored, name), getattr(blank, name)
        if there != here:
            both = f"{stored.model}, not of {blank.model}" if name == "config" else f"{name} {there}, not {here}"
            raise ProfileError(f"{path} is a profile of {both}: name another file or give --fresh")
    try:
        check_same_software(stored, blank.setup)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}; name another file or give --fresh") from None
    return stored


def _part_key(part: PartTask, num_sms: int) -> tuple[object, ...]:
    share = part.num_sms / num_sms
    return (part.task.operation, part.task.num_tokens, part.task.context, part.mechanism, share)


def _identity(pair: PairPoint) -> tuple[object, ...]:
    """What was measured; a share that could not be asked for does not tell two pairs apart."""
    is_asked_for = pair.mechanism.traits.share_origin is ShareOrigin.ASKED_FOR
    return (*pair.key[:-1], pair.share if is_asked_for else None)


def _pair_identity(pair: PairTask, num_sms: int) -> tuple[object, ...]:
    first, second = pair.first, pair.second
    sizes = (first.operation, second.operation, first.num_tokens, second.num_tokens, second.context)
    share = None if pair.second_sms is None else (num_sms - pair.second_sms) / num_sms
    return (*sizes, pair.mechanism, share)


def setup_line(setup: Setup) -> str:
    """A machine in one line."""
    power = "" if setup.power_limit_w is None else f", {setup.power_limit_w:.0f} W"
    return f"{setup.num_gpus} x {setup.gpu}, {setup.memory_bytes / 2**30:.0f} GiB{power}"
