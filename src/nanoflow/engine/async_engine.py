"""`AsyncEngine`: completions for many callers at once, from an engine in a process of its own.

One task reads what the engine sends and wakes whoever waits for it. What becomes of tokens is `output.py`'s to know,
the process is `child.py`'s. For all prompts at once in the calling thread there is `llm.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from nanoflow.config import EngineConfig
from nanoflow.engine.child import ENGINE_MODULE, EngineChild
from nanoflow.engine.errors import EngineDeadError, EngineError
from nanoflow.engine.messages import Abort, Add, EngineFacts, EngineStats, Failed, Heartbeat, Ready, StepOutput
from nanoflow.engine.observer import Observer
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import Prompt, PromptInput, read_prompt
from nanoflow.engine.tokenizer import Tokenizer, load_tokenizer
from nanoflow.outputs import RequestOutput
from nanoflow.request import SamplingParams

__all__ = ["AsyncEngine", "EngineDeadError", "EngineError"]

logger = logging.getLogger(__name__)

# Texts from this length on are encoded in a thread: shorter ones take less than a few milliseconds.
_LONG_TEXT_CHARS = 4096
# Tokens that are taken in before other tasks of the event loop get their turn.
_TOKENS_A_SLICE = 256
_CLOSE_GRACE_S = 10.0


class AsyncEngine:
    """A running engine. Made by `start`; belongs to the event loop that it was started in.

    Attributes:
        facts: What is loaded.
    """

    def __init__(self, child: EngineChild, facts: EngineFacts, tokenizer: Tokenizer | None, seed: int) -> None:
        self.facts = facts
        self._child = child
        self._tokenizer = tokenizer
        self._processor = OutputProcessor(facts, tokenizer, seed=seed)
        self._news: dict[str, asyncio.Event] = {}
        self._numbers = itertools.count()
        self._stats = EngineStats(num_pages=facts.num_pages)
        self._heard_s = time.monotonic()
        self._death: str | None = None
        self._reader = asyncio.create_task(self._read(), name="engine reader")

    @classmethod
    async def start(cls, config: EngineConfig, *, module: str = ENGINE_MODULE) -> AsyncEngine:
        """Load a model in a new process and wait until it is ready.

        Args:
            config: What to load and how.
            module: What the process runs; tests have engines of their own.

        Raises:
            EngineError: It cannot be loaded; one line that says why.
        """
        child = await EngineChild.start(module)
        try:
            child.send(config)
            # The child loads the model meanwhile.
            tokenizer = await asyncio.to_thread(load_tokenizer, config)
            facts = await _ready(child)
        except BaseException as error:
            await child.close(grace_s=0.0)
            if isinstance(error, ValueError):
                raise EngineError(str(error)) from error
            raise
        return cls(child, facts, tokenizer, config.seed)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ValueError if it has none."""
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer")
        return self._tokenizer

    @property
    def observer(self) -> Observer | None:
        """Who is told of times and counts, from the event loop."""
        return self._processor.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._processor.observer = observer

    @property
    def stats(self) -> EngineStats:
        """State of the engine after its last iteration or heartbeat."""
        return self._stats

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine's loop was last heard of; about 1 at most while all is well."""
        return time.monotonic() - self._heard_s

    @property
    def is_alive(self) -> bool:
        """False once the engine has died or was closed; it does not come back."""
        return self._death is None

    @property
    def death(self) -> str | None:
        """Why the engine is not alive; None while it is."""
        return self._death

    async def generate(
        self, prompt: PromptInput, params: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt. Closing the generator, or cancelling who reads it, drops the request.

        Args:
            prompt: Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            params: How.
            request_id: Name of the request, unique among those that have not ended; None makes one.

        Yields:
            The output whenever it has grown; always the same object, which grows in place, so that readers keep their
            own offsets. A slow reader gets several tokens at once. The last one is `finished`; if the request failed
            alone its `error` says why and a finish reason is "error".

        Raises:
            ValueError: The request cannot be served, or its id is taken.
            EngineDeadError: The engine has died or was closed.
        """
        self._check_alive()
        checked = await _read_prompt(prompt, self._tokenizer)
        self._check_alive()
        name = f"request-{next(self._numbers)}" if request_id is None else request_id
        output, requests = self._processor.add(name, checked, params)
        news = self._news[name] = asyncio.Event()
        try:
            self._child.send(Add(requests=requests))
            is_last = False
            while not is_last:
                await news.wait()
                news.clear()
                is_last = output.finished
                if not is_last:
                    self._check_alive()
                self._processor.refresh(output)
                yield output
        finally:
            del self._news[name]
            self._drop(name)

    async def abort(self, request_id: str) -> None:
        """End a request with finish reason "abort"; an unknown one is ignored."""
        self._drop(request_id)
        if request_id in self._news:
            self._news[request_id].set()

    async def close(self) -> None:
        """End the engine's process; requests that run raise EngineDeadError."""
        self._die("the engine has been closed")
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        await self._child.close(_CLOSE_GRACE_S)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _drop(self, name: str) -> None:
        engine_ids = self._processor.abort(name)
        if engine_ids and self.is_alive:
            self._child.send(Abort(request_ids=engine_ids))

    async def _read(self) -> None:
        """Take in what the engine sends, until it dies."""
        try:
            while True:
                message = await self._child.receive()
                self._heard_s = time.monotonic()
                if isinstance(message, Failed):
                    raise EngineDeadError(message.message)
                if isinstance(message, StepOutput | Heartbeat):
                    self._stats = message.stats
                if isinstance(message, StepOutput):
                    await self._take(message)
                # With messages waiting, none of the above gives way to other tasks.
                await asyncio.sleep(0)
        except EngineDeadError as error:
            self._die(str(error))
        # Nobody else sees what goes wrong here, and without the reader every request would wait forever.
        except Exception as error:
            logger.exception("reading from the engine failed")
            self._die(f"reading from the engine failed: {type(error).__name__}: {error}")

    async def _take(self, step: StepOutput) -> None:
        for number, output in enumerate(self._processor.process(step), start=1):
            news = self._news.get(output.request_id)
            if news is not None:
                news.set()
            if number % _TOKENS_A_SLICE == 0:
                await asyncio.sleep(0)
        stopped = self._processor.take_stopped()
        if stopped:
            self._child.send(Abort(request_ids=stopped))

    def _die(self, reason: str) -> None:
        """Let every request, running or to come, raise EngineDeadError; only the first reason counts."""
        if self._death is None:
            self._death = reason
            for news in self._news.values():
                news.set()


async def _ready(child: EngineChild) -> EngineFacts:
    """Wait for the engine; EngineError if it cannot start."""
    message = await child.receive()
    if isinstance(message, Ready):
        return message.facts
    reason = message.message if isinstance(message, Failed) else f"unexpected {type(message).__name__}"
    raise EngineError(reason)


async def _read_prompt(prompt: PromptInput, tokenizer: Tokenizer | None) -> Prompt:
    """`read_prompt`, beside the event loop if the text is long."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if isinstance(text, str) and len(text) >= _LONG_TEXT_CHARS:
        return await asyncio.to_thread(read_prompt, prompt, tokenizer)
    return read_prompt(prompt, tokenizer)
