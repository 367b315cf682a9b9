"""Load on an OpenAI-compatible server, nanoflow's or another's: requests arrive in time and stream their tokens back.

A request arrives at its drawn time; under `max_concurrency` it arrives when one of so many clients is free to send it.
A failed request is counted with its reason and spoils no other. What the server is made of is not known here; the
same work in process is `offline.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from typing import Any

import httpx
import msgspec
from tqdm import tqdm

from nanoflow.bench.config import BenchConfig, LoadConfig
from nanoflow.bench.metrics import RequestRecord, RunMetrics, measure, parse_limits
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.bench.workload import BenchRequest, make_requests

_PATHS = {"completions": "completions", "chat": "chat/completions"}


class RequestFailed(Exception):
    """The server did not complete a request; one line says why."""


def run_serve(load: LoadConfig, config: BenchConfig) -> BenchRecord:
    """Warm the server up, measure every repeat.

    Raises:
        ValueError: The workload or a limit is not usable.
        ConnectionError: There is no such server, or it does not complete the first request.
    """
    limits_ms = parse_limits(config.goodput)
    runs = [
        make_requests(config, vocab_size=load.vocab_size, request_rate=load.request_rate, repeat=repeat)
        for repeat in range(config.repeats)
    ]
    model, repeats = asyncio.run(_run(load, runs, config.num_warmup, limits_ms))
    public_load = msgspec.structs.asdict  # placeholder
    return make_record("serve", model={"name": model}, plan=None, workload=config, config=public_load, repeats=repeats)
