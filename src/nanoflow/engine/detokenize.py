"""Tokens of one completion to text as they come, in groups of any size.

`make_detokenizer` chooses between two classes. `ByteDetokenizer` concatenates the tokens' bytes; it works for the
decoders that `token_bytes.py` knows. `WindowDetokenizer` has the tokenizer decode the new tokens together with a few
older ones; it works for every decoder. Both look only at the new tokens and a few before them, so the cost of a token
does not depend on how many came before it. The text does not depend on how tokens are grouped.

`tokenizers.decoders.DecodeStream` works token by token too, but returns nothing for an incomplete character at the end,
and withholds all text after bytes that are invalid.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from nanoflow.engine.token_bytes import TokenBytes, is_text, num_pending_bytes
from nanoflow.engine.tokenizer import REPLACEMENT, Tokenizer

# A character of UTF-8 has at most this many bytes.
_MAX_CHAR_BYTES = 4
# Number of prompt tokens that the first token is decoded with. The smallest that begins with a whole character is used.
_CONTEXT_SIZES = range(6, 25)
# Bytes that only continue a character.
_CONTINUATIONS = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))
# The characters that the error handler "surrogateescape" puts in place of invalid bytes.
_WRONG_BYTE = re.compile("[\udc80-\udcff]")


class Detokenizer(Protocol):
    """Text of one completion.

    The texts that `push` and `flush` return, concatenated, equal what decoding the prompt and the completion together
    shows after the prompt. A character is shown only when it is complete. If the prompt ends inside a character, the
    rest of that character belongs to the completion.

    One exception: a decoder with byte tokens ("<0xE2>") replaces a whole run of them if one byte is invalid. Here the
    complete characters of such a run are shown, since they may have been sent already.
    """

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty in the middle of a character."""

    def flush(self) -> str:
        """The rest of the text at the end; an incomplete character shows as U+FFFD."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True
) -> Detokenizer:
    """The fastest detokenizer for a tokenizer.

    Args:
        tokenizer: Decodes.
        prompt_token_ids: What the completion continues.
        skip_special_tokens: Leave special tokens out.
    """
    if tokenizer.byte_rule is None:
        return WindowDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens)
    return ByteDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens)


class ByteDetokenizer:
    """A `Detokenizer` for tokens that stand for bytes.

    Args:
        tokenizer: One with a `byte_rule`.
        prompt_token_ids: What the completion continues.
        skip_special_tokens: Leave special tokens out.
    """

    __slots__ = ("_bytes_of", "_is_start", "_pending", "_replaces_each_byte")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        rule = tokenizer.byte_rule
        if rule is None:
            raise ValueError("the tokens of this tokenizer do not stand for bytes")
        token_bytes = tokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
        self._bytes_of = token_bytes.__getitem__
        self._replaces_each_byte = rule.replaces_each_byte
        tail = _last_bytes(token_bytes, prompt_token_ids)
        # If the prompt has no text, the text begins with the first token.
        self._is_start = rule.strips_first_space and not tail
        self._pending = tail[len(tail) - num_pending_bytes(tail) :]

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty in the middle of a character."""
        is_one = len(token_ids) == 1
        data = self._bytes_of(token_ids[0]) if is_one else b"".join(map(self._bytes_of, token_ids))
        if self._pending:
            data = self._pending + data
        text, num_used = utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        if self._replaces_each_byte and REPLACEMENT in text:
            text = _replacing_each_byte(data[:num_used])
        return self._without_first_space(text) if self._is_start else text

    def flush(self) -> str:
        """The text of what is left, at the end: an incomplete character shows as U+FFFD."""
        pending, self._pending = self._pending, b""
        # Python also waits after some bytes that begin no character, so the rest may give several U+FFFD.
        return REPLACEMENT * len(pending) if self._replaces_each_byte else utf_8_decode(pending, "replace", True)[0]

    def _without_first_space(self, text: str) -> str:
        self._is_start = not text
        return text.removeprefix(" ")


