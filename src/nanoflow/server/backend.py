"""The engine as the server sees it: the attributes and methods that routes use.

`engine/async_engine.py` has the real engine; tests use others.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from nanoflow.engine.messages import EngineFacts, EngineStats, PrefetchCounts
from nanoflow.engine.observer import Observer
from nanoflow.engine.prompts import Prompt as ReadPrompt
from nanoflow.outputs import RequestOutput
from nanoflow.request import SamplingParams

Prompt = str | list[int]
AnyPrompt = Prompt | ReadPrompt
EnginePrompt = AnyPrompt | Mapping[str, Any]
ChatMessage = Mapping[str, Any]


class ServingTokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, as log probabilities name it."""

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary has them."""

    def description(self) -> dict[str, Any]:
        """Its configuration in JSON values, with `tokenizer_class` and the chat template."""

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation; RequestError if there is no template or it refuses the messages."""


class ServingEngine(Protocol):
    """An engine that generates for many requests at once."""

    observer: Observer | None

    @property
    def facts(self) -> EngineFacts:
        """What is loaded."""

    @property
    def tokenizer(self) -> ServingTokenizer:
        """The model's tokenizer; RequestError if there is none, as with random weights in a benchmark."""

    @property
    def stats(self) -> EngineStats:
        """State after the last iteration or heartbeat."""

    @property
    def is_alive(self) -> bool:
        """False once the engine has died or was closed."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine loop was last heard of."""

    def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the growing output, or the finished one alone; closing the generator frees all that it holds."""

    async def prefetch(self, prompt: EnginePrompt) -> PrefetchCounts:
        """What is cached of a prompt that will be generated for soon."""

    async def prefetch_session(self, session_id: str) -> PrefetchCounts | None:
        """What is cached of a session's last request; None if the session is not remembered."""
