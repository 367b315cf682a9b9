"""The limits of an engine: token budget, requests at once and the bound on gaps, given or chosen for the goal.

A limit that the user gives is used. Otherwise the limit that the plan book was made for is used. The rest is chosen
here, from the goal, the model, the memory and the device. This file is arithmetic on sizes: `device/detect.py` says how
much memory is free and how fast the device is, `memory.py` decides the number of KV pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nanoflow.config import EngineConfig, Goal
from nanoflow.graph.graph import OpGraph
from nanoflow.hardware import LocalDevice
from nanoflow.plan.book import StoredBook
from nanoflow.plan.liveness import workspace_bytes
from nanoflow.plan.sequential import sequential_plan

Origin = Literal["given", "book", "chosen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoalLimits:
    """The limits that a goal asks for, before they are reduced for the model and the memory.

    Attributes:
        max_batch_tokens: The token budget on a device that is large and fast enough.
        min_batch_tokens: The budget is not reduced below this to make iterations shorter: matrix products of fewer
            tokens use less of the device, and prompts would take longer.
        max_num_seqs: Requests at once, if their keys fit.
        full_iteration_s: Longest computed time of an iteration with the whole budget; None: any time.
        max_itl_ms: The bound on gaps between tokens; None: no bound. If an iteration with the whole budget takes
            longer, that time is the bound, since a smaller one would starve prompts.
    """

    max_batch_tokens: int
    min_batch_tokens: int
    max_num_seqs: int
    full_iteration_s: float | None
    max_itl_ms: float | None


# Where the numbers come from: Llama-3-8B and Llama-3.2-1B on one H200, saturated with requests of 1024/512 tokens and
# of the lengths of ShareGPT, and 8B at 20 and 35 requests/s, by simulation from measured profiles
# (docs/log/2026-11-28-overlap-over-best-sequential.md).
#   throughput: an iteration of 50 ms is 2,048 tokens of 8B on this card, and 8,192 of 1B. For 8B and eight workloads
#       that is predicted to give 0.98 to 1 of the best of 2,048, 4,096 and 8,192 tokens, which 8,192 does for 0.97 to
#       1: larger budgets take prompts in bursts, with decodes alone between them. Measured in turn, once, 1024/512
#       makes 1.6 % more with 2,048 tokens and 1,024 requests than with 8,192 and 2,048. 4,096 requests are
#       predicted to give 0.7 % more for 8B and 2.4 % for 1B, but take twice the memory for logits and counted tokens.
#   balanced: the same, with gaps of at most 50 ms at these rates, and of 73 ms when saturated, as decodes of long
#       contexts come on top. The bound of 75 ms is for longer ones; 50 ms would cost 4 % when saturated.
#   latency: an iteration of 25 ms is 1,024 tokens of 8B. 512 would bring the longest gap from 28 to 17 ms and the 99th
#       first token from 113 to 147 ms at 35 requests/s.
ON_GPU: Mapping[Goal, GoalLimits] = {
    "throughput": GoalLimits(
        max_batch_tokens=8192, min_batch_tokens=2048, max_num_seqs=2048, full_iteration_s=0.05, max_itl_ms=None
    ),
    "balanced": GoalLimits(
        max_batch_tokens=8192, min_batch_tokens=1024, max_num_seqs=2048, full_iteration_s=0.05, max_itl_ms=75.0
    ),
    "latency": GoalLimits(
        max_batch_tokens=2048, min_batch_tokens=256, max_num_seqs=256, full_iteration_s=0.025, max_itl_ms=25.0
    ),
}
# On a CPU decodes are bound by compute nearly as much as prompts are, so large batches gain little: on two cores
# SmolLM2-135M takes prompts of 50 to 1,200 tokens at the same speed with 1,024 and 2,048 tokens, and 5 % slower with
# 512. The embedded model, which is tiny, is 14 % slower with 512. But the reader of a stream waits for an iteration:
# beside prompts of 2,000 tokens the longest gap between tokens of the embedded model is 97 ms with 512, 180 ms with
# 2,048. Gaps have no bound: other work on the machine changes times more than a chunk of a prompt does.
ON_CPU: Mapping[Goal, GoalLimits] = {
    "throughput": GoalLimits(
        max_batch_tokens=2048, min_batch_tokens=256, max_num_seqs=256, full_iteration_s=None, max_itl_ms=None
    ),
    "balanced": GoalLimits(
        max_batch_tokens=512, min_batch_tokens=256, max_num_seqs=256, full_iteration_s=4.0, max_itl_ms=None
    ),
    "latency": GoalLimits(
        max_batch_tokens=256, min_batch_tokens=128, max_num_seqs=64, full_iteration_s=1.0, max_itl_ms=None
    ),
}

# Tokens of a short request: requests at once are limited to those whose KV pages have room for so many tokens each.
SHORT_REQUEST_TOKENS = 256
# Largest parts of the device's memory for tensors between operations, and for the buffers of all rows.
WORKSPACE_SHARE = 0.03
ROWS_SHARE = 0.02
# Bytes of a row for each token id of the vocabulary, beside its logits: counts of its tokens, for penalties.
_COUNT_BYTES = 2
# Bytes of a row for each page: two page tables, for decodes and for prompts, of 4 bytes a page.
_TABLE_BYTES = 8
# On a CPU other programs need memory too: KV pages take at most this part of what is free after loading the weights,
# and at most so many bytes unless one request of full length needs more. 1 GiB holds 43,000 tokens of Qwen2.5-0.5B.
_CPU_SHARE = 0.4
_CPU_CACHE_BYTES = 2**30
# Chosen limits are rounded down to multiples: of tokens, to which batches are padded anyway, and of requests.
_TOKENS_STEP = 256
_STEP = 8
_FEWEST_SEQS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The limits that an engine runs with, and why.

    Attributes:
        goal: The goal for which limits were chosen.
        max_batch_tokens: Token budget of an iteration.
        max_num_seqs: Most requests at once.
        max_itl_ms: Longest gap between tokens that a chunk of a prompt may cause; None: any.
        max_batch_tokens_origin, max_num_seqs_origin, max_itl_ms_origin: Where each comes from.
        reason: The same in one line, to be shown.
    """

    goal: Goal
    max_batch_tokens: int
    max_num_seqs: int
    max_itl_ms: float | None
    max_batch_tokens_origin: Origin
    max_num_seqs_origin: Origin
    max_itl_ms_origin: Origin
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    """A limit, where it comes from, and why it has this value, as a phrase to be shown."""

    value: int
    origin: Origin
    why: str


