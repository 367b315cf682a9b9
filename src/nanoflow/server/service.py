"""What every route works with: the engine, the name it is served under, and the options of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanoflow.config import DEFAULT_MODEL, ServerConfig
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import RequestOutput
from nanoflow.request import RequestError, SamplingParams
from nanoflow.server.backend import ChatMessage, ServingEngine, ServingTokenizer
from nanoflow.server.echo import Echo, TextOffsets, detokenizer_of, echo_prompt
from nanoflow.server.errors import ApiError, user_errors
from nanoflow.server.protocol import ChatCompletionRequest, CompletionRequest, Conversation, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One served model.

    Attributes:
        engine: Who generates.
        config: Options of the server.
        started: Seconds since 1970.
    """

    engine: ServingEngine
    config: ServerConfig
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.config.served_model_name or DEFAULT_MODEL

    @property
    def tokenizer(self) -> ServingTokenizer:
        """The model's tokenizer; if there is none, a call that cannot do without is refused (400)."""
        with user_errors():
            return self.engine.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """False if prompts come as token ids only, and completions have no text."""
        try:
            return self.engine.tokenizer is not None
        except RequestError:
            return False

    def sampling(self, body: CompletionRequest | ChatCompletionRequest) -> SamplingParams:
        """Parameters of a call; without a tokenizer there is no text."""
        with user_errors():
            return body.to_params(defaults=self.engine.facts.sampling, can_detokenize=self.has_tokenizer)

    def token_text(self, token_id: int) -> str:
        """Text of one token; its id if there is no tokenizer."""
        return self.tokenizer.token_text(token_id) if self.has_tokenizer else f"token_id:{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, a part of a character too."""
        if self.has_tokenizer and isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.bytes_of(token_id)
        return self.token_text(token_id).encode()

    def echo(self, output: RequestOutput, *, is_continued: bool, has_offsets: bool) -> Echo:
        """The prompt of an output, with a completion after it or alone; arguments as of `echo_prompt`."""
        with user_errors():
            return echo_prompt(self.tokenizer, output, self, is_continued=is_continued, has_offsets=has_offsets)

    def completion_offsets(self, output: RequestOutput, params: SamplingParams, start: int) -> TextOffsets:
        """Counts where the tokens of a completion begin in a text that has `start` characters before it."""
        if not self.has_tokenizer or not params.detokenize:
            return TextOffsets(None, self, start=start)
        prompt, skips = output.prompt_token_ids, params.skip_special_tokens
        detokenizer = detokenizer_of(self.tokenizer, prompt, skip_special_tokens=skips)
        return TextOffsets(detokenizer, self, before=prompt, start=start)

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the served one (404); None is the served one."""
        if name is not None and name != self.model_name:
            message = f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, made beside the event loop: a long text takes a while."""
        with user_errors():
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(self, messages: Sequence[Message], conversation: Conversation) -> list[int]:
        """Token ids of a conversation, made beside the event loop."""
        turns: list[ChatMessage] = [message.turn for message in messages]
        template = self.tokenizer.apply_chat_template
        with user_errors():
            return await asyncio.to_thread(template, turns, **conversation.template_options)

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids, made beside the event loop; an id that does not exist is refused (400)."""
        vocab_size, decode = self.engine.facts.vocab_size, self.tokenizer.decode
        if await asyncio.to_thread(max, token_ids, default=0) >= vocab_size:
            raise ApiError(400, f"tokens must be below the vocabulary size, {vocab_size}", param="tokens")
        with user_errors():
            return await asyncio.to_thread(decode, token_ids, skip_special_tokens=skip_special_tokens)
