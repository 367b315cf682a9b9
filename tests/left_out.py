"""A real engine whose background requests are left out of iterations: their tokens must stay what they are alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.priorities import BATCH, Priority
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.pace import Pace
from tests.driving import greedy, random_prompts

_NUM_TOKENS = 12


def tokens_alone_and_beside(device: str) -> tuple[list[list[int]], list[list[int]], int]:
    """Greedy tokens of background requests alone and beside interactive ones that leave no time, and how often not.

    Returns:
        The tokens of each request, alone and beside, and the number of iterations beside that had none of theirs.
    """
    config = EngineConfig(
        model="default", device=device, dtype="float32", max_num_seqs=16, max_batch_tokens=256, num_pages=400
    )
    engine = build_engine(config)
    try:
        prompts = random_prompts(8, engine.facts.vocab_size, longest=40)
        alone, _ = _run(engine, [(prompt, BATCH) for prompt in prompts[:4]])
        engine._scheduler.pace = Pace(max_itl_s=1e-6, iteration_time=IterationTime(token_s=1.0))
        engine._times = None
        both = [(prompt, BATCH if place < 4 else 0) for place, prompt in enumerate(prompts)]
        beside, num_without = _run(engine, both)
        engine.check_integrity()
        assert engine.stats().pages_in_use == 0
    finally:
        engine.close()
    return alone, beside[:4], num_without


def _run(engine: Engine, asked: Sequence[tuple[list[int], Priority]]) -> tuple[list[list[int]], int]:
    """Tokens of each request, and iterations without tokens of background requests while there are some."""
    tokens: list[list[int]] = [[] for _ in asked]
    params = greedy(_NUM_TOKENS)
    # The background requests have begun when the others come.
    for number, (prompt, priority) in enumerate(asked):
        if priority == 0:
            continue
        _add(engine, number, prompt, priority, params)
    num_without, last = 0, engine.stats().classes["batch"].num_tokens
    for step in range(10_000):
        if step == 4:
            for number, (prompt, priority) in enumerate(asked):
                if priority == 0:
                    _add(engine, number, prompt, priority, replace(params, max_tokens=2 * _NUM_TOKENS))
        if step > 4 and not engine.has_work:
            break
        output = engine.step()
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            tokens[request_id].append(token_id)
        counts = engine.stats().classes["batch"]
        num_without += counts.num_running > 0 and counts.num_tokens == last
        last = counts.num_tokens
    return tokens, num_without


def _add(engine: Engine, number: int, prompt: list[int], priority: Priority, params: SamplingParams) -> None:
    engine.add(
        Request(
            request_id=number,
            prompt_token_ids=prompt,
            params=params,
            seed=number,
            max_tokens=params.max_tokens or 1,
            priority=priority,
        )
    )
