"""What fits: weights, then KV pages, in the memory that is free. Everything that does not is said with numbers.

How it is allocated is `executor/buffers.py`'s and `models/weights.py`'s.
"""

from __future__ import annotations

import logging

import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.device.detect import free_memory_bytes, total_memory_bytes
from nanoflow.engine.limits import EngineLimits, cache_room_bytes
from nanoflow.executor.buffers import allocate_caches
from nanoflow.graph.graph import OpGraph
from nanoflow.kernels.launch import LayerCache
from nanoflow.models.config_json import ModelConfig

logger = logging.getLogger(__name__)

_GIB = 2**30


def require_room_for_weights(graph: OpGraph, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit.

    Raises:
        ConfigError: The message has the numbers.
    """
    needed, free = graph.num_parameters * dtype.itemsize, free_memory_bytes(device)
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
) -> tuple[int, int]:
    """Number of KV pages, and the longest sequence they and the model allow.

    Args:
        config: Options about memory.
        limits: Of the engine.
        model_config, graph: The model.
        dtype: Of keys and values.
        device: Where; its free memory is what the weights have left.
        taken_bytes: What will be allocated later and must stay free on a GPU.

    Raises:
        ConfigError: The wanted length, or a single page, does not fit; the message has the numbers.
    """
    page_bytes = graph.kv_elements_per_token * dtype.itemsize * config.page_size
    wanted_len = wanted_model_len(config, model_config)
    if config.max_model_len is None and wanted_len < model_config.max_context_len:
        logger.warning(
            "sequences of up to %d tokens are served: a longer context changes this model's rotary embedding (%s) "
            "at all positions, so it must be asked for: max_model_len, at most %d",
            *(wanted_len, model_config.rope.rope_type, model_config.max_context_len),
        )
    num_pages = config.num_pages or _affordable_pages(config, limits, wanted_len, page_bytes, device, taken_bytes)
    capacity = num_pages * config.page_size
    if capacity < wanted_len:
        numbers = (
            f"{num_pages} KV pages of {config.page_size} tokens ({num_pages * page_bytes / _GIB:.2f} GiB) hold "
            f"{capacity} tokens, fewer than the {wanted_len} of max_model_len"
        )
        if config.max_model_len is not None or capacity < 2:
            raise ConfigError(f"{numbers}: lower max_model_len, or raise {_limiting_option(config, device)}")
        logger.warning("%s: it is cut to %d", numbers, capacity)
    return num_pages, min(wanted_len, capacity)


def reserve_caches(
    graph: OpGraph, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """The KV pages of all layers; see `allocate_caches`.

    Raises:
        ConfigError: The system does not let this process have so much; the message has the number.
    """
    try:
        return allocate_caches(graph, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)
    except MemoryError:
        gib = num_pages * page_size * graph.kv_elements_per_token * dtype.itemsize / _GIB
        raise ConfigError(
            f"the system does not let this process reserve {gib:.2f} GiB for KV pages: lower kv_cache_gib"
        ) from None


def wanted_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """The longest sequence asked for, which the model's positions must cover unless they are scaled to any length."""
    limit = model_config.max_context_len
    if config.max_model_len is None:
        return model_config.default_context_len
    if config.max_model_len > limit and model_config.rope.rope_type != "dynamic":
        raise ConfigError(f"max_model_len is {config.max_model_len}, the model was made for at most {limit} tokens")
    return config.max_model_len


def _affordable_pages(
    config: EngineConfig,
    limits: EngineLimits,
    wanted_len: int,
    page_bytes: int,
    device: torch.device,
    taken_bytes: int,
) -> int:
    """Pages within the given or the free memory, but no more than all requests at full length could use."""
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * _GIB // page_bytes)
    pages_per_request = -(-wanted_len // config.page_size)
    room = cache_room_bytes(
        is_gpu=device.type == "cuda",
        free_bytes=free_memory_bytes(device) - (taken_bytes if device.type == "cuda" else 0),
        memory_bytes=total_memory_bytes(device),
        utilization=config.gpu_memory_utilization,
        longest_bytes=pages_per_request * page_bytes,
    )
    return max(min(limits.max_num_seqs * pages_per_request, room // page_bytes), 0)


def _limiting_option(config: EngineConfig, device: torch.device) -> str:
    """The option that a user would raise to get more pages."""
    if config.num_pages is not None:
        return "num_pages"
    if config.kv_cache_gib is not None or device.type == "cpu":
        return "kv_cache_gib"
    return "gpu_memory_utilization"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
