"""Convert log probabilities to the three shapes of the API: completions, chat, and prompt log probabilities.

The input is `PositionLogprobs` of `outputs.py`, the output are typed dictionaries of `responses.py`. A token is
identified by its id, and has bytes of its own: two tokens may have the same text, and a part of a character has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nanoflow.outputs import Logprob, PositionLogprobs
from nanoflow.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    RankedLogprob,
    TopLogprob,
)

LOWEST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have


class TokenTexts(Protocol):
    """Texts of single tokens, as log probabilities name them."""

    def token_text(self, token_id: int) -> str:
        """Text of a token; a part of a character gives U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes."""


class TokenIdTexts:
    """Ids in place of texts, as in vLLM: "token_id:5"."""

    def token_text(self, token_id: int) -> str:
        """The text "token_id:ID"."""
        return f"token_id:{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of that text."""
        return self.token_text(token_id).encode()


def whole_text(token_id: int, texts: TokenTexts) -> str | None:
    """The text of a token; None if there are parts of characters in it."""
    try:
        texts.token_bytes(token_id).decode()
    except UnicodeDecodeError:
        return None
    return texts.token_text(token_id)


def completion_logprobs(
    token_ids: Sequence[int],
    places: Sequence[PositionLogprobs | None],
    *,
    text_offsets: Sequence[int],
    texts: TokenTexts,
) -> CompletionLogprobs:
    """Lists with one entry for each token. A mapping of alternatives always has the token itself too.

    Args:
        token_ids: The tokens.
        places: Their log probabilities; None where there are none (the first token of a prompt).
        text_offsets: Offset of each token in the text.
        texts: Texts of single tokens.
    """
    pairs = list(zip(token_ids, places, strict=True))
    return {
        "tokens": [_name(token_id, texts) for token_id in token_ids],
        "token_logprobs": [None if place is None else _finite(place[token_id].logprob) for token_id, place in pairs],
        "top_logprobs": [None if place is None else _by_name(token_id, place, texts) for token_id, place in pairs],
        "text_offset": list(text_offsets),
    }


def chat_logprobs(
    token_ids: Sequence[int], places: Sequence[PositionLogprobs], *, num_top: int, texts: TokenTexts
) -> ChatLogprobs:
    """One entry for each token, with the `num_top` most probable tokens at its place."""
    content: list[ChatLogprob] = []
    for token_id, place in zip(token_ids, places, strict=True):
        ranked = sorted(place.items(), key=lambda item: -item[1].logprob)[:num_top]
        top = [_top(other, entry, texts) for other, entry in ranked]
        content.append({**_top(token_id, place[token_id], texts), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(places: Sequence[PositionLogprobs | None], texts: TokenTexts) -> PromptLogprobs:
    """For each prompt token a mapping {token id: log probability, rank, text}; None for the first."""
    return [
        None if place is None else {str(token_id): _ranked(token_id, place, texts) for token_id in place}
        for place in places
    ]


def _ranked(token_id: int, place: PositionLogprobs, texts: TokenTexts) -> RankedLogprob:
    entry = place[token_id]
    return {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": texts.token_text(token_id)}


def _by_name(token_id: int, place: PositionLogprobs, texts: TokenTexts) -> dict[str, float]:
    """Log probability by name, with the token itself first; a token whose name is taken gets its id as name."""
    by_name: dict[str, float] = {}
    for other in (token_id, *(other for other in place if other != token_id)):
        name = _name(other, texts)
        by_name[f"token_id:{other}" if name in by_name else name] = _finite(place[other].logprob)
    return by_name


def _name(token_id: int, texts: TokenTexts) -> str:
    """A token's text, or its bytes as OpenAI writes them ("bytes:\\xe2\\x9c") if they are not whole characters."""
    text = whole_text(token_id, texts)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in texts.token_bytes(token_id)) if text is None else text


def _top(token_id: int, entry: Logprob, texts: TokenTexts) -> TopLogprob:
    data = texts.token_bytes(token_id)
    return {"token": texts.token_text(token_id), "logprob": _finite(entry.logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
