"""Check that the weights fit in the free memory, and find how many KV pages do. Errors have the numbers.

Each KV group of the model has pages of its own; how they share the memory is `kvcache/sizes.py`'s. How it is allocated
is `executor/buffers.py`'s and `models/weights.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.device.detect import free_memory_bytes, total_memory_bytes
from nanoflow.engine.limits import EngineLimits, cache_room_bytes
from nanoflow.executor.buffers import allocate_caches
from nanoflow.graph.graph import OpGraph
from nanoflow.kernels.launch import LayerCache
from nanoflow.kvcache.sizes import Demand, PoolSize, longest_sequence, most_pages
from nanoflow.models.config_json import ModelConfig

logger = logging.getLogger(__name__)

_GIB = 2**30


def require_room_for_weights(graph: OpGraph, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit in the free memory.

    Raises:
        ConfigError: They do not fit; the message has the numbers.
    """
    needed, free = graph.parameter_bytes(dtype.itemsize), free_memory_bytes(device)
    if needed > free:
        raise ConfigError(
            f"the weights of {graph.name} take {needed / _GIB:.1f} GiB in {_name(dtype)}, "
            f"{device} has {free / _GIB:.1f} GiB free"
        )


def size_cache(
    config: EngineConfig,
    limits: EngineLimits,
    model_config: ModelConfig,
    graph: OpGraph,
    dtype: torch.dtype,
    device: torch.device,
    *,
    taken_bytes: int = 0,
) -> tuple[tuple[PoolSize, ...], int]:
    """The pool of KV pages of each group, and the longest sequence they and the model allow.

    Args:
        config: Options about memory.
        limits: The engine's limits.
        model_config, graph: The model.
        dtype: Type of activations.
        device: The device, with the weights loaded.
        taken_bytes: Bytes that will be allocated later and must stay free on a GPU.

    Raises:
        ConfigError: The wanted length, or a single page, does not fit; the message has the numbers.
    """
    wanted_len = wanted_model_len(config, model_config)
    if config.max_model_len is None and wanted_len < model_config.max_context_len:
        logger.warning(
            "sequences of up to %d tokens are served: a longer context changes this model's rotary embedding (%s) "
            "at all positions, so it must be asked for: max_model_len, at most %d",
            *(wanted_len, model_config.rope.rope_type, model_config.max_context_len),
        )
    demand = Demand(
        max_num_seqs=limits.max_num_seqs,
        max_model_len=wanted_len,
        max_batch_tokens=limits.max_batch_tokens,
        page_size=config.page_size,
    )
    groups = [(group.window, group.bytes_per_token(dtype.itemsize) * config.page_size) for group in graph.kv_groups]
    if config.num_pages is None:
        pools = demand.divide(_room_bytes(config, demand, groups, device, taken_bytes), groups)
    else:
        pools = demand.bounded(config.num_pages, [window for window, _ in groups])
    capacity = longest_sequence(pools, wanted_len, page_size=config.page_size, max_batch_tokens=limits.max_batch_tokens)
    if capacity < wanted_len:
        num_bytes = sum(pool.num_pages * page_bytes for pool, (_, page_bytes) in zip(pools, groups, strict=True))
        numbers = (
            f"{said_pools(pools)} KV pages of {config.page_size} tokens ({num_bytes / _GIB:.2f} GiB) hold "
            f"{capacity} tokens, fewer than the {wanted_len} of max_model_len"
        )
        if config.max_model_len is not None or capacity < 2:
            raise ConfigError(f"{numbers}: lower max_model_len, or raise {_limiting_option(config, device)}")
        logger.warning("%s: it is cut to %d", numbers, capacity)
    return pools, capacity


def reserve_caches(
    graph: OpGraph, pools: Sequence[PoolSize], *, page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """The KV pages of all layers, those of each KV group from its pool; see `allocate_caches`.

    Raises:
        ConfigError: The system refuses so much memory; the message has the number.
    """
    num_pages = [pool.num_pages for pool in pools]
    try:
        return allocate_caches(graph, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)
    except MemoryError:
        token_bytes = [group.bytes_per_token(dtype.itemsize) for group in graph.kv_groups]
        gib = sum(count * size for count, size in zip(num_pages, token_bytes, strict=True)) * page_size / _GIB
        raise ConfigError(
            f"the system does not let this process reserve {gib:.2f} GiB for KV pages: lower kv_cache_gib"
        ) from None


def wanted_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """The longest sequence asked for; the model's positions must cover it unless they can be scaled to any length."""
    limit = model_config.max_context_len
    if config.max_model_len is None:
        return model_config.default_context_len
    if config.max_model_len > limit and model_config.rope.rope_type != "dynamic":
        raise ConfigError(f"max_model_len is {config.max_model_len}, the model was made for at most {limit} tokens")
    return config.max_model_len


def said_pools(pools: Sequence[PoolSize]) -> str:
    """The pages of each pool for people: `100`, or `100 (25 in layers with a window of 512)`."""
    first, *others = pools
    windows = ", ".join(f"{pool.num_pages} in layers with a window of {pool.window}" for pool in others)
    return f"{first.num_pages} ({windows})" if windows else str(first.num_pages)


def _room_bytes(
    config: EngineConfig,
    demand: Demand,
    groups: Sequence[tuple[int | None, int]],
    device: torch.device,
    taken_bytes: int,
) -> int:
    """What all KV pages may take of the given or the free memory; groups: window and bytes of a page of each."""
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * _GIB)
    longest_bytes = sum(
        page_bytes
        * most_pages(window, demand.max_model_len, page_size=demand.page_size, max_batch_tokens=demand.max_batch_tokens)
        for window, page_bytes in groups
    )
    room_bytes = cache_room_bytes(
        is_gpu=device.type == "cuda",
        free_bytes=free_memory_bytes(device) - (taken_bytes if device.type == "cuda" else 0),
        memory_bytes=total_memory_bytes(device),
        utilization=config.gpu_memory_utilization,
        longest_bytes=longest_bytes,
    )
    return min(room_bytes, demand.useful_bytes(groups))


def _limiting_option(config: EngineConfig, device: torch.device) -> str:
    """The option that a user would raise to get more pages."""
    if config.num_pages is not None:
        return "num_pages"
    if config.kv_cache_gib is not None or device.type == "cpu":
        return "kv_cache_gib"
    return "gpu_memory_utilization"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
