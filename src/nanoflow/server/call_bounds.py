"""Bound what a call asks for, by its parsed JSON, before it is processed: sums over all items, not single items.

Values of a wrong type are ignored here: the body's pydantic model refuses them (`protocol.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.bounds import ServerBounds
from nanoflow.engine.messages import EngineFacts
from nanoflow.server.errors import ApiError
from nanoflow.server.json_shape import ITEMS_A_CONTAINER, json_shape

_CHARS_A_TOKEN = 8
_CALL_CHARS = 2**20
_ITEMS = 2**19


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBounds:
    """The bounds of calls for one model.

    Attributes:
        bounds: The bounds in the server's options.
        facts: Facts of the engine: context length and vocabulary.
        longest_token_chars: Most characters that a token represents; None if there is no such number.
    """

    bounds: ServerBounds
    facts: EngineFacts
    longest_token_chars: int | None = None

    @property
    def max_call_chars(self) -> int:
        """Most characters of a call's prompts together."""
        return self.bounds.max_call_chars or max(_CALL_CHARS, _CHARS_A_TOKEN * self.facts.max_model_len)

    @property
    def max_json_items(self) -> int:
        """Most values in a body."""
        return self.bounds.max_json_items or max(_ITEMS, 2 * self.facts.max_model_len)

    @property
    def max_prompt_chars(self) -> int | None:
        """Most characters of a prompt that can fit in the context; None if that is unknown."""
        longest = self.longest_token_chars
        return None if longest is None else longest * self.facts.max_model_len

    def check_text(self, body: bytes) -> None:
        """Refuse JSON that is nested too deeply (400) or has too many values (413), before it is parsed."""
        depth, items = self.bounds.max_json_depth, self.max_json_items
        # Quick check: with so few brackets and bytes no bound is exceeded, as a byte counts at most as a container.
        if len(body) <= items // ITEMS_A_CONTAINER and body.count(b"[") + body.count(b"{") <= depth:
            return
        shape = json_shape(body)
        if shape.depth > depth:
            raise ApiError(400, f"the body is nested too deeply: at most {depth} levels")
        if shape.num_items > items:
            raise ApiError(413, f"the body has {shape.num_items} values, at most {items} are taken")

    def check(self, body: Any, *, generates: bool = True) -> None:
        """Refuse a call that asks for too much, by its parsed body.

        Args:
            body: Its JSON value.
            generates: Whether the call asks for completions, so that its prompts must fit in the context.

        Raises:
            ApiError: It asks for too much (400, 413); the message says how much is allowed.
        """
        if not isinstance(body, dict):
            return
        self._check_prompts(body, generates)
        self._check_messages(body)
        self._check_lists(body)
        self._check_scores(body)

    def check_prompt_text(self, text: str, param: str, *, is_cut: bool = False) -> None:
        """Refuse a prompt that cannot fit in the context, even if each token has as many characters as possible (400).

        Args:
            text: The prompt.
            param: The field with the prompt.
            is_cut: Whether the prompt will be truncated, so that it need not fit.
        """
        if len(text) > self.max_call_chars:
            self._refuse_chars(len(text), param)
        most = self.max_prompt_chars
        if most is not None and not is_cut and len(text) > most:
            raise ApiError(
                400,
                f"{param} has {len(text)} characters, and no token more than {self.longest_token_chars}: that is more "
                f"tokens than this model's maximum context length, {self.facts.max_model_len}",
                param=param,
                code="context_length_exceeded",
            )

    def _check_prompts(self, body: Mapping[str, Any], generates: bool) -> None:
        field = "input" if "input" in body else "prompt"
        prompt, most = body.get(field), self.bounds.max_prompts
        several = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
        if len(several) > most:
            raise ApiError(400, f"{field}: a call may have at most {most} prompts, got {len(several)}", param=field)
        n = body.get("n")
        most = self.bounds.max_call_choices
        if isinstance(n, int) and not isinstance(n, bool) and n * len(several) > most:
            wanted = f"{len(several)} prompts times n={n} are {n * len(several)} completions"
            raise ApiError(400, f"{wanted}, a call may have at most {most}", param="n")
        texts = [one for one in several if isinstance(one, str)]
        if (num_chars := sum(map(len, texts))) > self.max_call_chars:
            self._refuse_chars(num_chars, field)
        is_cut = body.get("truncate_prompt_tokens") is not None or not generates
        for text in texts:
            self.check_prompt_text(text, field, is_cut=is_cut)

    def _check_messages(self, body: Mapping[str, Any]) -> None:
        messages, most = body.get("messages"), self.bounds.max_messages
        if not isinstance(messages, list):
            return
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = [content for content in contents if isinstance(content, list)]
        for what, count in (("messages", len(messages)), ("parts of messages", sum(map(len, parts)))):
            if count > most:
                message = f"messages: a conversation may have at most {most} {what}, got {count}"
                raise ApiError(400, message, param="messages")
        if (num_chars := sum(_num_chars(message) for message in messages)) > self.max_call_chars:
            self._refuse_chars(num_chars, "messages")

    def _check_lists(self, body: Mapping[str, Any]) -> None:
        bounds = self.bounds
        allowed = bounds.max_allowed_token_ids or self.facts.vocab_size
        for name, most in (
            ("stop", bounds.max_stop_strings),
            ("bad_words", bounds.max_bad_words),
            ("stop_token_ids", bounds.max_stop_token_ids),
            ("logit_bias", bounds.max_logit_bias),
            ("allowed_token_ids", allowed),
        ):
            value = body.get(name)
            if isinstance(value, list | dict) and len(value) > most:
                raise ApiError(400, f"{name} may hold at most {most} entries, got {len(value)}", param=name)
        num_chars = 0
        for name in ("stop", "bad_words"):
            value = body.get(name)
            num_chars += sum(len(text) for text in _listed(value) if isinstance(text, str))
            if num_chars > bounds.max_stop_chars:
                most = bounds.max_stop_chars
                message = f"{name}: stop and bad_words may have at most {most} characters together, got {num_chars}"
                raise ApiError(400, message, param=name)

    def _check_scores(self, body: Mapping[str, Any]) -> None:
        """Refuse a call whose answer could have too many log probabilities."""
        context, most = self.facts.max_model_len, self.bounds.max_call_scores
        prompts = body.get("prompt")
        several = prompts if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list) else [prompts]
        num_prompt = sum(min(len(one), context) if isinstance(one, str | list) else 0 for one in several)
        if isinstance(body.get("messages"), list):
            num_prompt = min(sum(map(_num_chars, body["messages"])), context)
        wanted: Any = body.get("max_completion_tokens") or body.get("max_tokens")
        default = context if "messages" in body else 16
        num_tokens = min(wanted, context) if _is_count(wanted) else default
        n: int = body["n"] if _is_count(body.get("n")) else 1
        generated, scored = self._per_place(body.get("logprobs")), self._per_place(body.get("prompt_logprobs"))
        if _is_count(body.get("top_logprobs")) and generated:
            generated = self._per_place(body["top_logprobs"])
        if body.get("echo") and "prompt" in body:
            scored = max(scored, generated)
        num_scores = len(several) * n * num_tokens * generated + num_prompt * scored
        if num_scores > most:
            param = "prompt_logprobs" if num_prompt * scored * 2 > num_scores and not body.get("echo") else "logprobs"
            message = f"the call may ask for {num_scores} log probabilities, at most {most} are given"
            raise ApiError(400, f"{message}: fewer a token, or fewer tokens", param=param)

    def _per_place(self, value: Any) -> int:
        """Number of log probabilities at each token."""
        if value is None or value is False:
            return 0
        if value is True:
            return 1
        if value == -1:
            return self.facts.vocab_size
        return int(value) + 1 if _is_count(value) or value == 0 else 0

    def _refuse_chars(self, num_chars: int, param: str) -> None:
        most = self.max_call_chars
        message = f"{param} has {num_chars} characters in all, a call may have at most {most}"
        raise ApiError(413, message, param=param)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _num_chars(message: Any) -> int:
    """Characters of a message: of all its texts."""
    if not isinstance(message, dict):
        return 0
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    texts = [*parts, *(value for name, value in message.items() if name != "content")]
    return sum(len(text) for text in texts if isinstance(text, str))
