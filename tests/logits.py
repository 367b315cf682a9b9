"""Logits of a model folder by the reference executor, for comparison with transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nanoflow.batch import DenseBatch, NewPages
from nanoflow.executor.buffers import DeviceModel, allocate_caches
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.fp8 import fp8_candidates, with_fp8
from nanoflow.graph.graph import Fp8
from nanoflow.graph.operation import KvType
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.reference_fp8 import FP8_KERNELS
from nanoflow.models.config_json import load
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, load_weights
from tests.reference_executor import ReferenceExecutor

_PAGE_SIZE = 16


def prompt_logits(
    folder: Path,
    prompt: Sequence[int],
    kv_type: KvType = KvType.MODEL,
    *,
    is_fp8: bool = False,
    kept: Mapping[str, Fp8] | None = None,
    change: Callable[[Weights], object] = lambda weights: None,
) -> torch.Tensor:
    """float32 [tokens, vocab] of a prompt in one chunk, by the reference executor, with such a KV cache.

    Args:
        folder: The model.
        prompt: Its tokens.
        is_fp8: Whether weights are quantised to FP8 while they are loaded, and products multiply these.
        kept: With `is_fp8` the parameters that are kept otherwise than with a scale for each row, as they are stored.
        change: Changes the weights after they are loaded.

    Raises:
        ModelError: The folder cannot be served.
    """
    cpu, count = torch.device("cpu"), len(prompt)
    num_pages = -(-count // _PAGE_SIZE)
    config = load(folder)
    graph = build_graph(config, max(count, config.default_context_len)).with_kv_type(kv_type)
    if is_fp8:
        graph = with_fp8(graph, {**dict.fromkeys(fp8_candidates(graph), Fp8()), **(kept or {})})
    weights = load_weights(graph, folder, torch.float32, cpu, show_progress=False)
    change(weights)
    caches = allocate_caches(graph, num_pages=num_pages, page_size=_PAGE_SIZE, dtype=torch.float32, device=cpu)
    kernels = {**REFERENCE_KERNELS, **FP8_KERNELS}
    model = DeviceModel(graph=graph, dtype=torch.float32, weights=weights, caches=caches, kernels=kernels)
    batch = DenseBatch(
        iteration=1,
        rows=np.zeros(1, np.int32),
        epochs=np.zeros(1, np.int64),
        num_decodes=0,
        query_start=np.array([0, count], np.int32),
        context_len=np.array([count], np.int32),
        token_ids=np.array(prompt, np.int32),
        is_fed_back=np.zeros(count, np.bool_),
        positions=np.arange(count, dtype=np.int32),
        slots=np.arange(count, dtype=np.int64),
        new_pages=NewPages.of_tables(np.arange(num_pages, dtype=np.int32)[None]),
        table_width=num_pages,
        sampled=np.zeros(1, np.int32),
    )
    inputs = InputBuilder(graph.ropes, num_rows=1, device=cpu).build(batch)
    inputs = dataclasses.replace(inputs, logit_tokens=torch.arange(count))
    return ReferenceExecutor(model).forward(inputs)
