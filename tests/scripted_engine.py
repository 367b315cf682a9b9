"""An engine without a model that says what a test has written, a few characters at a time, with a real tokenizer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Any

from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import CompletionOutput, FinishReason, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server.backend import EnginePrompt
from tests.fake_async_engine import FakeAsyncEngine


class ScriptedEngine(FakeAsyncEngine):
    """Each prompt gets the next of `texts`, in pieces of `size` characters; a piece stands for a token.

    Attributes:
        prompts: Texts of the prompts, in their order.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str] = (), *, size: int = 3) -> None:
        super().__init__()
        self.texts = list(texts)
        self.prompts: list[str] = []
        self._tokenizer, self._size = tokenizer, size

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    async def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        token_ids: list[int] = prompt.token_ids if hasattr(prompt, "token_ids") else prompt  # type: ignore[assignment]
        self.prompts.append(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        self.seen_params.append(params)
        text = self.texts.pop(0)
        pieces = [text[start : start + self._size] for start in range(0, len(text), self._size)] or [""]
        completion = CompletionOutput(index=0)
        output = RequestOutput(
            request_id=request_id or "", prompt=None, prompt_token_ids=list(token_ids), outputs=[completion]
        )
        for place, piece in enumerate(pieces):
            completion.token_ids.append(place)
            completion.append_text(piece)
            if place + 1 == (params.max_tokens or len(pieces)) and place + 1 < len(pieces):
                completion.finish_reason = FinishReason.LENGTH
            elif place + 1 == len(pieces):
                completion.finish_reason = FinishReason.STOP
            output.finished = completion.is_finished
            if streams or output.finished:
                yield output
            if output.finished:
                return
