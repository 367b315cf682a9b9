"""Bounds of the throughput: tokens/s of a workload if each operation ran alone at the rate measured on this device.

The *serial bound* is the time of GEMMs, decode attention and prefill attention one after the other, without gaps and
without anything else. Each part has the clock and power that it reached alone. On a card limited by power, an engine
that mixes power-hungry operations with others can exceed it, and then it is no bound. The *optimal throughput* (paper
eq. 5) counts the GEMMs alone. This file counts work and adds up; `rates.py` measures.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.operation import BatchShape
from nanoflow.workload import Lengths

Windows = Sequence[int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of all requests of a workload.

    Attributes:
        num_tokens: Prompt and output tokens; each goes through the GEMMs of every layer.
        num_logit_rows: Output tokens; each goes through the language-model head.
        num_decode_keys: Sum over layers and decodes of the keys attended to.
        num_prefill_keys: Sum over layers and prompt tokens of the keys attended to.
    """

    num_tokens: int
    num_logit_rows: int
    num_decode_keys: int
    num_prefill_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalBatch:
    """The batch of the steady state, at whose sizes the rates are measured.

    Attributes:
        num_tokens: Rows of the GEMMs: the token budget.
        num_logit_rows: Rows of the language-model head.
        num_decodes, decode_context: Number of decodes, and keys of each; no decodes if every request asks for one
        token.
        num_prefills, prefill_before, prefill_tokens: Number of prompts in the batch, and tokens of each that were
            computed before and are computed now.
    """

    num_tokens: int
    num_logit_rows: int
    num_decodes: int
    decode_context: int
    num_prefills: int
    prefill_before: int
    prefill_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time, energy and clock of one unit of work; None where they cannot be measured."""

    time_s: float
    energy_j: float | None = None
    clock_mhz: float | None = None

    def divided_by(self, count: float) -> Cost:
        """The cost of one of `count` equal parts."""
        return Cost(
            time_s=self.time_s / count,
            energy_j=None if self.energy_j is None else self.energy_j / count,
            clock_mhz=self.clock_mhz,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured costs.

    Attributes:
        token: One token in the GEMMs of all layers.
        logit_row: One row in the language-model head.
        decode_key: One key of one layer in decode attention; None without decodes.
        prefill_key: One pair of token and visible key of one layer in prefill attention.
    """

    token: Cost
    logit_row: Cost
    decode_key: Cost | None
    prefill_key: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a workload on the device that ran it, and the rates behind them.

    Attributes:
        serial_tokens_per_s, optimal_tokens_per_s: Prompt and output tokens per second.
        serial_energy_per_token_j, optimal_energy_per_token_j: Joules; None without an energy counter.
        gemm_tflops, lm_head_tflops, prefill_tflops: 1e12 operations/s; prefill attention counts visible pairs only.
        decode_kv_bytes_per_s: Bytes of keys and values, each read once; None without decodes.
        batch: Sizes at which these rates were measured.
        clocks_mhz: Clock of the SMs during the measurement, by name of the part; empty without a GPU.
    """

    serial_tokens_per_s: float
    optimal_tokens_per_s: float
    serial_energy_per_token_j: float | None
    optimal_energy_per_token_j: float | None
    gemm_tflops: float
    lm_head_tflops: float
    prefill_tflops: float
    decode_kv_bytes_per_s: float | None
    batch: TypicalBatch
    clocks_mhz: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def serial_power_w(self) -> float | None:
        """Mean power of the serial bound in watts; None without an energy counter."""
        energy_j = self.serial_energy_per_token_j
        return None if energy_j is None else energy_j * self.serial_tokens_per_s


def work_of(lengths: Sequence[Lengths], windows: Windows) -> Work:
    """Count the work of requests on a model whose layers have these sliding windows.

    A request of p prompt and d output tokens gets its first output token from the last position of its prompt. So it
    decodes d - 1 times, attending to p + 1 up to p + d - 1 keys.
    """
    num_decode_keys = num_prefill_keys = 0
    for length, count in Counter(lengths).items():
        prompt, total = length.num_prompt_tokens, length.num_prompt_tokens + length.num_output_tokens
        num_prefill_keys += count * visible_keys(np.arange(1, prompt + 1), windows)
        num_decode_keys += count * visible_keys(np.arange(prompt + 1, total), windows)
    return Work(
        num_tokens=sum(length.num_prompt_tokens + length.num_output_tokens for length in lengths),
        num_logit_rows=sum(length.num_output_tokens for length in lengths),
        num_decode_keys=num_decode_keys,
        num_prefill_keys=num_prefill_keys,
    )


def visible_keys(contexts: NDArray[np.int64], windows: Windows) -> int:
    """Sum over layers and tokens of the keys seen, for tokens with these contexts (each including the token itself)."""
    return sum(
        count * int((contexts if window is None else np.minimum(contexts, window)).sum())
        for window, count in Counter(windows).items()
    )


def typical_batch(lengths: Sequence[Lengths], *, max_batch_tokens: int, max_num_seqs: int) -> TypicalBatch:
    """The batch of the steady state: a full budget, with prompt and output tokens in the workload's ratio.

    A prompt that fits in the prompts' share of the budget is there whole; of a longer one it is a chunk from its
    middle. Decodes are at most the requests that may run. The prompts' share does not shrink with them, because this is
    for a bound. Pages are assumed to suffice.
    """
    num_prompt = sum(length.num_prompt_tokens for length in lengths)
    num_output = sum(length.num_output_tokens for length in lengths)
    num_decodes = num_output - len(lengths)
    rows = min(max_batch_tokens * num_output / (num_prompt + num_output), max_num_seqs, len(lengths))
    chunk = max(round(min(max_batch_tokens * num_prompt / (num_prompt + num_output), num_prompt)), 1)
    mean_prompt = max(round(num_prompt / len(lengths)), 1)
    context_sum = work_of(lengths, (None,)).num_decode_keys
    return TypicalBatch(
        num_tokens=max_batch_tokens,
        num_logit_rows=max(round(rows), 1),
        num_decodes=max(round(rows * num_decodes / num_output), 1) if num_decodes else 0,
        decode_context=round(context_sum / num_decodes) if num_decodes else 0,
        num_prefills=max(round(chunk / mean_prompt), 1),
        prefill_before=max(mean_prompt - chunk, 0) // 2,
        prefill_tokens=min(mean_prompt, chunk),
    )


def bounds_of(graph: OpGraph, work: Work, batch: TypicalBatch, rates: Rates, dtype_bytes: int) -> Bounds:
    """Add up the work at the measured costs."""
    gemms = ((work.num_tokens, rates.token), (work.num_logit_rows, rates.logit_row))
    attention = ((work.num_decode_keys, rates.decode_key), (work.num_prefill_keys, rates.prefill_key))
    optimal = _total(gemms)
    serial = _total((count, cost) for count, cost in (*gemms, *attention) if cost is not None)
    one_token = BatchShape(num_tokens=1, num_sampled=1)
    layer_flops = sum(
        count * sum(op.flops(one_token) for op in kind.operations if op.is_product) for kind, count in graph.kind_counts
    )
    head_flops = sum(op.flops(one_token) for op in graph.epilogue if op.is_product)
    # Average over the layers.
    key_bytes = graph.kv_bytes_per_token(dtype_bytes) / graph.num_layers
    q_width = sum(kind.attention.q_width * count for kind, count in graph.kind_counts) / graph.num_layers
    return Bounds(
        serial_tokens_per_s=work.num_tokens / serial.time_s,
        optimal_tokens_per_s=work.num_tokens / optimal.time_s,
        serial_energy_per_token_j=serial.divided_by(work.num_tokens).energy_j,
        optimal_energy_per_token_j=optimal.divided_by(work.num_tokens).energy_j,
        gemm_tflops=layer_flops / rates.token.time_s / 1e12,
        lm_head_tflops=head_flops / rates.logit_row.time_s / 1e12,
        prefill_tflops=4 * q_width / rates.prefill_key.time_s / 1e12,
        decode_kv_bytes_per_s=None if rates.decode_key is None else key_bytes / rates.decode_key.time_s,
        batch=batch,
        clocks_mhz=_clocks_mhz(rates),
    )


def _clocks_mhz(rates: Rates) -> dict[str, float]:
    parts = {
        "GEMMs": rates.token,
        "lm_head": rates.logit_row,
        "decode attention": rates.decode_key,
        "prefill attention": rates.prefill_key,
    }
    return {name: cost.clock_mhz for name, cost in parts.items() if cost is not None and cost.clock_mhz is not None}


def _total(parts: Iterable[tuple[int, Cost]]) -> Cost:
    """Sum of units times cost; energy only if it is known for every part."""
    parts = list(parts)
    energies_j = [count * cost.energy_j for count, cost in parts if cost.energy_j is not None]
    return Cost(
        time_s=sum(count * cost.time_s for count, cost in parts),
        energy_j=sum(energies_j) if len(energies_j) == len(parts) else None,
    )