def choose_limits(
    config: EngineConfig,
    graph: OpGraph,
    device: LocalDevice,
    *,
    max_model_len: int,
    dtype_bytes: int,
    book: StoredBook | None = None,
) -> EngineLimits:
    """The limits of an engine on a device, before anything is loaded there.

    Args:
        config: The limits that the user gives, and the goal.
        graph: The model.
        device: The device, with the memory that is free before the weights are loaded.
        max_model_len: Longest prompt plus completion.
        dtype_bytes: Size of an element of weights, keys and activations.
        book: The plans that will run. A book for small batches sets the budget even if it names no limits.
    """
    wanted = (ON_GPU if device.is_gpu else ON_CPU)[config.goal]
    tokens = _given_tokens(config, book, wanted) or _chosen_tokens(config, wanted, graph, device, dtype_bytes)
    seqs = _given_seqs(config, book) or _chosen_seqs(
        config, wanted, graph, device, max_model_len=max_model_len, dtype_bytes=dtype_bytes, most=tokens.value
    )
    itl_ms, itl_origin, itl_why = _gaps(config, wanted, device, tokens.value * _token_s(graph, device))
    gaps = "gaps of any length" if itl_ms is None else f"gaps of at most {itl_ms:g} ms"
    ttft = "" if config.max_ttft_ms is None else f", first tokens within {config.max_ttft_ms:g} ms beside batch work"
    return EngineLimits(
        goal=config.goal,
        max_batch_tokens=tokens.value,
        max_num_seqs=seqs.value,
        max_itl_ms=itl_ms,
        max_batch_tokens_origin=tokens.origin,
        max_num_seqs_origin=seqs.origin,
        max_itl_ms_origin=itl_origin,
        reason=(
            f"limits for {config.goal}: max_batch_tokens {tokens.value:,} ({tokens.why}), "
            f"max_num_seqs {seqs.value:,} ({seqs.why}), {gaps} between tokens ({itl_why}){ttft}"
        ),
    )


