"""A bound on the time of iterations cuts prompts, never decodes, and never to nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.graph.operation import BatchShape
from nanoflow.plan.iteration_time import IterationTime
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Pace, SchedulerLimits
from tests.unit.fake_executor import Drive

TIME = IterationTime(fixed_s=1e-3, token_s=1e-5, key_s=1e-7, pair_s=1e-8)
PACE = Pace(max_itl_s=10e-3, iteration_time=TIME, min_prompt_tokens=16)
BUDGET = 2048


def max_tokens(pace: Pace, requests: list[tuple[int, int]]) -> int:
    """For requests of (tokens computed, tokens pending), decodes first."""
    computed, pending = np.array(requests, dtype=np.int64).reshape(-1, 2).T
    return pace.max_tokens(BUDGET, computed, pending)


def time_s(requests: list[tuple[int, int]], num_tokens: int) -> float:
    """Of an iteration of so many tokens, added up token by token; what is left begins a new prompt."""
    decode_keys = sum(computed + 1 for computed, pending in requests if pending == 1)
    num_decodes = sum(pending == 1 for _, pending in requests)
    left, pairs = num_tokens - num_decodes, 0
    for computed, pending in [*(r for r in requests if r[1] > 1), (0, BUDGET)]:
        taken = min(left, pending)
        pairs += sum(computed + i + 1 for i in range(taken))
        left -= taken
    return TIME.predict_s(BatchShape(num_tokens=num_tokens, decode_context=decode_keys, prefill_context=pairs))


def test_without_a_bound_or_a_prediction_or_anybody_who_waits_it_is_the_budget() -> None:
    prompts_and_decode = [(100, 1), (0, 5000)]
    assert max_tokens(Pace(), prompts_and_decode) == BUDGET
    assert max_tokens(Pace(max_itl_s=1e-9), prompts_and_decode) == BUDGET
    assert max_tokens(Pace(iteration_time=TIME), prompts_and_decode) == BUDGET
    assert max_tokens(PACE, [(0, 5000)]) == max_tokens(PACE, []) == BUDGET


requests_lists = st.tuples(
    st.lists(st.tuples(st.integers(0, 3000), st.just(1)), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(2, 900)), max_size=5),
).map(lambda parts: [*parts[0], *parts[1]])


@given(requests_lists)
def test_it_is_the_most_tokens_within_the_bound_and_at_least_a_few_of_prompts(requests: list[tuple[int, int]]) -> None:
    found = max_tokens(PACE, requests)
    least = sum(pending == 1 for _, pending in requests) + PACE.min_prompt_tokens
    assert least <= found <= BUDGET
    assert found == least or time_s(requests, found) <= 10e-3 * (1 + 1e-9)
    assert found == BUDGET or time_s(requests, found + 1) > 10e-3 * (1 - 1e-9)


def test_late_in_a_long_prompt_a_chunk_is_smaller() -> None:
    found = [max_tokens(PACE, [(100, 1), (computed, 5000)]) for computed in (0, 1000, 10_000, 100_000)]
    assert found == sorted(found, reverse=True) and len(set(found)) == 4
    assert found[-1] == 1 + PACE.min_prompt_tokens


def test_decodes_alone_are_never_held_back() -> None:
    assert max_tokens(PACE, [(50_000, 1)] * 500) == 500 + PACE.min_prompt_tokens
    assert max_tokens(PACE, [(50_000, 1)] * 3000) == BUDGET


@pytest.mark.parametrize("wrong", [{"max_itl_s": 0.0}, {"min_prompt_tokens": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Pace(**wrong)  # type: ignore[arg-type]


def test_the_scheduler_cuts_prompts_while_others_decode_and_changes_no_token() -> None:
    limits = SchedulerLimits(
        max_batch_tokens=64, max_num_seqs=4, max_model_len=256, num_pages=64, page_size=16, vocab_size=31
    )

    def run(pace: Pace) -> tuple[list[list[int]], list[tuple[int, int]]]:
        drive, batches = Drive(limits, depth=1), []
        drive.scheduler.pace = pace
        for request_id, num_prompt in enumerate((10, 200, 130)):
            params = SamplingParams(max_tokens=30, ignore_eos=True)
            request = Request(
                request_id=request_id, prompt_token_ids=[3] * num_prompt, params=params, seed=0, max_tokens=30
            )
            drive.add(request)
            batch = drive.step()
            assert batch is not None
            batches.append((batch.num_decodes, batch.num_tokens))
        while drive.scheduler.has_unfinished:
            if batch := drive.step():
                batches.append((batch.num_decodes, batch.num_tokens))
            drive.scheduler.check_integrity()
        return [answer.token_ids for answer in drive.answers.values()], batches

    tokens, batches = run(Pace())
    bound = Pace(max_itl_s=20e-3, iteration_time=IterationTime(token_s=1e-3), min_prompt_tokens=8)
    bounded_tokens, bounded = run(bound)
    assert bounded_tokens == tokens
    assert max(num_tokens for num_decodes, num_tokens in batches if num_decodes) == 64
    assert max(num_tokens for num_decodes, num_tokens in bounded if num_decodes) == 20
