"""What a profile consists of: every operation of a model at every size that a plan may ask for, as a list of tasks.

Products are measured so densely that the borders of waves are visible; row-wise operations at few sizes, since they are
interpolated; attentions over tokens and contexts. How a task is measured is `alone.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.operation import AttentionDims, Operation, OpKind, Scope
from nanoflow.plan.mechanisms import Mechanism
from nanoflow.profile.table import SAMPLING
from nanoflow.profiler.site import Site

ATTENTIONS = (OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What to measure, all of it up to the token budget.

    Attributes:
        max_tokens: The token budget; always measured itself, except with attentions.
        step: Products at each multiple of it up to 2,048 tokens, then at multiples of 512 to 4,096, of 1,024 to 8,192
            and of 2,048. All other operations take in proportion beyond their largest size.
        expert_tokens: Products of experts also at these few, which do not touch every expert.
        row_tokens: Row-wise operations.
        head_rows: The product that makes logits, in rows.
        sampled_rows: Sampling.
        decode_requests, decode_contexts: Decode attention at each pair: requests, keys of each.
        prefill_tokens, prefill_before: Prefill attention at each pair: tokens in chunks of `prefill_chunk` at most,
            keys before each chunk.
        max_cache_bytes: Pairs whose keys and values of one layer take more are left out.
    """

    max_tokens: int
    step: int = 128
    expert_tokens: tuple[int, ...] = (1, 16, 64)
    row_tokens: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8192)
    head_rows: tuple[int, ...] = (1, 64, 128, *range(256, 2049, 256))
    sampled_rows: tuple[int, ...] = (1, 64, 256, 1024, 2048)
    decode_requests: tuple[int, ...] = (16, 64, 128, 256, 512, 768, 1024, 1536, 2048)
    decode_contexts: tuple[int, ...] = (256, 1024, 4096)
    prefill_tokens: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8192)
    prefill_before: tuple[int, ...] = (0, 1024, 4096)
    prefill_chunk: int = 512
    max_cache_bytes: int = 16 << 30

    @staticmethod
    def small(max_tokens: int) -> Sizes:
        """A few sizes, for a profile that shall only show that everything works."""
        return Sizes(
            max_tokens=max_tokens,
            step=max(max_tokens // 2, 1),
            row_tokens=(),
            head_rows=(1,),
            sampled_rows=(1,),
            decode_requests=(1, max(max_tokens // 2, 2)),
            decode_contexts=(16, 64),
            prefill_tokens=(max_tokens,),
            prefill_before=(0, 64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One point of a profile on the whole device.

    Attributes:
        operation: Key in the graph, or SAMPLING.
        num_tokens: Tokens, or rows after the last layer.
        num_requests: Equal requests that an attention works on; 0 for other operations.
        before: Keys of each request before its tokens.
    """

    operation: str
    num_tokens: int
    num_requests: int = 0
    before: int = 0

    @property
    def context(self) -> float:
        """Keys that each token of an attention sees, on average; 0 for other operations."""
        return self.before + (self.num_tokens / self.num_requests + 1) / 2 if self.num_requests else 0.0

    @property
    def key(self) -> tuple[str, int, float, Mechanism, float]:
        """That of the point it becomes."""
        return (self.operation, self.num_tokens, self.context, Mechanism.WHOLE, 1.0)


def tasks(site: Site, sizes: Sizes) -> list[Task]:
    """Every point, those of one operation together, small sizes first."""
    found: list[Task] = []
    for op in site.graph.operations():
        if op.kind in ATTENTIONS:
            of_op = _attention_tasks(op, sizes)
            found += [task for task in of_op if cache_bytes(site, task) <= sizes.max_cache_bytes]
        else:
            found += [Task(operation=op.key, num_tokens=count) for count in _token_counts(op, sizes)]
    return found + [Task(operation=SAMPLING, num_tokens=count) for count in _within(sizes.sampled_rows, sizes)]


def decode_task(op: Operation, num_requests: int, context: int) -> Task:
    """Decode attention of so many requests with so many keys each."""
    return Task(operation=op.key, num_tokens=num_requests, num_requests=num_requests, before=context - 1)


def prefill_task(op: Operation, num_tokens: int, before: int, chunk: int) -> Task:
    """Prefill attention of tokens in equal chunks, each of at most `chunk` tokens with so many keys before it."""
    return Task(operation=op.key, num_tokens=num_tokens, num_requests=num_chunks(num_tokens, chunk), before=before)


def num_chunks(num_tokens: int, chunk: int) -> int:
    """The fewest equal parts of at most `chunk` tokens."""
    fewest = -(-num_tokens // chunk)
    return next(count for count in range(fewest, num_tokens + 1) if num_tokens % count == 0)


def cache_bytes(site: Site, task: Task) -> int:
    """Keys and values of one layer that an attention reads."""
    num_keys = task.num_requests * task.before + task.num_tokens
    dims = next(op.dims for op in site.graph.operations() if op.key == task.operation)
    assert isinstance(dims, AttentionDims)
    return num_keys * dims.cached_bytes(site.dtype.itemsize)


def _token_counts(op: Operation, sizes: Sizes) -> list[int]:
    if not op.is_product:
        counts = _within(sizes.row_tokens, sizes)
        most = max(sizes.head_rows, default=1) if op.scope is Scope.SAMPLED else sizes.max_tokens
        return [count for count in counts if count <= most] or [min(most, sizes.max_tokens)]
    if op.scope is Scope.SAMPLED:
        return _within(sizes.head_rows, sizes)
    fine = range(sizes.step, 2049, sizes.step)
    coarse = (*range(2560, 4097, 512), *range(5120, 8193, 1024), *range(10240, sizes.max_tokens + 1, 2048))
    found = _within((*fine, *coarse), sizes)
    few = [count for count in sizes.expert_tokens if isinstance(op.dims, ExpertDims) and count < sizes.max_tokens]
    # The budget is the largest batch, so it is measured wherever it lies.
    return sorted({*few, *found, sizes.max_tokens})


def _within(counts: tuple[int, ...], sizes: Sizes) -> list[int]:
    """Those within the budget; the budget itself too, if the next larger count would have covered it."""
    found = [count for count in counts if count <= sizes.max_tokens]
    if not counts or max(counts) > sizes.max_tokens > max(found, default=0) or not found:
        found.append(sizes.max_tokens)
    return sorted(set(found))


def _attention_tasks(op: Operation, sizes: Sizes) -> Iterator[Task]:
    is_decode = op.kind is OpKind.DECODE_ATTENTION
    counts = sizes.decode_requests if is_decode else sizes.prefill_tokens
    for count in [count for count in counts if count <= sizes.max_tokens] or [sizes.max_tokens]:
        if is_decode:
            yield from (decode_task(op, count, context) for context in sizes.decode_contexts)
        else:
            yield from (prefill_task(op, count, before, sizes.prefill_chunk) for before in sizes.prefill_before)
