"""`AsyncEngine`: completions for many callers at once, from an engine in a process of its own.

It receives the engine's messages and wakes the readers of the requests that they concern. `output.py` turns tokens into
outputs, `pacing.py` decides when readers are woken, and `child.py` runs the engine's process. `llm.py` is the blocking
counterpart, without another process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

from nanoflow.config import EngineConfig
from nanoflow.engine.child import DISK_GRACE_S, ENGINE_MODULE, GRACE_S, EngineChild
from nanoflow.engine.errors import EngineDeadError, EngineError
from nanoflow.engine.grammar_checks import GrammarChecks
from nanoflow.engine.link import EngineLink
from nanoflow.engine.living import said_ends
from nanoflow.engine.messages import (
    Abort,
    Add,
    EngineFacts,
    EngineStats,
    Failed,
    FromEngine,
    Heartbeat,
    Join,
    Leave,
    Load,
    PrefetchCounts,
    Prefetched,
    ResetPrefixCache,
    StepOutput,
)
from nanoflow.engine.observer import Observer
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.pacing import Pacer, Stream
from nanoflow.engine.prefetching import Prefetching
from nanoflow.engine.prompts import PromptInput, sendable
from nanoflow.engine.reading import read_prompt_aside, read_request_aside
from nanoflow.engine.starting import DRAIN_S, ready
from nanoflow.engine.tokenizer import Tokenizer, load_tokenizer
from nanoflow.engine.wire import WireError
from nanoflow.outputs import RequestOutput
from nanoflow.request import RequestError, SamplingParams

__all__ = ["AsyncEngine", "EngineDeadError", "EngineError"]

logger = logging.getLogger(__name__)

STREAM_INTERVAL_S = 0.02


class AsyncEngine:
    """A running engine, as one front end sees it.

    Made by `start`, or by `join` if another front end has started the engine. To be used only in the event loop that it
    was made in.

    Attributes:
        facts: What is loaded.
    """

    def __init__(
        self,
        link: EngineLink,
        facts: EngineFacts,
        processor: OutputProcessor,
        tokenizer: Tokenizer | None,
        *,
        interval_s: float = STREAM_INTERVAL_S,
        child: EngineChild | None = None,
    ) -> None:
        self.facts = facts
        self._link, self._child = link, child
        self._tokenizer = tokenizer
        self._processor, self._checks = processor, GrammarChecks(tokenizer)
        self._pacer = Pacer(interval_s)
        self._streams: dict[str, Stream] = {}
        self._prefetching = Prefetching(link.send, facts)
        self._numbers = itertools.count()
        self._stats, self._heard_s = EngineStats(num_pages=facts.num_pages), time.monotonic()
        self._death: str | None = None
        self._dead = asyncio.Event()
        self._watch = None if child is None else asyncio.create_task(self._await_end(child), name="engine watch")
        link.listen(self._take)

    @classmethod
    async def start(
        cls, config: EngineConfig, *, module: str = ENGINE_MODULE, interval_s: float = STREAM_INTERVAL_S
    ) -> AsyncEngine:
        """Load a model in a new process and wait until it is ready.

        Args:
            config: What to load and how.
            module: What the process runs; tests have engines of their own.
            interval_s: Longest time that tokens of a stream wait for more; see `pacing.py`.

        Raises:
            EngineError: The model cannot be loaded; the message is one line that says why.
        """
        return await cls.load(await EngineChild.start(module), config, interval_s=interval_s)

    @classmethod
    async def load(
        cls, child: EngineChild, config: EngineConfig, *, interval_s: float = STREAM_INTERVAL_S
    ) -> AsyncEngine:
        """As `start`, in a process that runs already. The process is ended if the model cannot be loaded."""
        try:
            child.link.send(Load(config=config))
            child.grace_s = GRACE_S if config.kv_dir is None else DISK_GRACE_S
            # The child loads the model meanwhile.
            tokenizer = await asyncio.to_thread(load_tokenizer, config)
            facts = await ready(child.link, child)
            processor = OutputProcessor(facts, tokenizer, seed=config.seed, has_text=not config.skip_tokenizer_init)
        except BaseException as error:
            await child.close(grace_s=0.0)
            if isinstance(error, ValueError):
                raise EngineError(str(error)) from None
            raise
        return cls(child.link, facts, processor, tokenizer, interval_s=interval_s, child=child)

    @classmethod
    async def join(
        cls, path: str, front_end: int, config: EngineConfig, *, interval_s: float = STREAM_INTERVAL_S
    ) -> AsyncEngine:
        """Become a further front end of an engine, and wait until it is ready.

        Args:
            path: Path of the engine's socket; see `place.py`.
            front_end: Number of this front end, from 1; each number may be used once in the engine's life.
            config: What the engine was started with.
            interval_s: As for `start`.

        Raises:
            EngineError: The engine cannot start; one line that says why.
        """
        link = EngineLink(path, front_end)
        try:
            link.send(Join())
            tokenizer = await asyncio.to_thread(load_tokenizer, config)
            facts = await ready(link)
            # Front ends must draw different seeds, or the same prompt would get the same answers from each of them.
            processor = OutputProcessor(facts, tokenizer, seed=config.seed + (front_end << 64))
        except BaseException as error:
            link.close()
            if isinstance(error, ValueError):
                raise EngineError(str(error)) from None
            raise
        return cls(link, facts, processor, tokenizer, interval_s=interval_s)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; RequestError if it has none."""
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer")
        return self._tokenizer

    @property
    def observer(self) -> Observer | None:
        """What is told of times and counts; it is called in the event loop."""
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
        """Seconds since the engine's last message; at most about 1 while the engine works."""
        return time.monotonic() - self._heard_s

    @property
    def is_alive(self) -> bool:
        """False once the engine has died or was closed; it does not come back."""
        return self._death is None

    @property
    def death(self) -> str | None:
        """Why the engine is not alive; None while it is."""
        return self._death

    async def dead(self) -> None:
        """Wait until the engine has died or was closed."""
        await self._dead.wait()

    async def generate(
        self, prompt: PromptInput, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt. The request is aborted if the generator is closed or its reader is cancelled.

        Args:
            prompt: Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            params: How its tokens are chosen.
            request_id: Name of the request, unique among those that have not ended; None makes one.
            streams: False yields the finished output alone.

        Yields:
            The output whenever it has grown. It is the same object each time and grows in place, so a reader remembers
            how much of it was read. A slow reader gets several tokens at once. The last output is `finished`. If this
            request failed, its `error` says why and a finish reason is "error".

        Raises:
            RequestError: The request cannot be served, or its id is taken.
            EngineDeadError: The engine has died or was closed.
        """
        self._check_alive()
        checked, params = await read_request_aside(prompt, params, self._tokenizer, self._checks)
        self._check_alive()
        name = f"request-{next(self._numbers)}" if request_id is None else request_id
        output, requests = self._processor.add(name, checked, params)
        stream = self._streams[name] = Stream(output, is_whole=not streams)
        try:
            for piece in sendable(requests):
                self._link.send(Add.of(piece))
                await asyncio.sleep(0)  # a large request takes milliseconds to send: let other tasks run
            logger.debug(
                "request %s: %d prompt tokens, n %d, max_tokens %s",
                *(name, len(output.prompt_token_ids), params.n, params.max_tokens),
            )
            is_last = False
            while not is_last:
                await stream.news()
                if not output.finished:
                    self._check_alive()
                    self._processor.refresh(output)
                    self._abort_stopped()
                is_last = output.finished
                yield output
        finally:
            del self._streams[name]
            self._drop(name)
            logger.debug("request %s: %s", name, said_ends(output))

    async def abort(self, request_id: str) -> None:
        """End a request with finish reason "abort"; an unknown one is ignored."""
        self._drop(request_id)
        if request_id in self._streams:
            self._streams[request_id].wake()

    async def prefetch(self, prompt: PromptInput) -> PrefetchCounts:
        """Advice that a request with this prompt will come soon; nothing is computed. Errors as in `generate`."""
        self._check_alive()
        checked = await read_prompt_aside(prompt, self._tokenizer)
        self._check_alive()
        return await self._prefetching.of_prompt(checked)

    async def prefetch_session(self, session_id: str) -> PrefetchCounts | None:
        """As `prefetch`, for what the last request of a session has left; None if it is not remembered."""
        self._check_alive()
        return await self._prefetching.of_session(session_id)

    def reset_prefix_cache(self) -> None:
        """Forget what the KV cache has of earlier prompts and completions; requests that run go on."""
        self._check_alive()
        self._link.send(ResetPrefixCache())

    def forget(self, front_end: int) -> None:
        """Tell the engine to drop all requests of another front end, which has ended."""
        if self.is_alive:
            self._link.send(Leave(front_end=front_end))

    async def close(self, reason: str = "the engine has been closed") -> None:
        """Leave the engine, and end its process if this front end started it.

        Args:
            reason: Message of the EngineDeadError that running requests raise.
        """
        self._die(reason)
        self._checks.close()
        if self._tokenizer is not None:
            self._tokenizer.close()
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        if self._child is None:
            self._link.close()
        else:
            await self._child.close()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _drop(self, name: str) -> None:
        engine_ids = self._processor.abort(name)
        if engine_ids and self.is_alive:
            self._link.send(Abort(request_ids=engine_ids))

    def _take(self, message: FromEngine | WireError) -> None:
        """Act on a message of the engine."""
        self._heard_s = time.monotonic()
        if self._death is not None:
            return
        try:
            match message:
                case StepOutput():
                    self._stats = message.stats
                    self._take_step(message)
                case Heartbeat():
                    self._stats = message.stats
                case Prefetched():
                    self._prefetching.take(message)
                case Failed():
                    self._die(message.message)
                case WireError():
                    raise message
        # No caller would see an exception here, and every request would wait forever.
        except Exception as error:
            logger.exception("reading from the engine failed")
            self._die(f"reading from the engine failed: {type(error).__name__}: {error}")

    def _take_step(self, step: StepOutput) -> None:
        streams, note = self._streams, self._pacer.note
        for output in self._processor.process(step):
            stream = streams.get(output.request_id)
            if stream is not None:
                note(stream)
        self._abort_stopped()

    def _abort_stopped(self) -> None:
        """Tell the engine to drop requests that ended in this process."""
        stopped = self._processor.take_stopped()
        if stopped:
            self._link.send(Abort(request_ids=stopped))

    async def _await_end(self, child: EngineChild) -> None:
        """Wait for the end of the engine's process, then for its last messages, and note that the engine is dead."""
        end = await child.end()
        await asyncio.sleep(DRAIN_S)
        self._die(end)

    def _die(self, reason: str) -> None:
        """Make every request, running or new, raise EngineDeadError with this reason; only the first reason counts."""
        if self._death is None:
            self._death = reason
            self._dead.set()
            for stream in self._streams.values():
                stream.wake()
            self._prefetching.die(reason)
