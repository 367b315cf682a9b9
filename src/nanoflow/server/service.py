"""What every route works with: the engine, the name it is served under, and the options of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import TypeVar

from fastapi import Request

import nanoflow
from nanoflow.config import ServerConfig
from nanoflow.engine.prompts import Prompt as ReadPrompt
from nanoflow.engine.template_renderer import MAX_PROCESSES
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import RequestOutput
from nanoflow.priorities import BATCH
from nanoflow.request import RequestError, SamplingParams
from nanoflow.server.admission import Admission, Ledger
from nanoflow.server.backend import AnyPrompt, Prompt, ServingEngine, ServingTokenizer
from nanoflow.server.call_bounds import CallBounds
from nanoflow.server.conversation_fields import Conversation, Message
from nanoflow.server.echo import Echo, TextOffsets, detokenizer_of, echo_prompt
from nanoflow.server.errors import ApiError, user_errors
from nanoflow.server.keys import salt_of
from nanoflow.server.logprobs import TokenIdTexts, TokenTexts
from nanoflow.server.priority_fields import DEFAULT_PRIORITY
from nanoflow.server.prompt_fields import PromptFields
from nanoflow.server.protocol import MAX_SESSION_ID_CHARS, ChatCompletionRequest, CompletionRequest
from nanoflow.server.tracing import Operation, RequestTrace, Tracing

T = TypeVar("T")

_TOKEN_THREADS = 2
# Characters of a call's texts that are encoded in one piece, which takes about 30 ms.
_PIECE_CHARS = 1 << 16
# Texts up to this length take less than a millisecond to encode.
_SHORT_CHARS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One served model.

    Attributes:
        engine: The engine.
        config: Options of the server.
        started: Seconds since 1970.
        fingerprint: Identifies what answers depend on beside the request: the version, and the model as it runs.
        chat_threads: Threads that render conversations, so that a slow chat template delays nothing else.
        token_threads: Threads that encode and decode texts.
        ledger: Completions and tokens in the server, over all front ends.
        call_bounds: Bounds on what a call may ask for.
        admission: Decides whether there is room for a call.
        tracing: Makes spans of requests; None if they are not traced.
    """

    engine: ServingEngine
    config: ServerConfig
    ledger: Ledger = field(default_factory=Ledger)
    tracing: Tracing | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = field(init=False)
    chat_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(MAX_PROCESSES, thread_name_prefix="chat")
    )

    token_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_TOKEN_THREADS, thread_name_prefix="tokens")
    )
    call_bounds: CallBounds = field(init=False)
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        bounds = CallBounds(
            bounds=self.config, facts=self.engine.facts, longest_token_chars=self._longest_token_chars()
        )
        object.__setattr__(self, "call_bounds", bounds)
        admission = Admission(bounds=self.config, facts=self.engine.facts, ledger=self.ledger)
        object.__setattr__(self, "admission", admission)
        facts = self.engine.facts
        types = (facts.model_type, facts.dtype, facts.kv_cache_dtype, facts.device)
        parts = (self.model_name, *types, facts.plan, str(facts.max_model_len))
        digest = blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()
        object.__setattr__(self, "fingerprint", f"nanoflow-{nanoflow.__version__}-{digest}")

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.config.model_names[0]

    @property
    def tokenizer(self) -> ServingTokenizer:
        """The model's tokenizer; without one, a call that needs it is refused (400)."""
        with user_errors():
            return self.engine.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """False without a tokenizer: prompts can only be token ids, and completions have no text."""
        try:
            return self.engine.tokenizer is not None
        except RequestError:
            return False

    def sampling(self, body: CompletionRequest | ChatCompletionRequest) -> SamplingParams:
        """Parameters of a call; without a tokenizer there is no text."""
        with user_errors(fields=body.field_names):
            return body.to_params(defaults=self.engine.facts.sampling, can_detokenize=self.has_tokenizer)

    def trace(
        self, operation: Operation, request: Request, params: SamplingParams, call_id: str
    ) -> RequestTrace | None:
        """The trace of a request that arrives now; None if requests are not traced."""
        if self.tracing is None:
            return None
        return self.tracing.request(operation, request.headers, model=self.model_name, params=params, call_id=call_id)

    def token_text(self, token_id: int) -> str:
        """Text of one token; its id if there is no tokenizer."""
        return self.tokenizer.token_text(token_id) if self.has_tokenizer else f"token_id:{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        if self.has_tokenizer and isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.bytes_of(token_id)
        return self.token_text(token_id).encode()

    def echo(self, output: RequestOutput, *, is_continued: bool, has_offsets: bool) -> Echo:
        """The prompt of an output, with a completion after it or alone; arguments as of `echo_prompt`."""
        with user_errors():
            return echo_prompt(self.tokenizer, output, self, is_continued=is_continued, has_offsets=has_offsets)

    def completion_offsets(self, output: RequestOutput, params: SamplingParams, start: int) -> TextOffsets:
        """Counts the offsets of a completion's tokens; the text before the completion has `start` characters."""
        if not self.has_tokenizer or not params.detokenize:
            return TextOffsets(None, self, start=start)
        prompt, skips = output.prompt_token_ids, params.skip_special_tokens
        detokenizer = detokenizer_of(self.tokenizer, prompt, skip_special_tokens=skips)
        return TextOffsets(detokenizer, self, before=prompt, start=start)

    def texts(self, body: PromptFields) -> TokenTexts:
        """How log probabilities of a call name tokens: by their text, or by their ids."""
        wanted = body.return_tokens_as_token_ids
        return TokenIdTexts() if (self.config.return_tokens_as_token_ids if wanted is None else wanted) else self

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the served one, under any of its names (404); None is the served one."""
        names = self.config.model_names
        if name is not None and name not in names:
            message = f"the model {name[:200]!r} does not exist; this server has {', '.join(map(repr, names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _longest_token_chars(self) -> int | None:
        tokenizer = self.tokenizer if self.has_tokenizer else None
        return tokenizer.longest_token_chars if isinstance(tokenizer, Tokenizer) else None

    def deadline_s(self, request: Request) -> float | None:
        """When a call that begins now must have ended, on the event loop's clock; None if there is no limit.

        Calls of the server's own batches have none: they wait as long as others leave nothing to them.
        """
        if request.scope.get(DEFAULT_PRIORITY) == BATCH:
            return None
        timeout_s = self.config.request_timeout_s
        return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    def cache_salt(self, request: Request, salt: str | None) -> str | None:
        """The salt of a call's cached pages: its own, with its key if keys have caches of their own."""
        return salt_of(request.headers.get("authorization"), salt) if self.config.prefix_cache_per_key else salt

    def session_id(self, request: Request, given: str | None) -> str | None:
        """Name of a call's session, which no other API key has: the given one, or that of the header `x-session-id`.

        Raises:
            ApiError: That of the header is too long (400).
        """
        name = given or request.headers.get("x-session-id")
        if name is not None and len(name) > MAX_SESSION_ID_CHARS:
            message = f"the header x-session-id has {len(name)} characters, at most {MAX_SESSION_ID_CHARS} are taken"
            raise ApiError(400, message, param="x-session-id")
        return salt_of(request.headers.get("authorization"), name) if name else None

    async def beside(self, work: Callable[[], T]) -> T:
        """Run something that takes long in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.token_threads, work)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, made in a thread, since a long text takes a while."""
        with user_errors("prompt"):
            return await self.beside(partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens))

    async def read_prompts(self, prompts: Sequence[AnyPrompt]) -> list[AnyPrompt]:
        """The prompts of a call, with texts encoded in pieces, one after the other.

        So another call waits for one piece at most, not for all prompts of this one.
        """
        if not self.has_tokenizer or not isinstance(self.tokenizer, Tokenizer):
            return list(prompts)
        found: list[AnyPrompt] = list(prompts)
        places = [place for place, prompt in enumerate(prompts) if isinstance(prompt, str)]
        for piece in _pieces(places, [len(str(prompts[place])) for place in places]):
            texts = [str(prompts[place]) for place in piece]
            encode = partial(self.tokenizer.encode_all, texts)
            with user_errors("prompt"):
                is_short = sum(map(len, texts)) < _SHORT_CHARS
                all_ids = encode() if is_short else await self.beside(encode)
            for place, text, token_ids in zip(piece, texts, all_ids, strict=True):
                found[place] = ReadPrompt(text=text, token_ids=token_ids)
        return found

    async def encode_chat(
        self, messages: Sequence[Message], conversation: Conversation, *, add_special_tokens: bool | None
    ) -> list[int]:
        """Token ids of a conversation, made in a thread."""
        options = conversation.template_options
        if "chat_template" in options and not self.config.trust_request_chat_template:
            message = "chat_template is refused: this server takes none from requests (--trust-request-chat-template)"
            raise ApiError(400, message, param="chat_template")
        if add_special_tokens:
            options["add_special_tokens"] = True
        tokenizer = self.tokenizer
        if isinstance(tokenizer, Tokenizer):
            is_cut = getattr(conversation, "truncate_prompt_tokens", None) is not None
            options["check_text"] = partial(self.call_bounds.check_prompt_text, param="messages", is_cut=is_cut)

        def render() -> list[int]:
            return tokenizer.apply_chat_template([message.turn for message in messages], **options)

        with user_errors("messages"):
            return await asyncio.get_running_loop().run_in_executor(self.chat_threads, render)

    async def prompt_token_ids(
        self, prompts: Sequence[Prompt], fields: PromptFields, max_tokens: int | None
    ) -> list[Prompt]:
        """The prompts of a call as token ids, made as its fields say."""
        adds = fields.add_special_tokens is not False
        all_ids = [
            await self.encode(prompt, add_special_tokens=adds) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        return [self.truncated(token_ids, fields, max_tokens) for token_ids in all_ids]

    def truncated(self, token_ids: list[int], fields: PromptFields, max_tokens: int | None) -> list[int]:
        """The tokens of a prompt that are kept, so that a completion of `max_tokens` (1 if None) fits too."""
        with user_errors():
            return fields.truncated(token_ids, max(self.engine.facts.max_model_len - (max_tokens or 1), 1))

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids, made in a thread; an id that does not exist is refused (400)."""
        vocab_size, decode = self.engine.facts.vocab_size, self.tokenizer.decode
        highest = await self.beside(partial(max, token_ids, default=0))
        if highest >= vocab_size:
            message = f"tokens: token id {highest} is out of vocabulary, which has {vocab_size} tokens"
            raise ApiError(400, message, param="tokens")
        with user_errors("tokens"):
            return await self.beside(partial(decode, token_ids, skip_special_tokens=skip_special_tokens))


def _pieces(places: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Group indices, in order, so that the sizes in a group sum to at most a piece; a group has at least one."""
    piece, size = list[int](), 0
    for place, more in zip(places, sizes, strict=True):
        if piece and size + more > _PIECE_CHARS:
            yield piece
            piece, size = [], 0
        piece.append(place)
        size += more
    if piece:
        yield piece
