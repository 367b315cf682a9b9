"""Ids of calls: the message with a call's result repeats the id."""

from __future__ import annotations

import secrets
import string

from nanoflow.chat_formats.formats import IdStyle

_ALPHABET = string.ascii_letters + string.digits


def new_call_id(style: IdStyle) -> str:
    """An id for a call, which no other call has."""
    if style is IdStyle.NINE:
        return "".join(secrets.choice(_ALPHABET) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
