"""Workloads: how long prompts and completions are, which tokens, and when requests arrive.

Everything is drawn from a seed, so that two engines can get the same work. `bench/offline.py` and `bench/online.py` run
it.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from nanoflow.config import ConfigError

logger = logging.getLogger(__name__)

# Longer requests of a trace are left out, as in the scripts of the NanoFlow paper.
MAX_TRACE_PROMPT = 3072
MAX_TRACE_OUTPUT = 1024
MAX_TRACE_TOTAL = 4096
_TRACE_LIMITS = (
    f"a request of a trace has 1 to {MAX_TRACE_PROMPT:,} prompt tokens and 1 to {MAX_TRACE_OUTPUT:,} output tokens, "
    f"{MAX_TRACE_TOTAL:,} in all"
)

_TRACE = "trace:"
# One kind of a mix: prompt tokens, output tokens, share.
_KIND = re.compile(r"([1-9]\d*)/([1-9]\d*)(?:x([1-9]\d{0,4}))?")

# Independent random streams of one seed.
_LENGTHS, _PROMPTS, _ARRIVALS, _UNDER_WAY = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a request's prompt and completion; the first `num_computed` of the prompt are in the cache already."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_computed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request of a workload; `arrival_s` is in seconds from the start of the run."""

    prompt_token_ids: list[int]
    num_output_tokens: int
    arrival_s: float


def make_requests(
    lengths: Sequence[Lengths], *, vocab_size: int, seed: int, repeat: int = 0, request_rate: float = math.inf
) -> list[BenchRequest]:
    """The requests of one repeat.

    Repeats differ only in the tokens of the prompts, so that no prefix cache makes a later one faster.
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
    """Lengths of requests, in random order.

    Those of a trace are drawn without repetition as far as it goes. Of a mix there are as many of each kind as its
    shares say.

    Args:
        workload: IN/OUT (prompt tokens/output tokens of every request), a mix of several, each with its share
            ("8000/100x1,200/1000x12"; the share 1 may be left out), or trace:FILE.csv.
        num_requests: How many.
        seed: Of the draw.

    Raises:
        ConfigError: The workload is none of these, or its trace cannot be read.
    """
    kinds, rng = kinds_of(workload), np.random.default_rng((_LENGTHS, seed))
    if workload.startswith(_TRACE):
        return [kinds[row] for row in rng.choice(len(kinds), num_requests, replace=num_requests > len(kinds))]
    whole, rest = divmod(num_requests, len(kinds))
    places = [*range(len(kinds))] * whole + rng.choice(len(kinds), rest, replace=False).tolist()
    return [kinds[place] for place in rng.permutation(places)]


def kinds_of(workload: str) -> list[Lengths]:
    """The lengths that requests of a workload have, those of a mix as often as their share says.

    Raises:
        ConfigError: As `draw_lengths`.
    """
    if workload.startswith(_TRACE):
        return read_trace(Path(workload.removeprefix(_TRACE)))
    found = list[Lengths]()
    for text in workload.split(","):
        match = _KIND.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"workload must be IN/OUT (as 512/512), a mix (as 8000/100x1,200/1000x12) or trace:FILE.csv, "
                f"got {workload!r}"
            )
        found += [Lengths(num_prompt_tokens=int(match[1]), num_output_tokens=int(match[2]))] * int(match[3] or 1)
    return found


def under_way(lengths: Sequence[Lengths], num_keys: int, most: int, max_batch_tokens: int, seed: int) -> list[Lengths]:
    """The requests of an engine in its steady state, made so that they can all be submitted at once.

    Each request is at a uniformly random point of its completion. A request is drawn with probability in proportion to
    the length of its completion, as long ones run longer. The tokens generated so far are counted as prompt, and all
    but the last of them as computed. The number of requests is also limited by the rate at which prompts can be
    computed: the share of decode tokens in an iteration is the share of output tokens in all tokens.

    Args:
        lengths: The workload to draw from.
        num_keys: Capacity of the KV cache in tokens.
        most: Largest number of running requests.
        max_batch_tokens: Token budget of an iteration.
        seed: Seed of the draw.
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
    """The request after `num_generated` tokens of its completion."""
    num_known = length.num_prompt_tokens + num_generated
    return Lengths(
        num_prompt_tokens=num_known,
        num_output_tokens=length.num_output_tokens - num_generated,
        num_computed=num_known - 1,
    )


def read_trace(path: Path) -> list[Lengths]:
    """The lengths of a trace (columns ContextTokens and GeneratedTokens) without requests that are too long.

    A warning says how many were left out.

    Raises:
        ConfigError: The file cannot be read, is no such table, or has no request that is short enough.
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
        raise ConfigError(f"trace {path} has no request short enough: {_TRACE_LIMITS}")
    if len(kept) < len(rows):
        _say_left_out(path, len(rows) - len(kept), len(rows))
    return kept


@cache
def _say_left_out(path: Path, num_left_out: int, num_rows: int) -> None:
    """Once a process, however often the trace is read."""
    logger.warning("%s: %d of %d requests are left out: %s", path, num_left_out, num_rows, _TRACE_LIMITS)


def draw_arrivals(num_requests: int, request_rate: float, seed: int) -> list[float]:
    """Poisson arrival times in seconds from the start (exponential gaps with mean 1 / rate); all 0 if rate is inf."""
    gaps_s = np.random.default_rng((_ARRIVALS, seed)).exponential(1.0, num_requests) / request_rate
    return [float(time_s) for time_s in np.cumsum(gaps_s)]