def row_bytes(graph: OpGraph, *, max_model_len: int, page_size: int, dtype_bytes: int) -> int:
    """Device memory that one more request at once takes, beside its keys: logits, counted tokens, page tables."""
    tables_bytes = _TABLE_BYTES * -(-max_model_len // page_size) * len(graph.kv_groups)
    return graph.vocab_size * (dtype_bytes + _COUNT_BYTES) + tables_bytes


def cache_room_bytes(
    *, is_gpu: bool, free_bytes: int, memory_bytes: int, utilization: float, longest_bytes: int
) -> int:
    """Bytes that KV pages may take of what is free after loading the weights; negative if memory is lacking.

    Args:
        is_gpu: False for a CPU, where the bound is small.
        free_bytes: Free memory after loading the weights, less what will be allocated later.
        memory_bytes: All memory of the device.
        utilization: Part of a GPU's memory that may be used.
        longest_bytes: Bytes that one request of full length needs.
    """
    if not is_gpu:
        return min(int(free_bytes * _CPU_SHARE), max(_CPU_CACHE_BYTES, longest_bytes))
    return int(free_bytes - memory_bytes * (1 - utilization))


def _gaps(
    config: EngineConfig, wanted: GoalLimits, device: LocalDevice, full_iteration_s: float
) -> tuple[float | None, Origin, str]:
    """The bound on gaps between tokens in milliseconds, where it comes from, and why."""
    if config.max_itl_ms is not None:
        return config.max_itl_ms, "given", "given"
    if wanted.max_itl_ms is None:
        is_cpu = not device.is_gpu and config.goal != "throughput"
        return None, "chosen", "times on a CPU vary too much for a bound" if is_cpu else f"goal {config.goal}"
    full_ms = float(round(full_iteration_s * 1e3))
    if full_ms > wanted.max_itl_ms:
        return full_ms, "chosen", f"a batch of that many tokens takes about as long on {device.name}"
    return wanted.max_itl_ms, "chosen", f"goal {config.goal}"


def _given_tokens(config: EngineConfig, book: StoredBook | None, wanted: GoalLimits) -> _Number | None:
    if config.max_batch_tokens is not None:
        return _Number(value=config.max_batch_tokens, origin="given", why="given")
    if book is None or not (book.limits or book.entries):
        return None
    if book.limits is not None:
        return _Number(value=book.limits.max_batch_tokens, origin="book", why="the plan book was made for it")
    largest = max(entry.max_tokens for entry in book.entries)
    least = max(largest, wanted.min_batch_tokens)
    return _Number(value=least, origin="book", why=f"the largest batch of the plan book has {largest:,}")


def _given_seqs(config: EngineConfig, book: StoredBook | None) -> _Number | None:
    if config.max_num_seqs is not None:
        return _Number(value=config.max_num_seqs, origin="given", why="given")
    if book is None or book.limits is None:
        return None
    return _Number(value=book.limits.max_num_seqs, origin="book", why="the plan book was made for it")


def _chosen_tokens(
    config: EngineConfig, wanted: GoalLimits, graph: OpGraph, device: LocalDevice, dtype_bytes: int
) -> _Number:
    """The goal's budget, reduced if an iteration would take too long or its tensors too much memory."""
    tokens, why = wanted.max_batch_tokens, f"goal {config.goal}"
    if wanted.full_iteration_s is not None:
        in_time = int(wanted.full_iteration_s / _token_s(graph, device)) // _TOKENS_STEP * _TOKENS_STEP
        if in_time < tokens:
            tokens, why = in_time, f"about {wanted.full_iteration_s * 1e3:g} ms an iteration on {device.name}"
        if tokens < wanted.min_batch_tokens:
            tokens, why = wanted.min_batch_tokens, f"fewer are slow, goal {config.goal}"
    most = int(device.memory_bytes * WORKSPACE_SHARE)
    while tokens // 2 >= _STEP and _tensor_bytes(graph, tokens, config.max_num_seqs, dtype_bytes) > most:
        tokens, why = tokens // 2, f"tensors of more would take over {WORKSPACE_SHARE:.0%} of the memory"
    if config.max_num_seqs is not None and config.max_num_seqs > tokens:
        tokens, why = config.max_num_seqs, "a token for each request"
    return _Number(value=tokens, origin="chosen", why=why)


def _token_s(graph: OpGraph, device: LocalDevice) -> float:
    """Time of a token in a large batch: two operations for each parameter of matrix products that it passes.

    GPUs that multiply FP8 do so at twice the rate.
    """
    saved = graph.num_active_fp8_parameters / 2 if device.is_gpu else 0
    return 2 * (graph.num_active_parameters - saved) / device.flops_per_s


def _tensor_bytes(graph: OpGraph, tokens: int, num_logits: int | None, dtype_bytes: int) -> int:
    """Bytes of the tensors of a batch; rows of logits are bounded separately."""
    plan = sequential_plan(graph, tokens)
    return workspace_bytes(
        graph, [plan], num_tokens=tokens, num_logits=min(num_logits or 1, tokens), dtype_bytes=dtype_bytes
    )


def _chosen_seqs(
    config: EngineConfig,
    wanted: GoalLimits,
    graph: OpGraph,
    device: LocalDevice,
    *,
    max_model_len: int,
    dtype_bytes: int,
    most: int,
) -> _Number:
    """The goal's number, reduced to what pages, memory or the token budget allow."""
    kv_tokens = _kv_tokens(config, graph, device, max_model_len, dtype_bytes)
    short = min(SHORT_REQUEST_TOKENS, max_model_len)
    a_row = row_bytes(graph, max_model_len=max_model_len, page_size=config.page_size, dtype_bytes=dtype_bytes)
    bounds = (
        (wanted.max_num_seqs, f"goal {config.goal}"),
        (kv_tokens // short, f"as many of {short} tokens as the KV pages hold"),
        (int(device.memory_bytes * ROWS_SHARE) // a_row, f"more would take over {ROWS_SHARE:.0%} of the memory"),
    )
    value, why = min(bounds, key=lambda bound: bound[0])
    value = max(value // _STEP * _STEP, _FEWEST_SEQS)
    if value > most:
        value, why = most, "a token of the budget for each"
    return _Number(value=value, origin="chosen", why=why)


def _kv_tokens(config: EngineConfig, graph: OpGraph, device: LocalDevice, max_model_len: int, dtype_bytes: int) -> int:
    """About how many tokens the KV pages will hold."""
    if config.num_pages is not None:
        return config.num_pages * config.page_size
    token_bytes = graph.kv_bytes_per_token(dtype_bytes)
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * 2**30 // token_bytes)
    free = device.free_bytes - graph.parameter_bytes(dtype_bytes)
    room = cache_room_bytes(
        is_gpu=device.is_gpu,
        free_bytes=free,
        memory_bytes=device.memory_bytes,
        utilization=config.gpu_memory_utilization,
        longest_bytes=max_model_len * token_bytes,
    )
    return max(room, 0) // token_bytes
