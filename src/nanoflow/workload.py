"""Workloads: how long prompts and completions are, which tokens, and when requests arrive.

Everything is drawn from a seed, so that two engines can be given the same work. Knows nothing of who computes it: see
`offline.py` and `online.py`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoflow.config import ConfigError

# What the paper's scripts keep of a trace.
MAX_TRACE_PROMPT = 3072
MAX_TRACE_OUTPUT = 1024
MAX_TRACE_TOTAL = 4096

# Independent streams of one seed.
_LENGTHS, _PROMPTS, _ARRIVALS, _UNDER_WAY = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a request's prompt and of its completion; `num_computed` of the prompt are taken to be in the cache."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_computed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request of a workload; `arrival_s` counts from the start of the run."""

    prompt_token_ids: list[int]
    num_output_tokens: int
    arrival_s: float


def make_requests(
    lengths: Sequence[Lengths], *, vocab_size: int, seed: int, repeat: int = 0, request_rate: float = math.inf
) -> list[BenchRequest]:
    """The requests of one repeat.

    Repeats differ in the tokens of the prompts only, so that no cache of prefixes can make a later one faster.
    """
    arrivals_s = draw_arrivals(len(lengths), request_rate, seed)
    prompts = np.random.default_rng((_PROMPTS, seed, repeat))
    return [
        BenchRequest(
            prompt_token_ids=prompts.integers(vocab_size, size=length.num_prompt_tokens).tolist(),
            num_output_tokens=length.num_output_tokens,
            arrival_s=arrival_s,
        )
        for length, arrival_s in zip(lengths, arrivals_s, strict=True)
    ]


def draw_lengths(workload: str, num_requests: int, seed: int) -> list[Lengths]:
    """Lengths of so many requests: the same for all, or drawn from a trace (with repetition only if it is too short).

    Raises:
        ConfigError: The workload is neither IN/OUT nor a trace that can be read.
    """
    if workload.startswith("trace:"):
        trace = read_trace(Path(workload.removeprefix("trace:")))
        rng = np.random.default_rng((_LENGTHS, seed))
        return [trace[row] for row in rng.choice(len(trace), num_requests, replace=num_requests > len(trace))]
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", workload)
    if not match:
        raise ConfigError(f"workload must be IN/OUT (as 512/512) or trace:FILE.csv, got {workload!r}")
    return [Lengths(num_prompt_tokens=int(match[1]), num_output_tokens=int(match[2]))] * num_requests


def under_way(lengths: Sequence[Lengths], num_keys: int, most: int, max_batch_tokens: int, seed: int) -> list[Lengths]:
    """The requests that an engine has which has run for long, as ones that are given to it all at once.

    Each is at some place of its completion, anywhere in it. Those with long completions stay longer, so there are more
    of them (in proportion to the completion). What a request has generated is part of its prompt here, and all but the
    last token of that is computed. Where prompts take most of an iteration, they come more slowly than the cache has
    room: decodes are that part of an iteration that completions are of all tokens.

    Args:
        lengths: What requests are drawn from.
        num_keys: Room in the cache, in tokens.
        most: Requests at once.
        max_batch_tokens: Of an iteration.
        seed: Of the draw.
    """
    rng = np.random.default_rng((_UNDER_WAY, seed))
    stay = np.array([length.num_output_tokens for length in lengths], float)
    share = stay.sum() / sum(length.num_prompt_tokens + length.num_output_tokens for length in lengths)
    count = min(most, math.ceil(max_batch_tokens * share))
    drawn = [lengths[place] for place in rng.choice(len(lengths), count, p=stay / stay.sum())]
    found = [_after(length, int(rng.integers(length.num_output_tokens))) for length in drawn]
    fits = np.cumsum([length.num_prompt_tokens for length in found]) <= num_keys
    return found[: int(fits.sum())]


def _after(length: Lengths, num_generated: int) -> Lengths:
    """A request that has generated so many of its tokens."""
    num_known = length.num_prompt_tokens + num_generated
    return Lengths(
        num_prompt_tokens=num_known,
        num_output_tokens=length.num_output_tokens - num_generated,
        num_computed=num_known - 1,
    )


def read_trace(path: Path) -> list[Lengths]:
    """The lengths of a trace, columns ContextTokens and GeneratedTokens, those that are too long left out.

    Raises:
        ConfigError: The file cannot be read, is no such table, or nothing of it is left.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise ConfigError(f"cannot read trace {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a trace with numbers in ContextTokens, GeneratedTokens: {error}") from None
    kept = [
        Lengths(num_prompt_tokens=prompt, num_output_tokens=output)
        for prompt, output in rows
        if 0 < prompt <= MAX_TRACE_PROMPT and 0 < output <= MAX_TRACE_OUTPUT and prompt + output <= MAX_TRACE_TOTAL
    ]
    if not kept:
        raise ConfigError(f"trace {path} has no request short enough")
    return kept


def draw_arrivals(num_requests: int, request_rate: float, seed: int) -> list[float]:
    """Arrival times in seconds from the start: Poisson (exponential gaps with mean 1 / rate); inf is all at 0."""
    gaps_s = np.random.default_rng((_ARRIVALS, seed)).exponential(1.0, num_requests) / request_rate
    return [float(time_s) for time_s in np.cumsum(gaps_s)]
