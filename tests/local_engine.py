"""The engine's interface to the server, in this thread: any tokenizer, and completions that repeat their prompt."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncGenerator

from nanoflow.engine.messages import EngineFacts, EngineStats, PlaceLogprobs, PrefetchCounts, StepOutput
from nanoflow.engine.observer import Observer
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import read_prompt
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import RequestOutput
from nanoflow.request import Request, SamplingParams
from nanoflow.server.backend import EnginePrompt
from tests.fake_engine import FakeEngine, fake_facts


class LocalEngine:
    """`FakeEngine` with an `OutputProcessor`; prompts are scored at once."""

    heartbeat_age_s = 0.0
    is_alive = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.observer: Observer | None = None
        self.tokenizer = tokenizer
        self.facts: EngineFacts = dataclasses.replace(fake_facts(), vocab_size=tokenizer.vocab_size + 1)
        self.stats = EngineStats()
        self._engine = FakeEngine()
        self._processor = OutputProcessor(self.facts, tokenizer)
        self._numbers = itertools.count()

    async def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        name = request_id or str(next(self._numbers))
        output, requests = self._processor.add(name, read_prompt(prompt, self.tokenizer), params)
        if params.prompt_logprobs is not None and len(output.prompt_token_ids) > 1:
            self._processor.process(StepOutput(prompt_logprobs={requests[0].request_id: _scores(requests[0])}))
        for request in requests:
            self._engine.add(request)
        while not output.finished:
            self._processor.process(self._engine.step())
            self._processor.refresh(output)
            self._engine.abort(self._processor.take_stopped())
            if streams or output.finished:
                yield output

    async def prefetch(self, prompt: EnginePrompt) -> PrefetchCounts:
        raise NotImplementedError

    async def prefetch_session(self, session_id: str) -> PrefetchCounts | None:
        raise NotImplementedError


def _scores(request: Request) -> PlaceLogprobs:
    """Each token is the most probable one."""
    token_ids = request.prompt_token_ids[1:]
    return PlaceLogprobs(
        first_position=1,
        token_ids=[[token_id] for token_id in token_ids],
        logprobs=[[-1.0]] * len(token_ids),
        ranks=[1] * len(token_ids),
    )
