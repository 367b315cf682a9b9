"""Fields of OpenAI's and vLLM's request bodies that this server does not support, with the values that it accepts.

Clients send many fields with default values, or fields that do not affect the answer. These are accepted. With any
other value a field is refused by name, since the answer would not be what was asked for. A field that is neither here
nor among those of a body is refused with the nearest name that exists.

A field that only some bodies have is listed here for the other bodies: a body's own fields are read first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from nanoflow.parameters import did_you_mean, shown


@dataclass(frozen=True, slots=True)
class Foreign:
    """A field that is known but not supported.

    Attributes:
        harmless: Values with which the field has no effect, beside null; None if no value has an effect.
        reason: What the field is about, or why it has no effect.
        same_as: Another field; with the value of that field, this one has no effect either.
        code: Error code of a refusal that client programs look for; None if they look for none.
    """

    harmless: tuple[Any, ...] | None
    reason: str
    same_as: str | None = None
    code: str | None = None

    def is_harmless(self, value: Any, body: Mapping[Any, Any]) -> bool:
        """True if the field of a body has no effect; 1 is not true, and 0 is not false."""
        if value is None or self.harmless is None:
            return True
        if self.same_as in body:
            return _kind(value) is _kind(body[self.same_as]) and bool(value == body[self.same_as])
        return any(_kind(value) is _kind(other) and value == other for other in self.harmless)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the values without effect."""
        note = {"description": f"Accepted and ignored: {self.reason}"}
        is_open = self.harmless is None or self.same_as is not None
        return note if is_open else {**note, "enum": [None, *(self.harmless or ())]}


def _kind(value: Any) -> type:
    """The type of a JSON value: 1 and 1.0 have the same, 1 and true do not."""
    return float if type(value) is int else type(value)


ForeignFields = Mapping[str, Foreign]

_TOOLS: ForeignFields = {
    "tools": Foreign(([],), "calls of functions"),
    "tool_choice": Foreign(("none", "auto"), "calls of functions"),
    "parallel_tool_calls": Foreign(None, "there are no calls of functions to make side by side"),
    "functions": Foreign(([],), "calls of functions; tools has them"),
    "function_call": Foreign(("none", "auto"), "calls of functions; tool_choice has it"),
}
_SHAPES: ForeignFields = {
    "structural_tag": Foreign((), "the shape of parts of the text"),
    "guided_decoding_backend": Foreign(None, "there is one backend, llguidance"),
    "guided_whitespace_pattern": Foreign((), "white space between the tokens of JSON"),
    "modalities": Foreign(([], ["text"]), "other answers than text"),
    "audio": Foreign((), "other answers than text"),
    "verbosity": Foreign(("medium",), "length of the answer"),
}
_TEMPLATE: ForeignFields = {
    "chat_template": Foreign((), "a template of one's own; the server has the option --chat-template"),
    "chat_template_kwargs": Foreign(({},), "variables of the template"),
    "documents": Foreign(([],), "documents for the template"),
    "reasoning_effort": Foreign((), "reasoning"),
    "include_reasoning": Foreign((True,), "reasoning"),
    "thinking_token_budget": Foreign((-1,), "a bound of reasoning alone"),
    "mm_processor_kwargs": Foreign(({},), "input that is no text"),
    "media_io_kwargs": Foreign(({},), "input that is no text"),
    "prompt_embeds": Foreign((), "input that is no text"),
}
_SAMPLING: ForeignFields = {
    "best_of": Foreign((1,), "completions beside those that are returned, n", same_as="n"),
    "use_beam_search": Foreign((False,), "beam search"),
    "early_stopping": Foreign((False,), "beam search"),
    "length_penalty": Foreign((1, 1.0), "beam search"),
    "logits_processors": Foreign(([],), "code of the client"),
    "repetition_detection": Foreign((), "ends by repetition"),
    "logprob_token_ids": Foreign(([],), "log probabilities of given tokens"),
    "prediction": Foreign(None, "it makes an answer come sooner and does not change it"),
}
_ANSWER: ForeignFields = {
    "suffix": Foreign(("",), "text behind the completion"),
    "detokenize": Foreign((True,), "answers without text"),
    "spaces_between_special_tokens": Foreign((True,), "spaces around special tokens"),
    "return_token_strs": Foreign((False,), "tokens in the answer"),
    "web_search_options": Foreign((), "looking things up"),
    "store": Foreign((False,), "keeping the answer at the server"),
    "moderation": Foreign((), "judgements of texts"),
    "kv_transfer_params": Foreign((), "caches of other servers"),
    "vllm_xargs": Foreign(({},), "arguments of extensions"),
}
_LABELS: ForeignFields = {
    "user": Foreign(None, "a label of the client's"),
    "safety_identifier": Foreign(None, "a label of the client's"),
    "metadata": Foreign(None, "labels of the client's"),
    "request_id": Foreign(None, "a label of the client's; the answer has an id of the server's"),
    "service_tier": Foreign(None, "who goes first, where completions are asked for"),
    "priority": Foreign(None, "who goes first, where completions are asked for"),
    "prompt_cache_key": Foreign(None, "caches of prompts do not change an answer"),
    "prompt_cache_options": Foreign(None, "caches of prompts do not change an answer"),
    "prompt_cache_retention": Foreign(None, "caches of prompts do not change an answer"),
}

