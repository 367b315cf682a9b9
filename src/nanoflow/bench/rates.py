"""Measures what each kind of operation takes alone on this device, at the sizes of a workload's typical batch.

The engine's own kernels run on separate tensors, which are freed before the engine is built (`profiler/`). `bound.py`
adds up the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nanoflow.batch import DenseBatch
from nanoflow.bench.bound import Bounds, Cost, Rates, TypicalBatch, bounds_of, typical_batch, visible_keys, work_of
from nanoflow.config import EngineConfig
from nanoflow.device.detect import resolve_device, resolve_dtype
from nanoflow.engine.build import engine_limits, resolve_model
from nanoflow.engine.precision import graph_of
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.operation import OpKind
from nanoflow.models.weights import random_weights
from nanoflow.plan.book import load_book
from nanoflow.profiler.site import (
    Site,
    attention_weights,
    equal_requests,
    gemms,
    over_layers,
    random_workspace,
    shortened,
)
from nanoflow.profiler.sustained import Work, sustained
from nanoflow.workload import Lengths


@torch.inference_mode()
def measure_bounds(config: EngineConfig, lengths: Sequence[Lengths]) -> Bounds:
    """The bounds of requests of these lengths on the model and device of a config; takes some seconds on a GPU.

    Raises:
        ConfigError, ModelError: The device does not exist, or the model is not supported.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    model_config, folder = resolve_model(config)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    graph, _ = graph_of(config, model_config, folder, dtype, device)
    stored = None if config.plan is None else load_book(Path(config.plan))
    limits = engine_limits(config, model_config, graph, dtype, device, stored)
    batch = typical_batch(lengths, max_batch_tokens=limits.max_batch_tokens, max_num_seqs=limits.max_num_seqs)
    rates = _measure_rates(Site(graph=graph, device=device, dtype=dtype, page_size=config.page_size), batch)
    if device.type == "cuda":
        # The engine sizes its cache by the free memory that the driver reports.
        torch.cuda.empty_cache()
    return bounds_of(graph, work_of(lengths, graph.windows), batch, rates, dtype.itemsize)


def _measure_rates(site: Site, batch: TypicalBatch) -> Rates:
    """Measure the GEMMs, the language-model head and both attentions, each alone."""
    token, logit_row = _measure_gemms(site, batch)
    decode_key = None
    if batch.num_decodes:
        requests = equal_requests(batch.num_decodes, batch.decode_context - 1, 1, site.page_size, is_decode=True)
        decode_key = _measure_attention(site, OpKind.DECODE_ATTENTION, requests)
    requests = equal_requests(batch.num_prefills, batch.prefill_before, batch.prefill_tokens, site.page_size)
    prefill_key = _measure_attention(site, OpKind.PREFILL_ATTENTION, requests)
    return Rates(token=token, logit_row=logit_row, decode_key=decode_key, prefill_key=prefill_key)


def _measure_gemms(site: Site, batch: TypicalBatch) -> tuple[Cost, Cost]:
    """Costs of one token in the GEMMs of all layers, and of one row in the language-model head."""
    layer_elements = min(sum(each.num_elements for each in kind.parameters) for kind in site.graph.kinds)
    graph = shortened(site.graph, layer_elements * site.dtype.itemsize)
    weights = random_weights(graph, site.dtype, site.device, seed=0)
    workspace = random_workspace(
        site, graph, weights, num_pages=1, num_tokens=batch.num_tokens, num_rows=batch.num_logit_rows
    )
    whole = equal_requests(1, 0, batch.num_tokens, site.page_size)
    passes = _cost_of(over_layers(workspace, lambda op: op.is_product, whole), site.device)
    rows = equal_requests(batch.num_logit_rows, 0, 1, site.page_size, is_decode=True)
    inputs = InputBuilder(graph.ropes, num_rows=rows.num_requests, device=site.device).build(rows)
    head = gemms(graph.epilogue)
    logits = _cost_of(lambda: workspace.run_whole(head, inputs), site.device)
    share_of_model = graph.num_layers / site.graph.num_layers
    return passes.divided_by(batch.num_tokens * share_of_model), logits.divided_by(batch.num_logit_rows)


def _measure_attention(site: Site, kind: OpKind, requests: DenseBatch) -> Cost:
    """Cost of one key of one layer in attention of this kind, measured on these requests."""
    num_keys = int(requests.context_len.sum())
    key_bytes = min(kind.attention.cached_bytes(site.dtype.itemsize) for kind in site.graph.kinds)
    graph = shortened(site.graph, num_keys * key_bytes)
    workspace = random_workspace(
        site,
        graph,
        attention_weights(site, graph),
        num_pages=len(requests.new_pages),
        num_tokens=requests.num_tokens,
        num_rows=requests.num_requests,
    )
    visible = visible_keys(requests.positions.astype(np.int64) + 1, graph.windows)
    return _cost_of(over_layers(workspace, lambda op: op.kind is kind, requests), site.device).divided_by(visible)


def _cost_of(work: Work, device: torch.device) -> Cost:
    measured = sustained(work, device)
    return Cost(time_s=measured.time_s, energy_j=measured.energy_j, clock_mhz=measured.clock_mhz)
