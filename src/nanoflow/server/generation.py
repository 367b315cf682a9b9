"""One call to the engine: several prompts at once, and what is new in each of their completions.

The engine's outputs grow in place; a `Cursor` remembers how much of a completion was sent. A whole answer is what is
new when nothing was sent before, so the same code makes streams and whole answers. Other files make JSON of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, overload

from nanoflow.engine.prompts import Prompt as ReadPrompt
from nanoflow.engine.prompts import with_names
from nanoflow.outputs import CompletionOutput, FinishReason, PositionLogprobs, RequestOutput
from nanoflow.priorities import Priority, is_background
from nanoflow.request import RequestError, SamplingParams
from nanoflow.server.admission import Admission
from nanoflow.server.backend import AnyPrompt, ServingEngine
from nanoflow.server.errors import ApiError, user_errors
from nanoflow.server.responses import Usage
from nanoflow.server.tracing import RequestTrace

News = tuple[int, RequestOutput]


class Doors(Protocol):
    """The checks and conversions of a call before its prompts go to the engine."""

    @property
    def admission(self) -> Admission:
        """Whether there is room."""

    async def read_prompts(self, prompts: Sequence[AnyPrompt]) -> list[AnyPrompt]:
        """Texts as tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the engine is asked for on behalf of one HTTP request.

    Attributes:
        engine: The engine.
        prompts: One or more.
        params: How, for each of them.
        doors: What lets the call in; None lets every call in, with its prompts as they are.
        cache_salt: Cached pages are shared only with calls that have the same one, or none.
        session_id: Name of the conversation that the call is a turn of, with that of its key; None if it has none.
        trace: Is told of the outputs; None if requests are not traced.
        priority: Who goes first (`priorities.py`).
        call_id: In the answer, and the label of the engine's requests.
        field_names: Field of the body that a parameter came in, where the names differ; for errors.
        explain: Says what an error of the engine about the request is about in the body, where that is not a field.
        created: Seconds since 1970.
    """

    engine: ServingEngine
    prompts: Sequence[AnyPrompt]
    params: SamplingParams
    doors: Doors | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    trace: RequestTrace | None = None
    priority: Priority = 0
    call_id: str
    field_names: Mapping[str, str] = field(default_factory=dict)
    explain: Callable[[RequestError], RequestError] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def choice_index(self, prompt_index: int, completion: CompletionOutput) -> int:
        """Index of a completion among those of all prompts."""
        return prompt_index * self.params.n + completion.index

    async def news(self, *, streams: bool = True) -> AsyncGenerator[News, None]:
        """Yield (index of the prompt, its output) whenever an output has grown; closing this aborts all prompts.

        Args:
            streams: False yields only finished outputs.

        Raises:
            ApiError: There is no room (429), a prompt cannot be served (400), failed (500), or the engine died (503).
        """
        prompts: Sequence[AnyPrompt] = self.prompts
        n = self.params.n
        with contextlib.ExitStack() as rooms:
            see = None if self.trace is None else rooms.enter_context(self.trace.followed())
            if self.doors is not None:
                room, is_batch = self.doors.admission.room, is_background(self.priority)
                rooms.enter_context(room(len(prompts) * n, is_background=is_batch))
                prompts = await self.doors.read_prompts(self.prompts)
                num_tokens = sum(len(_token_ids(prompt)) for prompt in prompts)
                rooms.enter_context(room(0, num_tokens * n, is_background=is_batch))
            news = self._of_one(prompts[0], 0, streams) if len(prompts) == 1 else self._of_all(prompts, streams)
            async with aclosing(news):
                async for index, output in news:
                    if see is not None:
                        see(index, output)
                    yield index, output

    async def outputs(self) -> list[RequestOutput]:
        """The finished outputs, in the order of the prompts; errors as in `news`."""
        last: dict[int, RequestOutput] = {}
        async with aclosing(self.news(streams=False)) as news:
            async for index, output in news:
                last[index] = output
        return [last[index] for index in range(len(self.prompts))]

    async def _of_one(self, prompt: AnyPrompt, index: int, streams: bool) -> AsyncGenerator[News, None]:
        with user_errors(fields=self.field_names, explain=self.explain):
            name = f"{self.call_id}-{index}"
            # A prompt without names stays as it is.
            names = {
                "cache_salt": self.cache_salt,
                "session_id": self.session_id,
                "priority": self.priority or None,
            }
            whole: Any = with_names(prompt, **names)
            outputs = self.engine.generate(whole, self.params, request_id=name, streams=streams)
            async with aclosing(outputs):
                async for output in outputs:
                    if output.error is not None:
                        raise ApiError(500, f"the request failed: {output.error}")
                    yield index, output

    async def _of_all(self, prompts: Sequence[AnyPrompt], streams: bool) -> AsyncGenerator[News, None]:
        queue: asyncio.Queue[News | Exception | None] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        num_open = len(prompts)
        try:
            for index, prompt in enumerate(prompts):
                tasks.append(asyncio.create_task(self._pump(prompt, index, streams, queue)))
                await asyncio.sleep(0)  # one prompt begins in each turn of the event loop
            early = [queue.get_nowait() for _ in range(queue.qsize())]
            # If a prompt is refused, raise that before anything of other prompts is yielded: nothing was sent yet.
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

    async def _pump(
        self, prompt: AnyPrompt, index: int, streams: bool, queue: asyncio.Queue[News | Exception | None]
    ) -> None:
        """Put the news of one prompt into the queue, then None, or the error that ended it."""
        try:
            async with aclosing(self._of_one(prompt, index, streams)) as news:
                async for item in news:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as problem:
            queue.put_nowait(problem)


class Window(Sequence[PositionLogprobs]):
    """A slice of log probabilities, which may still grow; an entry's mapping is made when it is read."""

    def __init__(self, whole: Sequence[PositionLogprobs], start: int, end: int) -> None:
        self._whole = whole
        self._places = range(start, end)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> PositionLogprobs: ...
    @overload
    def __getitem__(self, place: slice) -> list[PositionLogprobs]: ...
    def __getitem__(self, place: int | slice) -> PositionLogprobs | list[PositionLogprobs]:
        if isinstance(place, slice):
            return [self._whole[i] for i in self._places[place]]
        return self._whole[self._places[place]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new in a completion.

    Attributes:
        is_first: Whether nothing was sent before.
        text: The new text.
        token_ids, logprobs: The new tokens; `logprobs` is None unless asked for.
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
        """True if it has only text."""
        return self.logprobs is None and self.finish_reason is None

    @property
    def num_entries(self) -> int:
        """Number of its tokens and log probabilities."""
        return len(self.token_ids) + (len(self.logprobs) * len(self.logprobs[0]) if self.logprobs else 0)

    def with_text(self, text: str) -> Delta:
        """A copy with another text."""
        return dataclasses.replace(self, text=text)


@dataclass(slots=True)
class Cursor:
    """How much of one completion was sent."""

    num_chars: int = 0
    num_tokens: int = 0
    is_finished: bool = False

    def advance(self, completion: CompletionOutput) -> Delta | None:
        """Return what is new since the last call; None if there is no new token and no end."""
        num_tokens = len(completion.token_ids)
        if self.is_finished or (num_tokens == self.num_tokens and not completion.is_finished):
            return None
        delta = Delta(
            is_first=self.num_tokens == 0,
            text=completion.text_since(self.num_chars),
            token_ids=completion.token_ids[self.num_tokens :],
            logprobs=None if completion.logprobs is None else Window(completion.logprobs, self.num_tokens, num_tokens),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self.num_chars, self.num_tokens = completion.num_chars, num_tokens
        self.is_finished = completion.is_finished
        return delta


def _token_ids(prompt: AnyPrompt) -> Sequence[Any]:
    """Tokens of a prompt; of one that is text still, its characters stand for them."""
    return prompt.token_ids if isinstance(prompt, ReadPrompt) else prompt


def new_id(kind: str) -> str:
    """An id for an answer, such as "cmpl-5f..."."""
    return f"{kind}-{uuid.uuid4().hex}"


def count_usage(outputs: Iterable[RequestOutput], *, is_completion_hidden: bool = False) -> Usage:
    """Tokens of all prompts and completions; a prompt counts once, whatever its `n`."""
    num_prompt, num_completion, num_cached = 0, 0, 0
    for output in outputs:
        num_prompt += len(output.prompt_token_ids)
        num_cached += output.num_cached_tokens
        num_completion += sum(len(completion.token_ids) for completion in output.outputs)
    num_completion = 0 if is_completion_hidden else num_completion
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