OF_GENERATION: ForeignFields = {**_TOOLS, **_SHAPES, **_TEMPLATE, **_SAMPLING, **_ANSWER, **_LABELS}
"""Fields of bodies that ask for completions."""

OF_TOKENS: ForeignFields = {
    **_TEMPLATE,
    **_TOOLS,
    **_ANSWER,
    **_LABELS,
}
"""Fields of bodies that ask for tokens or their text."""

OF_STREAMS: ForeignFields = {
    "include_obfuscation": Foreign((False,), "padding of chunks"),
}
"""Fields of `stream_options`."""

OF_MESSAGES: ForeignFields = {
    "function_call": Foreign((), "calls of functions; tool_calls has them"),
    "refusal": Foreign(("",), "refusals"),
    "annotations": Foreign(([],), "notes on the text"),
    "audio": Foreign((), "input that is no text"),
    "id": Foreign(None, "a label of the client's"),
}
"""Fields of messages, which clients copy from earlier answers."""

OF_PARTS: ForeignFields = {
    "cache_control": Foreign(None, "caches of prompts do not change an answer"),
    "annotations": Foreign(([],), "notes on the text"),
    **{
        name: Foreign((), "input that is no text")
        for name in ("image_url", "input_audio", "audio_url", "video_url", "file", "refusal")
    },
}
"""Fields of parts of messages."""


def without_foreign(
    body: Mapping[Any, Any], known: Iterable[str], foreign: ForeignFields, *, is_open: bool
) -> dict[Any, Any]:
    """A body without foreign fields. If it is open, unknown fields are kept and checked elsewhere.

    Raises:
        PydanticCustomError: There is a field that would affect the answer, or one that does not exist.
    """
    own = set(known)
    for name in body:
        if name in own or (is_open and name not in foreign):
            continue
        if name not in foreign:
            hint = did_you_mean(str(name), own) or ""
            raise _refusal(name, f"unknown field {shown(name)}{hint}")
        if not foreign[name].is_harmless(body[name], body):
            raise _refusal(name, f"{name} is not supported by this server", foreign[name].code)
    return {name: value for name, value in body.items() if name in own or name not in foreign}


def _refusal(name: Any, message: str, code: str | None = None) -> PydanticCustomError:
    # As an argument: the template of a message is a format string, and a client may write braces, and lone surrogates.
    field = str(name).encode("utf-8", "replace").decode()
    return PydanticCustomError("field", "{message}", {"message": message, "field": field, "code": code})
