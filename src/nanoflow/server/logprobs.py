"""Log probabilities in the three shapes clients read: legacy completions, chat, and prompt log probabilities.

`PositionLogprobs` of `outputs.py` come in, typed dictionaries of `responses.py` go out. Knows no HTTP and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from nanoflow.outputs import Logprob, PositionLogprobs
from nanoflow.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    RankedLogprob,
    TopLogprob,
)

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say
TokenText = Callable[[int], str]
TokenName = Callable[[int, PositionLogprobs | None], str]


def completion_logprobs(
    token_ids: Sequence[int],
    places: Sequence[PositionLogprobs | None],
    *,
    text_offset: int,
    token_text: TokenText,
    names_ids: bool = False,
) -> CompletionLogprobs:
    """Lists of one entry a token.

    Args:
        token_ids: The tokens that stand there.
        places: Their log probabilities; None where there are none (the first token of a prompt).
        text_offset: Where the first token's text begins in the text returned so far.
        token_text: Text of a token id.
        names_ids: Name tokens by their id, as in "token_id:5".
    """
    name = _name_id if names_ids else partial(_text, token_text)
    shown: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, place in zip(token_ids, places, strict=True):
        text = name(token_id, place)
        shown["tokens"].append(text)
        shown["token_logprobs"].append(None if place is None else _finite(place[token_id].logprob))
        shown["top_logprobs"].append(None if place is None else _by_text(place, name))
        shown["text_offset"].append(text_offset)
        text_offset += len(text)
    return shown


def chat_logprobs(
    token_ids: Sequence[int],
    places: Sequence[PositionLogprobs],
    *,
    num_top: int,
    token_text: TokenText,
    names_ids: bool = False,
) -> ChatLogprobs:
    """One entry a token, each with the `num_top` most probable ones; `names_ids` as in `completion_logprobs`."""
    name = _name_id if names_ids else partial(_text, token_text)
    content: list[ChatLogprob] = []
    for token_id, place in zip(token_ids, places, strict=True):
        ranked = sorted(place.items(), key=lambda item: -item[1].logprob)[:num_top]
        top = [_top(name(other, place), entry) for other, entry in ranked]
        content.append({**_top(name(token_id, place), place[token_id]), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(places: Sequence[PositionLogprobs | None], token_text: TokenText) -> PromptLogprobs:
    """One mapping {token id: log probability, rank, text} a prompt token; None for the first."""
    return [
        None if place is None else {str(token_id): _ranked(token_id, place, token_text) for token_id in place}
        for place in places
    ]


def _ranked(token_id: int, place: PositionLogprobs, token_text: TokenText) -> RankedLogprob:
    entry = place[token_id]
    text = _text(token_text, token_id, place)
    return {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": text}


def _by_text(place: PositionLogprobs, name: TokenName) -> dict[str, float]:
    """Log probability by token text; of tokens that read alike, the most probable one."""
    by_text: dict[str, float] = {}
    for token_id, entry in place.items():
        text = name(token_id, place)
        by_text[text] = max(_finite(entry.logprob), by_text.get(text, LOWEST_LOGPROB))
    return by_text


def _top(text: str, entry: Logprob) -> TopLogprob:
    return {"token": text, "logprob": _finite(entry.logprob), "bytes": list(text.encode())}


def _name_id(token_id: int, _place: PositionLogprobs | None) -> str:
    return f"token_id:{token_id}"


def _text(token_text: TokenText, token_id: int, place: PositionLogprobs | None) -> str:
    entry = None if place is None else place.get(token_id)
    known = None if entry is None else entry.decoded_token
    return token_text(token_id) if known is None else known


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
