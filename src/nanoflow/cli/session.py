"""`EngineSession`: an engine in this process whose completions are read with a plain `for` loop as they grow.

The engine's event loop runs in a thread of its own. So Ctrl-C reaches the main thread, which reads, and the engine goes
on while the main thread waits for input. `chat.py` and `generate.py` use it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from nanoflow.config import EngineConfig
from nanoflow.outputs import CompletionOutput, FinishReason
from nanoflow.request import RequestError, SamplingParams

Prompt = str | list[int]
Message = dict[str, str]
ResultT = TypeVar("ResultT")


class EngineSession:
    """A running engine; close it (or leave its `with` block) to free the model.

    Raises:
        ModelError: The model cannot be loaded.
        EngineError: The engine cannot start.
    """

    def __init__(self, config: EngineConfig) -> None:
        from nanoflow.engine.async_engine import AsyncEngine

        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine session", daemon=True)
        self._thread.start()
        try:
            self._engine = self._wait_for(AsyncEngine.start(config))
        except BaseException:
            self._stop_loop()
            raise

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine."""
        try:
            self._wait_for(self._engine.close())
        finally:
            self._stop_loop()

    @property
    def recommended(self) -> Mapping[str, Any]:
        """Sampling parameters that the model recommends, by field of `SamplingParams`."""
        return self._engine.facts.sampling.fields

    def template_problem(self) -> str | None:
        """Why the model's chat template cannot render a conversation; None if it can, or if there is no template."""
        from nanoflow.engine.template_probe import template_problem

        try:
            return template_problem(self._engine.tokenizer)
        except RequestError:
            return None  # No tokenizer: the first message gets an error that says so.

    def chat_prompt(self, messages: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None) -> Prompt:
        """Render a conversation with the model's chat template.

        Args:
            messages: The conversation.
            template_kwargs: Further variables of the template.
        """
        options: dict[str, Any] = {} if template_kwargs is None else {"chat_template_kwargs": template_kwargs}
        return self._engine.tokenizer.apply_chat_template(messages, **options)

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[str]:
        """Yield the text of the first completion piece by piece.

        Closing the iterator aborts the request.

        Raises:
            ValueError: The request is invalid, for example a prompt longer than the context.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(self._produce(prompt, params, pieces), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            future.cancel()

    async def _produce(self, prompt: Prompt, params: SamplingParams, pieces: SimpleQueue[str | None]) -> None:
        num_sent = 0
        try:
            async for output in self._engine.generate(prompt, params):
                completion = output.outputs[0]
                pieces.put(completion.text_since(num_sent))
                num_sent = completion.num_chars
                _raise_if_failed(completion, output.error)
        finally:
            pieces.put(None)

    def _wait_for(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()  # cancels running tasks, such as a start that was interrupted


def _raise_if_failed(completion: CompletionOutput, error: str | None) -> None:
    if completion.finish_reason is FinishReason.ERROR:
        raise ValueError(error or "the request failed")
