"""Keys of pages: a page of the KV cache is found by the tokens in it and all tokens before them.

The keys and values of a token depend on every token before it. So the key of a page is a hash of its own tokens and of
the key of the page before it, and two requests whose keys are equal up to a page have the same prefix up to there
(SHA-256: that they are equal by accident, or made to be, can be ruled out). The first page follows a *root*, which has
a salt that keeps the pages of different users apart.

Front ends make the keys of prompts, so that the engine's loop does not; it makes those of completions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from nanoflow.batch import Int32

KEY_BYTES = 32
_TOKEN_BYTES = 4


def root_key(salt: str | None = None) -> bytes:
    """The key that stands before the first page.

    Args:
        salt: Requests with another salt, or none, share no pages with those that have this one.
    """
    return hashlib.sha256(b"nanoflow" if salt is None else b"nanoflow salt " + salt.encode()).digest()


def split(keys: bytes) -> tuple[bytes, ...]:
    """Keys that stand one after the other."""
    return tuple(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))


def page_keys(token_ids: Sequence[int] | Int32, page_size: int, before: bytes) -> list[bytes]:
    """The keys of all pages that these tokens fill.

    Args:
        token_ids: N tokens, the first of which begins a page.
        page_size: Tokens a page.
        before: The key of the page before, or the root.

    Returns:
        N // page_size keys of `KEY_BYTES` bytes; tokens of a page that is not full have none.
    """
    data = np.asarray(token_ids, dtype="<i4").tobytes()
    step, key, keys = page_size * _TOKEN_BYTES, before, []
    for start in range(0, len(data) - step + 1, step):
        key = hashlib.sha256(key + data[start : start + step]).digest()
        keys.append(key)
    return keys