class WindowDetokenizer:
    """A `Detokenizer` for any tokenizer.

    Args:
        tokenizer: Decodes.
        prompt_token_ids: What the completion continues.
        skip_special_tokens: Leave special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # None if every token is whole characters.
        self._bytes_of: TokenBytes | None = None
        if tokenizer.splits_characters:
            self._bytes_of = tokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
        # Decoded together: tokens that were shown, as context for the next ones, then tokens that were not.
        self._window = self._context(prompt_token_ids)
        # If the prompt ends inside a character, its rest is shown: those tokens of the prompt count as not shown.
        self._num_shown = self._num_whole()
        self._shown_text = self._decode(self._window[: self._num_shown])

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty in the middle of a character."""
        is_silent, skips = self._tokenizer.is_silent, self._skip_special_tokens
        return self._push([token_id for token_id in token_ids if not is_silent(token_id, skip_special_tokens=skips)])

    def flush(self) -> str:
        """The text of what is left, at the end: an incomplete character shows as U+FFFD."""
        return self._show(len(self._window))

    def _push(self, new: list[int]) -> str:
        """As `push`, for tokens that have text."""
        if not new:
            return ""
        if len(new) > 1 and self._bytes_of is not None and REPLACEMENT in self._decode(new):
            # A decoder may replace valid text beside invalid bytes: decode fewer tokens at once.
            half = len(new) // 2
            return self._push(new[:half]) + self._push(new[half:])
        # A character that the new tokens do not continue is invalid. It is decoded alone, for the same reason.
        wrong = self._show(len(self._window)) if self._is_broken_off(new[0]) else ""
        self._window += new
        num_whole = self._num_whole()
        return wrong + (self._show(num_whole) if num_whole > self._num_shown else "")

    def _is_broken_off(self, token_id: int) -> bool:
        """True if the window ends inside a character that a token does not continue."""
        if self._bytes_of is None:
            return False
        tail = _last_bytes(self._bytes_of, self._window)
        num_pending = num_pending_bytes(tail)
        begun = tail[len(tail) - num_pending :] + self._bytes_of[token_id][:1]
        return num_pending > 0 and num_pending_bytes(begun) != len(begun) and not is_text(begun)

    def _show(self, num_whole: int) -> str:
        """Mark the first `num_whole` tokens of the window as shown; return what is new of their text."""
        new_text = self._new_text(num_whole)
        if new_text:
            del self._window[: self._num_shown]
            self._num_shown = num_whole - self._num_shown
            self._shown_text = self._decode(self._window[: self._num_shown])
        return new_text

    def _new_text(self, num_whole: int) -> str:
        text, shown = self._decode(self._window[:num_whole]), self._shown_text
        new_text = text[len(shown) :] if text.startswith(shown) else None
        if new_text is not None and REPLACEMENT not in new_text:
            return new_text
        # Invalid bytes may have replaced valid text beside them: then the new tokens alone give more text.
        alone = self._decode(self._window[self._num_shown : num_whole])
        return alone if new_text is None or new_text.count(REPLACEMENT) > alone.count(REPLACEMENT) else new_text

    def _num_whole(self) -> int:
        """Number of tokens of the window up to the last that ends with a whole character."""
        num_whole, window, bytes_of = len(self._window), self._window, self._bytes_of
        if bytes_of is None:
            return num_whole
        while num_pending := num_pending_bytes(_last_bytes(bytes_of, window[:num_whole])):
            while num_pending > 0:
                num_whole -= 1
                num_pending -= len(bytes_of[window[num_whole]])
            # A token may end one character and begin the next.
            if not self._is_inside_character(window[num_whole]):
                break
        return num_whole

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, beginning with a whole character."""
        tails = (list(prompt_token_ids[-size:]) for size in _CONTEXT_SIZES)
        whole = (tail for tail in tails if not tail or not self._is_inside_character(tail[0]))
        return next(whole, list(prompt_token_ids[-_CONTEXT_SIZES[0] :]))

    def _is_inside_character(self, token_id: int) -> bool:
        """True if a token begins with a byte that continues a character."""
        data = b"" if self._bytes_of is None else self._bytes_of[token_id]
        return data[:1] in _CONTINUATIONS

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)


def _last_bytes(token_bytes: TokenBytes, token_ids: Sequence[int]) -> bytes:
    """The bytes of the last tokens, enough to hold an incomplete character; empty if no token has any."""
    tail = b""
    for token_id in reversed(token_ids):
        tail = token_bytes[token_id] + tail
        if len(tail) >= _MAX_CHAR_BYTES:
            break
    return tail


def _replacing_each_byte(data: bytes) -> str:
    """Decode UTF-8, with a U+FFFD for every byte that belongs to no character."""
    return _WRONG_BYTE.sub(REPLACEMENT, data.decode("utf-8", "surrogateescape"))
