"""`AsyncLLM`: `AsyncEngine` with vLLM's interface.

The object is made at once. It loads the model on first use, because the engine's process can only be watched from a
running event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from nanoflow.compat.calls import ASYNC_CALLS, METHODS, pass_over
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.prompts import PromptInput, with_names
from nanoflow.engine.transformers_tokenizer import transformers_tokenizer
from nanoflow.familiar.engine_args import EngineArgs
from nanoflow.familiar.snapshots import Snapshots
from nanoflow.outputs import RequestOutput
from nanoflow.parameters import shown
from nanoflow.priorities import Priority
from nanoflow.request import RequestError, RequestOutputKind, SamplingParams


class AsyncLLM:
    """Completions for many concurrent callers, each with its own asynchronous generator.

    Args:
        engine_args: Options of the engine.

    Raises:
        ConfigError: As for `LLM`.
    """

    def __init__(self, engine_args: EngineArgs) -> None:
        self._config = engine_args.config()
        self._starting: asyncio.Task[AsyncEngine] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **others: Any) -> AsyncLLM:
        """An engine with these options; the model is loaded on first use, or by `start`."""
        pass_over(ASYNC_CALLS, "from_engine_args", others)
        return cls(engine_args)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"AsyncLLM has no {name}" + METHODS.ending(name))

    async def start(self) -> AsyncEngine:
        """Load the model, once, and wait until it is ready.

        Raises:
            EngineError: It cannot be loaded; the message is one line that says why.
            EngineDeadError: `shutdown` was called before.
        """
        if self._is_closed:
            raise EngineDeadError("this AsyncLLM has been shut down")
        if self._starting is None:
            self._starting = asyncio.create_task(AsyncEngine.start(self._config), name="engine start")
        return await asyncio.shield(self._starting)

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: Priority | None = None,
        **others: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt. Closing the generator, or cancelling the task that reads it, aborts the request.

        Args:
            prompt: As for `LLM.generate`.
            sampling_params: Sampling parameters; `output_kind` says what is yielded.
            request_id: Name of the request, unique among unfinished ones.
            priority: An integer, of which lower ones go first, or "batch"; 0 if not given.
            **others: Other arguments of vLLM, accepted at values that change nothing.

        Yields:
            Copies of the output: everything so far, only what is new, or everything at the end.

        Raises:
            RequestError: The request is invalid, or its id is in use.
            EngineError: The model cannot be loaded, or the engine has died or was shut down.
        """
        pass_over(ASYNC_CALLS, "generate", others)
        if not isinstance(sampling_params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, got {shown(sampling_params)}")
        engine = await self.start()
        params = sampling_params.snapshot()
        kind, params.output_kind = params.output_kind, RequestOutputKind.CUMULATIVE
        snapshots = Snapshots(kind)
        whole = with_names(prompt, priority=priority)
        stream = engine.generate(whole, params, request_id, streams=kind is not RequestOutputKind.FINAL_ONLY)
        try:
            async for output in stream:
                yield snapshots.take(output)
        finally:
            await stream.aclose()

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests with finish reason "abort"; unknown ones are ignored."""
        engine = await self.start()
        for name in (request_id,) if isinstance(request_id, str) else request_id:
            await engine.abort(name)

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine for good; running requests fail with EngineDeadError.

        Args:
            timeout: Must be None or 0; the engine always has ten seconds to end.
        """
        pass_over(ASYNC_CALLS, "shutdown", {"timeout": timeout})
        if not self._is_closed:
            self._is_closed = True
            if self._starting is not None and not self._starting.get_loop().is_closed():
                self._closing = self._starting.get_loop().create_task(self._close(self._starting))

    # Older versions of vLLM have this name.
    shutdown_background_loop = shutdown

    async def closed(self) -> None:
        """Wait until the engine has ended after `shutdown`."""
        if self._closing is not None:
            await self._closing

    async def get_tokenizer(self) -> Any:
        """The model's tokenizer as an object of `transformers`; RequestError if transformers cannot load it."""
        engine = await self.start()
        return await asyncio.to_thread(transformers_tokenizer, self._config, engine.tokenizer)

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine has died or was shut down, EngineError if it cannot start."""
        engine = await self.start()
        if engine.death is not None:
            raise EngineDeadError(engine.death)

    async def reset_prefix_cache(self) -> bool:
        """Forget what the KV cache has of earlier prompts and completions; True, as it always can."""
        (await self.start()).reset_prefix_cache()
        return True

    @property
    def is_running(self) -> bool:
        """True while the engine is alive."""
        return not self._is_closed and self._death is None

    @property
    def errored(self) -> bool:
        """True if the engine cannot start or has died."""
        return self._death is not None

    @property
    def dead_error(self) -> EngineDeadError:
        """The error that requests get from a dead engine."""
        return EngineDeadError(self._death or "the engine has not died")

    @property
    def _death(self) -> str | None:
        starting = self._starting
        if starting is None or not starting.done():
            return None
        if starting.cancelled():
            return "its start was cancelled"
        error = starting.exception()
        return starting.result().death if error is None else str(error)

    async def _close(self, starting: asyncio.Task[AsyncEngine]) -> None:
        if not starting.done():
            starting.cancel()
        await asyncio.wait((starting,))
        if not starting.cancelled() and starting.exception() is None:
            await starting.result().close("this AsyncLLM has been shut down")
