"""One call to the engine: several prompts at once, and what is new of each of their completions.

The engine's outputs grow in place; a `Cursor` remembers how much of a completion was shown. A complete answer is what
is new since nothing was shown, so that streams and answers are made by the same code. Knows nothing of JSON shapes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from nanoflow.outputs import CompletionOutput, FinishReason, PositionLogprobs, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server.backend import Prompt, ServingEngine
from nanoflow.server.errors import ApiError, user_errors
from nanoflow.server.responses import Usage

News = tuple[int, RequestOutput]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the engine is asked for on behalf of one HTTP request.

    Attributes:
        engine: Who generates.
        prompts: One or more.
        params: How, for each of them.
        call_id: In the answer, and the label of the engine's requests.
        field_names: Field of the body that a parameter came in, where the names differ; for errors.
        created: Seconds since 1970.
    """

    engine: ServingEngine
    prompts: Sequence[Prompt]
    params: SamplingParams
    call_id: str
    field_names: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def choice_index(self, prompt_index: int, completion: CompletionOutput) -> int:
        """Place of a completion among those of all prompts."""
        return prompt_index * self.params.n + completion.index

    async def news(self, *, streams: bool = True) -> AsyncGenerator[News, None]:
        """Yield (place of the prompt, its output) whenever the output has grown; closing it ends all prompts.

        Args:
            streams: False yields finished outputs alone.

        Raises:
            ApiError: A prompt cannot be served (400), failed (500), or the engine died (503).
        """
        news = self._of_one(0, streams) if len(self.prompts) == 1 else self._of_all(streams)
        async with aclosing(news):
            async for index, output in news:
                yield index, output

    async def outputs(self) -> list[RequestOutput]:
        """The finished outputs, in the order of the prompts; errors as in `news`."""
        last: dict[int, RequestOutput] = {}
        async with aclosing(self.news(streams=False)) as news:
            async for index, output in news:
                last[index] = output
        return [last[index] for index in range(len(self.prompts))]

    async def _of_one(self, index: int, streams: bool) -> AsyncGenerator[News, None]:
        with user_errors(fields=self.field_names):
            name = f"{self.call_id}-{index}"
            outputs = self.engine.generate(self.prompts[index], self.params, request_id=name, streams=streams)
            async with aclosing(outputs):
                async for output in outputs:
                    if output.error is not None:
                        raise ApiError(500, f"the request failed: {output.error}")
                    yield index, output

    async def _of_all(self, streams: bool) -> AsyncGenerator[News, None]:
        queue: asyncio.Queue[News | Exception | None] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        num_open = len(self.prompts)
        try:
            for index in range(num_open):
                tasks.append(asyncio.create_task(self._pump(index, streams, queue)))
                await asyncio.sleep(0)  # one prompt is tokenised in each turn of the event loop
            early = [queue.get_nowait() for _ in range(queue.qsize())]
            # A prompt that is refused comes before what others have generated meanwhile: nothing has been shown yet.
            for item in sorted(early, key=lambda item: not isinstance(item, Exception)):
                queue.put_nowait(item)
            while num_open:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, streams: bool, queue: asyncio.Queue[News | Exception | None]) -> None:
        """Put the news of one prompt into the queue, then None, or the error that ended it."""
        try:
            async with aclosing(self._of_one(index, streams)) as news:
                async for item in news:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as problem:
            queue.put_nowait(problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of a completion.

    Attributes:
        is_first: Nothing was shown before.
        text: Text that follows what was shown.
        token_ids, logprobs: Tokens that follow; `logprobs` is None unless asked for.
        finish_reason, stop_reason: Set with the last delta.
    """

    is_first: bool
    text: str
    token_ids: list[int]
    logprobs: Sequence[PositionLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None

    @property
    def is_plain(self) -> bool:
        """True if there is nothing but text in it."""
        return self.logprobs is None and self.finish_reason is None

    def with_text(self, text: str) -> Delta:
        """The same with another text."""
        return dataclasses.replace(self, text=text)


@dataclass(slots=True)
class Cursor:
    """How much of one completion was shown."""

    num_chars: int = 0
    num_tokens: int = 0
    is_finished: bool = False

    def advance(self, completion: CompletionOutput) -> Delta | None:
        """Take what is new; None if there is no new token and no end."""
        num_tokens = len(completion.token_ids)
        if self.is_finished or (num_tokens == self.num_tokens and not completion.is_finished):
            return None
        delta = Delta(
            is_first=self.num_tokens == 0,
            text=completion.text_since(self.num_chars),
            token_ids=completion.token_ids[self.num_tokens :],
            logprobs=None if completion.logprobs is None else completion.logprobs[self.num_tokens : num_tokens],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self.num_chars, self.num_tokens = completion.num_chars, num_tokens
        self.is_finished = completion.is_finished
        return delta


def new_id(kind: str) -> str:
    """An id for an answer, such as "cmpl-5f..."."""
    return f"{kind}-{uuid.uuid4().hex}"


def count_usage(outputs: Iterable[RequestOutput], *, is_completion_hidden: bool = False) -> Usage:
    """Tokens of all prompts and completions; a prompt counts once, whatever its `n`."""
    num_prompt, num_completion = 0, 0
    for output in outputs:
        num_prompt += len(output.prompt_token_ids)
        num_completion += sum(len(completion.token_ids) for completion in output.outputs)
    num_completion = 0 if is_completion_hidden else num_completion
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }
