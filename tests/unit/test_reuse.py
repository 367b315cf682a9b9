"""Which cached pages a request gets, and when it waits for those of another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanoflow.batch import SampledTokens
from nanoflow.kvcache.keys import page_keys, root_key
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler import Scheduler, SchedulerLimits

PAGE = 4
LIMITS = SchedulerLimits(
    max_batch_tokens=64, max_num_seqs=8, max_model_len=128, num_pages=64, page_size=PAGE, vocab_size=200
)
PROMPT = list(range(10, 10 + 8 * PAGE))


def request(number: int, prompt: list[int], **params: Any) -> Request:
    root = root_key()
    return Request(
        request_id=number,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=2, ignore_eos=True, **params),
        seed=0,
        max_tokens=2,
        page_keys=b"".join((root, *page_keys(prompt, PAGE, root))),
    )


def step(scheduler: Scheduler, errors: dict[int, str] | None = None) -> dict[int, int]:
    """Run one iteration; tokens that the requests admitted in it found in the cache."""
    batch = scheduler.schedule()
    assert batch is not None
    found = scheduler.drain_events().scheduled
    scheduler.commit(batch, SampledTokens(token_ids=np.zeros(len(batch.sampled), np.int32), errors=errors or {}))
    scheduler.check_integrity()
    return found


def test_of_two_with_one_prompt_the_second_waits_for_the_first() -> None:
    scheduler = Scheduler(limits=LIMITS)
    for number in range(2):
        scheduler.add(request(number, PROMPT))
    scheduler.add(request(2, PROMPT[::-1]))
    assert step(scheduler) == {0: 0, 2: 0}, "another prompt may pass"
    assert step(scheduler) == {1: 7 * PAGE}


def test_nobody_waits_for_a_few_tokens() -> None:
    scheduler = Scheduler(limits=LIMITS)
    for number in range(2):
        scheduler.add(request(number, PROMPT[: 3 * PAGE] + [number] * 5 * PAGE))
    assert step(scheduler) == {0: 0, 1: 0}


def test_a_prompt_that_is_scored_is_computed_and_can_be_found() -> None:
    scheduler = Scheduler(limits=LIMITS)
    scheduler.add(request(0, PROMPT, prompt_logprobs=1))
    scheduler.add(request(1, PROMPT, prompt_logprobs=1))
    scheduler.add(request(2, PROMPT))
    assert step(scheduler) == {0: 0, 1: 0}
    assert step(scheduler) == {2: 7 * PAGE}


def test_an_aborted_request_leaves_nobody_waiting() -> None:
    scheduler = Scheduler(limits=LIMITS)
    long = list(range(10, 10 + 96))
    scheduler.add(request(0, long))
    scheduler.add(request(1, long))
    assert step(scheduler) == {0: 0}
    assert scheduler.abort(0)
    assert step(scheduler) == {1: 64}, "what was computed before the end is found, the rest is not waited for"


@pytest.mark.parametrize("is_failing", [False, True])
def test_pages_of_a_request_that_failed_are_not_found(is_failing: bool) -> None:
    scheduler = Scheduler(limits=LIMITS)
    scheduler.add(request(0, PROMPT))
    step(scheduler, {0: "its logits are not finite"} if is_failing else None)
    scheduler.abort(0)
    scheduler.add(request(1, PROMPT))
    assert step(scheduler) == {1: 0 if is_failing else 7 * PAGE}
