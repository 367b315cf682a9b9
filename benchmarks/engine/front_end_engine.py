"""The engine's process of `front_end.py`: no model; every running request gets a token of a text in each iteration."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

from benchmarks.common.stub_facts import stub_facts
from benchmarks.engine.front_end import ITERATION_S, TEXT
from nanoflow.config import EngineConfig
from nanoflow.engine.messages import EngineStats, Prefetch, Prefetched, StepOutput
from nanoflow.engine.process import serve
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request


class TextEngine:
    """Requests continue one text, each from a place of its own.

    Args:
        token_ids: Tokens of the text.
        iteration_s: Minimum time of an iteration.
    """

    def __init__(self, token_ids: list[int], iteration_s: float) -> None:
        self.facts = stub_facts()
        self._text = token_ids * (2 + 8192 // len(token_ids))
        self._period = len(token_ids)
        self._iteration_s = iteration_s
        self._left: dict[int, int] = {}
        self._iteration = 0
        self._next_s = 0.0

    @property
    def has_work(self) -> bool:
        """True while a request runs."""
        return bool(self._left)

    def add(self, request: Request) -> None:
        """Start a request."""
        self._left[request.request_id] = request.max_tokens

    def reset_prefix_cache(self) -> None:
        """There is none."""

    def prefetch(self, wanted: Prefetch) -> Prefetched:
        """Nothing is cached."""
        return Prefetched(number=wanted.number, found=None)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Drop requests."""
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def step(self) -> StepOutput:
        """One token for each request."""
        time.sleep(max(self._next_s - time.perf_counter(), 0.0))
        self._next_s = time.perf_counter() + self._iteration_s
        self._iteration += 1
        request_ids = list(self._left)
        start = self._iteration % self._period
        finished = {}
        for request_id in request_ids:
            self._left[request_id] -= 1
            if not self._left[request_id]:
                finished[request_id] = Finished(reason=FinishReason.LENGTH)
                del self._left[request_id]
        return StepOutput(
            request_ids=request_ids,
            token_ids=self._text[start : start + len(request_ids)],
            finished=finished,
            stats=EngineStats(
                num_running=len(request_ids), iteration=self._iteration, iteration_tokens=len(request_ids)
            ),
        )

    def prepare_next(self) -> bool:
        """There is nothing to prepare."""
        return False

    def stats(self) -> EngineStats:
        """Current numbers of requests and iterations."""
        return EngineStats(num_running=len(self._left), iteration=self._iteration)

    def close(self) -> None:
        """Nothing to release."""


def build(config: EngineConfig) -> TextEngine:
    """The engine, with the text in tokens of a model's tokenizer."""
    token_ids = Tokenizer.load(config).encode(TEXT, add_special_tokens=False)
    return TextEngine(token_ids, float(os.environ[ITERATION_S]))


if __name__ == "__main__":
    sys.exit(serve(build, sys.argv[1]))
