"""The bytes of each token, for tokenizers whose decoder only concatenates bytes.

There are two such kinds of decoder. Byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as a printable character.
Byte fallback (Llama 2, Mistral, Gemma) writes words as text and other bytes as tokens such as "<0xE2>". The text is the
concatenation of the tokens' bytes, read as UTF-8, so a token can be decoded without its neighbours.
"""

from __future__ import annotations

import json
import re
from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRule:
    """How a decoder turns tokens into text.

    Attributes:
        read: From a token, as the vocabulary writes it, to its bytes.
        strips_first_space: Whether a space at the beginning of a text is left out.
        replaces_each_byte: True if each invalid byte gives a U+FFFD; False if all bytes of an incomplete character give
            one together.
    """

    read: Callable[[str], bytes]
    strips_first_space: bool
    replaces_each_byte: bool


class TokenBytes(dict[int, bytes]):
    """Bytes by token id. They are read at the first access, since vocabularies have 100,000 tokens and more.

    Args:
        read: From a token id to its bytes.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, token_id: int) -> bytes:
        """Read the bytes of a token and keep them."""
        data = self[token_id] = self._read(token_id)
        return data


def byte_rule(decoder: Any) -> ByteRule | None:
    """The rule of a decoder of `tokenizers`; None if it does more than concatenate bytes."""
    if decoder is None:
        return None
    parts = _parts(decoder)
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return ByteRule(read=_byte_level_reader(), strips_first_space=False, replaces_each_byte=False)
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or parts[0] != _replaces_by_space():
        return None
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if parts[3:] not in ([], [strip]):
        return None
    return ByteRule(read=_read_fallback, strips_first_space=bool(parts[3:]), replaces_each_byte=True)


def byte_reader(decoder: Any) -> Callable[[str], bytes] | None:
    """How a decoder reads the bytes of a token, whatever else it does; None if its tokens are whole characters."""
    kinds = [] if decoder is None else [part["type"] for part in _parts(decoder)]
    if "ByteLevel" in kinds:
        return _byte_level_reader()
    return _read_fallback if "ByteFallback" in kinds else None


def is_text(data: bytes) -> bool:
    """True if bytes are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def num_pending_bytes(data: bytes) -> int:
    """How many bytes at the end belong to an incomplete character."""
    return len(data) - utf_8_decode(data, "replace", False)[1]


def character_offsets(parts: Sequence[bytes], num_left_out: int = 0) -> list[int]:
    """The character at which each part of a text in UTF-8 begins; a part inside a character begins with that one.

    Args:
        parts: Consecutive parts of the text's bytes.
        num_left_out: Characters at the beginning that are not counted.
    """
    offsets, num_chars = [], -num_left_out
    for part in parts:
        begins_inside = 0x80 <= part[0] < 0xC0 if part else False
        offsets.append(max(num_chars - begins_inside, 0))
        num_chars += sum(not 0x80 <= byte < 0xC0 for byte in part)
    return offsets


def _parts(decoder: Any) -> list[dict[str, Any]]:
    """A decoder's steps; nested sequences are flattened."""
    return _steps(json.loads(decoder.__getstate__()))


def _steps(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for inner in part["decoders"] for step in _steps(inner)] if part["type"] == "Sequence" else [part]


def _replaces_by_space() -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}


def _byte_level_reader() -> Callable[[str], bytes]:
    """Reader of byte-level tokens: printable Latin-1 characters are their own bytes, U+0100 and up the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def read(token: str) -> bytes:
        # A token with any other character was added to the vocabulary as plain text.
        is_text = any(char not in byte_of for char in token)
        return token.encode() if is_text else bytes(map(byte_of.__getitem__, token))

    return read


def _read_fallback(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return token.replace(_SPACE, " ").encode() if byte is None else bytes([int(byte[1], 16)])
