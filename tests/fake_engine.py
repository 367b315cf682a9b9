"""An engine without a model: the interface of `Engine`, with tokens that depend on the prompt only.

Completion token i of a request is `prompt[i % len(prompt)]`, so a completion repeats its prompt. Some prompt tokens,
named below, cause errors.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from benchmarks.common.stub_facts import stub_facts

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.engine.messages import (
    EngineFacts,
    EngineStats,
    PlaceLogprobs,
    Prefetch,
    PrefetchCounts,
    Prefetched,
    StepOutput,
)
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request

VOCAB_SIZE = 400
MAX_MODEL_LEN = 256
REFUSED, FAILING, CRASHING, SLOW = 390, 391, 392, 393
STEP_S = 0.02


def fake_facts() -> EngineFacts:
    """Facts of an engine for the toy tokenizers."""
    return stub_facts(
        model_type="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(0,),
        num_pages=256,
        max_batch_tokens=256,
        max_num_seqs=64,
    )


class FakeEngine:
    """Gives every unfinished request one token per step."""

    def __init__(self) -> None:
        self.facts = fake_facts()
        self.is_closed = False
        self.aborted: list[int] = []
        self._requests: dict[int, Request] = {}
        self._num_generated: dict[int, int] = {}
        self._new: list[int] = []
        self._iteration = self.num_resets = 0

    def add(self, request: Request) -> None:
        if REFUSED in request.prompt_token_ids:
            raise ValueError("the fake engine refuses this prompt")
        self._requests[request.request_id] = request
        self._num_generated[request.request_id] = 0
        self._new.append(request.request_id)

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    def prefetch(self, wanted: Prefetch) -> Prefetched:
        """A session whose name is its number of tokens is known; half of any prompt is cached."""
        session = wanted.session
        if session is not None and not session.isdigit():
            return Prefetched(number=wanted.number, found=None)
        num_tokens = wanted.num_tokens if session is None else int(session)
        found = PrefetchCounts(num_tokens=num_tokens, num_cached_tokens=num_tokens // 2, num_prefetched_tokens=1)
        return Prefetched(number=wanted.number, found=found)

    def abort(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            self._requests.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> StepOutput:
        self._iteration += 1
        num_tokens = len(self._requests)
        ids, tokens, finished, logprobs = [], [], {}, {}
        for request in list(self._requests.values()):
            self._misbehave(request)
            request_id, done = request.request_id, self._num_generated[request.request_id]
            token_id = request.prompt_token_ids[done % len(request.prompt_token_ids)]
            self._num_generated[request_id] = done + 1
            ids.append(request_id)
            tokens.append(token_id)
            if request.params.logprobs is not None:
                logprobs[request_id] = _logprobs(token_id, request.params.logprobs)
            end = _end(request, token_id, done + 1)
            if end is not None:
                finished[request_id] = end
                del self._requests[request_id]
        scheduled, self._new = dict.fromkeys(self._new, 0), []
        return StepOutput(
            request_ids=ids,
            token_ids=tokens,
            finished=finished,
            logprobs=logprobs,
            scheduled=scheduled,
            stats=self.stats(iteration_tokens=num_tokens),
        )

    def prepare_next(self) -> bool:
        return False

    def stats(self, iteration_tokens: int = 0) -> EngineStats:
        return EngineStats(
            num_running=len(self._requests), iteration=self._iteration, iteration_tokens=iteration_tokens
        )

    def close(self) -> None:
        self.is_closed = True

    def _misbehave(self, request: Request) -> None:
        if CRASHING in request.prompt_token_ids:
            raise RuntimeError("the fake engine crashes\nwith a second line")
        if SLOW in request.prompt_token_ids:
            time.sleep(STEP_S)


def build_fake_engine(config: EngineConfig, *, show_progress: bool = False) -> FakeEngine:
    """Like `build_engine`; the model "broken" fails to load."""
    if config.model.endswith("broken"):
        raise ConfigError("this model is broken")
    return FakeEngine()


def _end(request: Request, token_id: int, num_generated: int) -> Finished | None:
    if FAILING in request.prompt_token_ids and num_generated == 2:
        return Finished(reason=FinishReason.ERROR, error="the fake engine failed here")
    if num_generated >= request.params.min_tokens:
        if token_id in request.eos_token_ids:
            return Finished(reason=FinishReason.STOP)
        if token_id in (request.params.stop_token_ids or ()):
            return Finished(reason=FinishReason.STOP, stop_token_id=token_id)
    return Finished(reason=FinishReason.LENGTH) if num_generated == request.max_tokens else None


def _logprobs(token_id: int, count: int) -> PlaceLogprobs:
    """The chosen token is the second most probable, after token 1."""
    top = [1, token_id, *range(2, 30)][:count]
    return PlaceLogprobs(
        first_position=0,
        token_ids=[[token_id, *top]],
        logprobs=[[-1.0, *(-0.5 * (rank + 1) for rank in range(len(top)))]],
        ranks=[2],
    )
