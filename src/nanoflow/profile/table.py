"""A profile: what each operation takes on one kind of GPU, alone and beside another, as a file and as a table.

Whoever measured it (`profiler/`) or estimated it (`estimate.py`) writes it; search and simulation read it through
`CostTable`. A product is never interpolated between two measured sizes, for its time climbs in waves: it costs what
the next larger measured size costs. What two lanes do to each other is `interference.py`'s.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from nanoflow.errors import brief_line
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import KvType, LinearDims
from nanoflow.plan.mechanisms import Mechanism

PROFILE_VERSION = 1
SAMPLING = "sampling"


class ProfileError(ValueError):
    """A profile cannot be read or used; one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where a profile comes from.

    Attributes:
        gpu: The GPU's name as its driver says it, or the full name of an estimated one.
        num_gpus: GPUs that share the model (tensor-parallel degree).
        memory_bytes: Of one GPU.
        num_sms: Multiprocessors of one GPU; None if unknown.
        power_limit_w, static_power_w: Of one GPU; None if unknown.
        driver: None if it was estimated.
        software: Name to version.
        is_measured: False for an estimate from data sheets.
    """

    gpu: str
    num_gpus: int = 1
    memory_bytes: float
    num_sms: int | None = None
    power_limit_w: float | None = None
    static_power_w: float | None = None
    driver: str | None = None
    software: dict[str, str] = field(default_factory=dict)
    is_measured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One operation alone, on all or a part of the device, sustained.

    Attributes:
        operation: Its key in the graph (its name, and where layers are of several kinds its variant), or SAMPLING.
        num_tokens: Tokens (rows, after the last layer) it works on.
        context: Keys that each token of an attention sees, on average; 0 for other operations.
        mechanism, share: The lane; everything on the whole device by default.
        time_s: Of one call in one layer.
        energy_j: Of all GPUs' share in it, static power included; None if unknown. For one GPU.
        spread: Standard deviation over mean.
        clock_mhz: The multiprocessors'; None if unknown.
    """

    operation: str
    num_tokens: int
    context: float = 0.0
    mechanism: Mechanism = Mechanism.WHOLE
    share: float = 1.0
    time_s: float
    energy_j: float | None = None
    spread: float = 0.0
    clock_mhz: float | None = None

    @property
    def is_on_whole_device(self) -> bool:
        """Whether it had all of the device; else a share of it."""
        return self.mechanism is Mechanism.WHOLE

    @property
    def key(self) -> tuple[str, int, float, Mechanism, float]:
        """What was measured."""
        return (self.operation, self.num_tokens, self.context, self.mechanism, self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPoint:
    """Two operations side by side, each repeated until both have run the whole window.

    Attributes:
        first, second: Names of operations; the first is the one bound by compute, or by memory beside a collective.
        first_tokens, second_tokens, second_context: Their sizes. Where the first one carries the second,
            a second context of 0 stands for nothing to carry: the first one ran in the kernel that can carry, and could
            have carried the attention of so many tokens.
        mechanism: Of the lanes.
        share: The first one's R; the second has what is left.
        first_performance, second_performance: P: time alone on the whole device / time beside the other.
        energy_ratio: Energy of the pair / energy of the same work one after the other; None if unknown.
        power_w: Mean over the window; None if unknown.
    """

    first: str
    second: str
    first_tokens: int
    second_tokens: int
    second_context: float = 0.0
    mechanism: Mechanism
    share: float
    first_performance: float
    second_performance: float
    energy_ratio: float | None = None
    power_w: float | None = None

    @property
    def key(self) -> tuple[str, str, int, int, float, Mechanism, float]:
        """What was measured."""
        return (
            self.first,
            self.second,
            self.first_tokens,
            self.second_tokens,
            self.second_context,
            self.mechanism,
            self.share,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a model's operations take on a machine.

    Attributes:
        model: What the user called it: a folder or `preset:NAME`.
        config: The model's config.json, so that its graph can be built anywhere.
        is_fused: The graph is the one with SwiGLU in the product before it (`graph/fuse.py`).
        is_fp8: The graph is the one with products in FP8 (`graph/fp8.py`).
        is_mxfp4: The graph is the one with experts in MXFP4 (`graph/mxfp4.py`).
        expert_skew: How unevenly tokens chose experts (`graph.experts.Routing.skew`).
        page_size: Tokens a page of the KV cache.
        dtype: Of weights and activations.
        kv_cache_dtype: Type of keys and values in the KV cache.
        setup: Where.
        launch_gap_s: Time between an operation and the next one on the same lane, not in any point.
        iteration_gap_s: The same between two iterations.
        host_link_bytes_per_s: Rate of copies between the device and pinned host memory, one direction; None if nobody
            measured it (`host_link.py`).
        points, pairs: The measurements.
    """

    model: str
    config: dict[str, Any]
    is_fused: bool = False
    is_fp8: bool = False
    is_mxfp4: bool = False
    expert_skew: float = 0.0
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_cache_dtype: KvType = KvType.MODEL
    setup: Setup
    launch_gap_s: float = 0.0
    iteration_gap_s: float = 0.0
    host_link_bytes_per_s: float | None = None
    points: tuple[Point, ...] = ()
    pairs: tuple[PairPoint, ...] = ()
    version: int = PROFILE_VERSION

    def to_json(self) -> bytes:
        """The profile as a JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @staticmethod
    def from_json(document: bytes) -> Profile:
        """The profile in a JSON document; `ProfileError` says what is wrong with it."""
        try:
            profile = msgspec.json.decode(document, type=Profile)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProfileError(f"not a profile: {brief_line(error)}") from None
        if profile.version != PROFILE_VERSION:
            raise ProfileError(f"the profile has version {profile.version}, this nanoflow reads {PROFILE_VERSION}")
        return profile

    @staticmethod
    def load(path: Path) -> Profile:
        """The profile in a file; `ProfileError` if it cannot be read or is none."""
        try:
            return Profile.from_json(path.read_bytes())
        except OSError as error:
            raise ProfileError(f"cannot read profile {path}: {error.strerror}") from None


def write_profile(profile: Profile, path: Path) -> None:
    """Replace the file at once: an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(profile.to_json())
    new.replace(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of one operation, and its energy on one GPU; None if unknown."""

    time_s: float
    energy_j: float | None = None

    def __add__(self, other: Cost) -> Cost:
        known = None not in (self.energy_j, other.energy_j)
        return Cost(
            time_s=self.time_s + other.time_s,
            energy_j=self.energy_j + other.energy_j if known else None,  # type: ignore[operator]
        )

    def times(self, factor: float) -> Cost:
        """So many of it."""
        return Cost(time_s=self.time_s * factor, energy_j=None if self.energy_j is None else self.energy_j * factor)


NO_COST = Cost(time_s=0.0, energy_j=0.0)


class CostTable:
    """Looks up what an operation costs alone on the whole device, at any size.

    Raises:
        ProfileError: An operation of the graph was never measured.
    """

    def __init__(self, profile: Profile, graph: OpGraph) -> None:
        self.profile = profile
        operations = tuple(graph.operations())
        self._in_waves = {op.key for op in operations if isinstance(op.dims, LinearDims)}
        grouped: dict[str, dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
        for point in profile.points:
            if point.is_on_whole_device:
                grouped[point.operation][point.num_tokens].append(point)
        self._sizes = {name: sorted(by_size) for name, by_size in grouped.items()}
        self._points = {
            name: {size: sorted(points, key=lambda point: point.context) for size, points in by_size.items()}
            for name, by_size in grouped.items()
        }
        missing = [op.key for op in operations if op.key not in self._sizes]
        if missing:
            raise ProfileError(f"the profile of {profile.model} has no point of {', '.join(missing)}")

    def cost(self, operation: str, num_tokens: int, context: float = 0.0) -> Cost:
        """The cost of an operation on so many tokens, each of which sees so many keys; nothing for no tokens."""
        if num_tokens <= 0:
            return NO_COST
        sizes = self._sizes[operation]
        whole, rest = divmod(num_tokens, sizes[-1])
        if whole and num_tokens > sizes[-1]:
            # Beyond the largest measured size, as often as it takes.
            return self._within(operation, sizes[-1], context).times(whole) + self.cost(operation, rest, context)
        return self._within(operation, num_tokens, context)

    def has(self, operation: str) -> bool:
        """True if there is a point of it."""
        return operation in self._sizes

    def _within(self, operation: str, num_tokens: int, context: float) -> Cost:
        sizes = self._sizes[operation]
        place = bisect.bisect_left(sizes, num_tokens)
        above = self._at(operation, sizes[place], context)
        if operation in self._in_waves or place == 0 or sizes[place] == num_tokens:
            return above
        below = self._at(operation, sizes[place - 1], context)
        return _between(below, above, (num_tokens - sizes[place - 1]) / (sizes[place] - sizes[place - 1]))

    def _at(self, operation: str, size: int, context: float) -> Cost:
        """At a measured size; linear in the context, and beyond the measured ones as between the last two."""
        points = self._points[operation][size]
        costs = [Cost(time_s=point.time_s, energy_j=point.energy_j) for point in points]
        if len(points) == 1:
            # One context is measured: an attention takes time in proportion to it.
            return costs[0].times(context / points[0].context) if points[0].context else costs[0]
        contexts = [point.context for point in points]
        place = min(max(bisect.bisect_left(contexts, context), 1), len(points) - 1)
        part = (context - contexts[place - 1]) / (contexts[place] - contexts[place - 1])
        return _between(costs[place - 1], costs[place], max(part, 0.0) if place == 1 else part)


def _between(low: Cost, high: Cost, part: float) -> Cost:
    return low.times(1.0 - part) + high.times(part)


def merged(profile: Profile, points: Sequence[Point], pairs: Sequence[PairPoint] = ()) -> Profile:
    """The profile with further measurements; a newer one of the same thing replaces the older."""
    by_key = {point.key: point for point in (*profile.points, *points)}
    pair_by_key = {pair.key: pair for pair in (*profile.pairs, *pairs)}
    return replace(profile, points=tuple(by_key.values()), pairs=tuple(pair_by_key.values()))
