"""Tokens of one completion to text as they come, in groups of any size.

`make_detokenizer` chooses between two classes. `ByteDetokenizer` adds up the tokens' bytes; it serves the decoders that
`token_bytes.py` knows. `WindowDetokenizer` asks the tokenizer to decode the new tokens together with a few older ones;
it serves every decoder. Neither looks at more than the new tokens and a few before them, so that the price of a token
does not depend on how many came before it. How tokens are grouped makes no difference to the text.

`tokenizers.decoders.DecodeStream` does the same token by token, but gives back nothing at the end, where an incomplete
character is left, and holds back everything after bytes that are no text.
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
# How many tokens of the prompt the first token is decoded with; more if fewer would begin inside a character.
_CONTEXT_SIZES = range(6, 25)
# Bytes that only continue a character.
_CONTINUATIONS = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))
# What the error handler "surrogateescape" makes of each.
_WRONG_BYTE = re.compile("[\udc80-\udcff]")


class Detokenizer(Protocol):
    """Text of one completion.

    All texts that `push` and `flush` return, put together, are what decoding prompt and completion as a whole shows
    after the prompt. A character is not shown before it is complete. If the prompt ends inside a character, what
    completes it belongs to the completion.

    One exception: decoders with byte tokens ("<0xE2>") give up a whole run of them for one wrong byte. Here the
    characters of such a run that are whole are shown: they may have been sent already.
    """

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty in the middle of a character."""

    def flush(self) -> str:
        """The text of what is left, at the end: an incomplete character shows as U+FFFD."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True
) -> Detokenizer:
    """The fastest detokenizer that there is for a tokenizer.

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
        # The very beginning of the text is still to come if the prompt shows nothing.
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
        # Python waits for the rest of some bytes that no character begins with, so what is left may show as several.
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
        # Decoded together: tokens that were shown (for what they mean to the next ones), then tokens that were not.
        self._window = self._context(prompt_token_ids)
        # A prompt that ends inside a character: what completes it is shown, so these tokens count as not shown.
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
        """`push` for tokens that show."""
        if not new:
            return ""
        if len(new) > 1 and self._bytes_of is not None and REPLACEMENT in self._decode(new):
            # Decoders give up more than the wrong bytes of what they are given at once; one by one nothing is spoilt.
            half = len(new) // 2
            return self._push(new[:half]) + self._push(new[half:])
        # A character that the new tokens do not complete is wrong; by itself, for the same reason.
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
        # Wrong bytes may have spoilt what stands beside them: then the new tokens have more text by themselves.
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
        """The last tokens of the prompt, from where they begin with a whole character."""
        tails = (list(prompt_token_ids[-size:]) for size in _CONTEXT_SIZES)
        whole = (tail for tail in tails if not tail or not self._is_inside_character(tail[0]))
        return next(whole, list(prompt_token_ids[-_CONTEXT_SIZES[0] :]))

    def _is_inside_character(self, token_id: int) -> bool:
        """True if a token begins with a byte that only continues a character."""
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
    """UTF-8 in which every byte that belongs to no character gives a U+FFFD."""
    return _WRONG_BYTE.sub(REPLACEMENT, data.decode("utf-8", "surrogateescape"))
