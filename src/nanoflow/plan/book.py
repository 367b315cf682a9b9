"""The plan book: which pipeline plan to run for a batch of a given shape. The sequential plan is the fallback.

Rule: the first entry that fits is taken; where none does, which is where splitting does not pay, the fallback. A file
has the entries alone (`StoredBook`), for the fallback is made for the engine's own token budget. How entries are found
is not known here, nor which GPU runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nanoflow.errors import brief_line
from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.plan.plan import PipelinePlan, PlanError

BOOK_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """A plan and the batches it is for; both ends of every range are included.

    A plan cuts the dense batch at absolute places: a batch much smaller than the plan is split unevenly, so an entry's
    range of sizes should be narrow.

    Attributes:
        plan: The plan.
        min_tokens, max_tokens: Size of the dense batch; no more than the plan has room for.
        min_decode_share, max_decode_share: Decode tokens as a part of all tokens.
        min_decode_context, max_decode_context: Keys that a decode token attends to, on average; 0 without decodes.
            No upper end if None.
        min_keys, max_keys: The same for each token of the batch: keys of all decodes / tokens.

    Raises:
        PlanError: A range is empty or impossible, or larger than the plan.
    """

    plan: PipelinePlan
    min_tokens: int
    max_tokens: int
    min_decode_share: float = 0.0
    max_decode_share: float = 1.0
    min_decode_context: float = 0.0
    max_decode_context: float | None = None
    min_keys: float = 0.0
    max_keys: float | None = None

    def __post_init__(self) -> None:
        name = self.plan.name
        if self.max_tokens > self.plan.num_tokens:
            raise PlanError(f"plan {name!r} is for {self.plan.num_tokens} tokens, not for {self.max_tokens}")
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise PlanError(f"plan {name!r}: no batch has {self.min_tokens} to {self.max_tokens} tokens")
        low, high = self.min_decode_share, self.max_decode_share
        if not 0 <= low <= high <= 1:
            raise PlanError(f"plan {name!r}: no batch has a decode share of {low:g} to {high:g}")
        for what, least, most in (
            ("a mean decode context", self.min_decode_context, self.max_decode_context),
            ("keys a token", self.min_keys, self.max_keys),
        ):
            if least < 0 or (most is not None and most < least):
                raise PlanError(f"plan {name!r}: no batch has {what} of {least:g} to {most}")

    def fits(self, shape: BatchShape) -> bool:
        """True if the plan is meant for such a batch."""
        tokens, decodes = shape.num_tokens, shape.num_decode_tokens
        if not self.min_tokens <= tokens <= self.max_tokens:
            return False
        context = shape.decode_context / decodes if decodes else 0.0
        return (
            self.min_decode_share <= decodes / tokens <= self.max_decode_share
            and _is_within(context, self.min_decode_context, self.max_decode_context)
            and _is_within(shape.decode_context / tokens, self.min_keys, self.max_keys)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBook:
    """Plans by batch shape.

    Attributes:
        fallback: Runs any batch within the token budget (the sequential plan).
        entries: The first that fits is taken; they may overlap.
    """

    fallback: PipelinePlan
    entries: tuple[PlanEntry, ...] = ()

    @property
    def plans(self) -> tuple[PipelinePlan, ...]:
        """Every plan in the book once, the fallback first."""
        return _distinct([self.fallback, *(entry.plan for entry in self.entries)])

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the entries, whatever the token budget: those of the stored book."""
        return _digest(self.entries)

    def choose(self, shape: BatchShape) -> PipelinePlan:
        """The plan to run for a batch of this shape: of the first entry that fits, or the fallback."""
        for entry in self.entries:
            if entry.fits(shape):
                return entry.plan
        return self.fallback


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeFor:
    """What the plans of a book were searched for.

    Attributes:
        model: As in the profile: a folder or `preset:NAME`.
        gpu: The GPU's name as its driver says it.
        num_gpus: GPUs that share the model.
    """

    model: str
    gpu: str
    num_gpus: int = 1

    @property
    def hardware(self) -> str:
        """Number and name of the GPUs."""
        return f"{self.num_gpus} x {self.gpu}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BookLimits:
    """Limits under which a book's plans were found to be fastest; an engine takes them where its user gives none.

    Attributes:
        max_batch_tokens: Token budget of an iteration.
        max_num_seqs: Most requests that run at once.
    """

    max_batch_tokens: int
    max_num_seqs: int

    def __str__(self) -> str:
        return f"{self.max_batch_tokens:,} tokens, {self.max_num_seqs:,} requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadPrediction:
    """What the search predicts for a whole run of a workload, prompt and output tokens a second and GPU.

    Attributes:
        workload: As the user named it; of a trace the file's name.
        num_requests: All at once.
        sequential_tokens_per_s: Without plans, under the limits that are best for that.
        tokens_per_s: With the book's plans, under the book's limits.
    """

    workload: str
    num_requests: int
    sequential_tokens_per_s: float
    tokens_per_s: float

    @property
    def gain(self) -> float:
        """Throughput with plans / without, each under its own best limits."""
        return self.tokens_per_s / self.sequential_tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BookPrediction:
    """What a book is compared with: the best that its workloads can do without plans.

    Attributes:
        sequential_limits: Under which the workloads are fastest without plans.
        workloads: In the order in which they were given; never empty.
        is_measured: Whether plans were tried on the GPU, so that their gains are measured; else all is predicted.
    """

    sequential_limits: BookLimits
    workloads: tuple[WorkloadPrediction, ...]
    is_measured: bool = False

    @property
    def gain(self) -> float:
        """Geometric mean over the workloads."""
        return math.prod(each.gain for each in self.workloads) ** (1 / len(self.workloads))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBook:
    """A plan book as a file has it, without the fallback.

    Attributes:
        entries: As in `PlanBook`.
        made_for: None if unknown.
        limits: None if the book does not say.
        prediction: What the search expected of it; None if it was not made by a search over limits.
    """

    entries: tuple[PlanEntry, ...]
    made_for: MadeFor | None = None
    limits: BookLimits | None = None
    prediction: BookPrediction | None = None
    version: int = BOOK_VERSION

    @property
    def plans(self) -> tuple[PipelinePlan, ...]:
        """Every plan in the book once, in the order of the entries."""
        return _distinct([entry.plan for entry in self.entries])

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the entries."""
        return _digest(self.entries)

    def with_fallback(self, fallback: PipelinePlan, graph: OpGraph) -> PlanBook:
        """The book for an engine, if its plans can run there.

        Args:
            fallback: The sequential plan for the engine's token budget.
            graph: The model as the engine runs it, fused if it is.

        Raises:
            PlanError: A plan is invalid on this graph, or an entry goes beyond the token budget.
        """
        for entry in self.entries:
            if entry.max_tokens > fallback.num_tokens:
                raise PlanError(
                    f"plan {entry.plan.name!r} is for batches of up to {entry.max_tokens} tokens, the token budget is "
                    f"{fallback.num_tokens}: set --max-batch-tokens to at least {entry.max_tokens}"
                )
        for plan in self.plans:
            _check_form(plan, graph)
            try:
                plan.validate(graph)
            except PlanError as error:
                raise PlanError(f"plan {plan.name!r}: {error}") from None
        return PlanBook(fallback=fallback, entries=self.entries)

    def to_json(self) -> bytes:
        """The book as a JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @staticmethod
    def from_json(document: bytes) -> StoredBook:
        """The book in a JSON document, which may also be a single plan: that one is for every batch it has room for.

        Raises:
            PlanError: The document is neither, or of another version, or contradicts itself; the message says where.
        """
        try:
            content = msgspec.json.decode(document)
            keys = content.keys() if isinstance(content, dict) else set()
            if "nano_operations" in keys:
                plan = msgspec.convert(content, PipelinePlan)
                return StoredBook(entries=(PlanEntry(plan=plan, min_tokens=1, max_tokens=plan.num_tokens),))
            if "entries" not in keys:
                raise PlanError("neither a pipeline plan (which has nano_operations) nor a plan book (entries)")
            if content.get("version") != BOOK_VERSION:
                raise PlanError(
                    f"the plan book has version {content.get('version')}, this nanoflow reads {BOOK_VERSION}"
                )
            return msgspec.convert(content, StoredBook)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"neither a pipeline plan nor a plan book: {brief_line(error)}") from None


def load_book(path: Path) -> StoredBook:
    """The plan book, or the single plan as a book, in a file; `PlanError` names the file if it has neither."""
    try:
        return StoredBook.from_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read plan {path}: {error.strerror}") from None
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _is_within(value: float, least: float, most: float | None) -> bool:
    return least <= value and (most is None or value <= most)


def _check_form(plan: PipelinePlan, graph: OpGraph) -> None:
    """A plan for the model with operations fused does not run without, nor the other way round."""
    planned = {nano.operation for nano in plan.nano_operations}
    there = {op.name for op in graph.layer}
    if planned != there:
        differences = ", ".join(
            f"{what} {', '.join(sorted(names))}"
            for what, names in (("the plan alone has", planned - there), ("the model alone has", there - planned))
            if names
        )
        raise PlanError(
            f"plan {plan.name!r} was made for other operations than {graph.name} runs here ({differences}): "
            "search again from a profile of this model on this GPU"
        )


def _distinct(plans: Sequence[PipelinePlan]) -> tuple[PipelinePlan, ...]:
    return tuple({plan.digest: plan for plan in plans}.values())


def _digest(entries: tuple[PlanEntry, ...]) -> str:
    return hashlib.sha256(msgspec.json.encode(entries)).hexdigest()[:12]
