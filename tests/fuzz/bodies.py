"""Hostile bodies of requests: seeds with fields changed, left out, doubled and added, then bytes changed.

Fields are those that the server knows (`server/protocol.py`), so that new ones are tried as soon as they are there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoflow.server.embedding_fields import EmbeddingRequest
from nanoflow.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    PrefetchRequest,
    TokenizeRequest,
)
from tests.fuzz.values import hostile_text, hostile_value

_SEEDS: Mapping[str, Sequence[Mapping[str, Any]]] = json.loads(
    (Path(__file__).parent / "seeds" / "bodies.json").read_text(encoding="utf-8")
)
ROUTES: Sequence[str] = tuple(_SEEDS)
_FIELDS: Mapping[str, Sequence[str]] = {
    "/v1/completions": tuple(CompletionRequest.model_fields),
    "/v1/chat/completions": tuple(ChatCompletionRequest.model_fields),
    "/v1/embeddings": tuple(EmbeddingRequest.model_fields),
    "/v1/prefetch": tuple(PrefetchRequest.model_fields),
    "/tokenize": tuple(TokenizeRequest.model_fields),
    "/detokenize": tuple(DetokenizeRequest.model_fields),
}


def seed_body(rng: random.Random, route: str) -> bytes:
    """A body that is served."""
    return json.dumps(rng.choice(_SEEDS[route])).encode()


def hostile_body(rng: random.Random, route: str) -> bytes:
    """A body that is wrong in one way or in several, or strange."""
    if rng.random() < 0.05:
        return _disturbed(rng, hostile_value(rng))
    fields = [(name, json.dumps(value)) for name, value in rng.choice(_SEEDS[route]).items()]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_CHANGES)(rng, route, fields)
    text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"
    return _disturbed(rng, text) if rng.random() < 0.2 else text.encode("utf-8", "surrogatepass")


_Fields = list[tuple[str, str]]


def _known(rng: random.Random, route: str, fields: _Fields) -> None:
    name = rng.choice(_FIELDS[route])
    fields[:] = [field for field in fields if field[0] != name] + [(name, hostile_value(rng))]


def _given(rng: random.Random, _route: str, fields: _Fields) -> None:
    if fields:
        place = rng.randrange(len(fields))
        fields[place] = (fields[place][0], hostile_value(rng))


def _missing(rng: random.Random, _route: str, fields: _Fields) -> None:
    if fields:
        del fields[rng.randrange(len(fields))]


def _twice(rng: random.Random, _route: str, fields: _Fields) -> None:
    if fields:
        name, value = rng.choice(fields)
        fields.append((name, rng.choice((value, hostile_value(rng)))))


def _unknown(rng: random.Random, _route: str, fields: _Fields) -> None:
    fields.append((hostile_text(rng), hostile_value(rng)))


def _message(rng: random.Random, _route: str, fields: _Fields) -> None:
    """A conversation with something strange in a message."""
    name, parts = rng.choice(("role", "content", "tool_calls", "name", "x")), ['"role": "user"', '"content": "a"']
    parts[rng.randrange(2)] = f"{json.dumps(name)}: {hostile_value(rng)}"
    fields.append(("messages", "[{" + ", ".join(parts) + "}]"))


_CHANGES = (_known, _known, _known, _given, _given, _missing, _twice, _unknown, _message)


def _disturbed(rng: random.Random, text: str) -> bytes:
    """The bytes of a text, in another encoding, cut, or changed in places."""
    body = text.encode("utf-8", "surrogatepass")
    match rng.randrange(7):
        case 0:
            return body[: rng.randrange(len(body) + 1)]
        case 1:
            return text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "utf-7")), "replace")
        case 2:
            return b"\xef\xbb\xbf" + body
        case 3:
            return body + rng.choice((b"{}", b",", b"\0", b"]", body))
        case 4:
            place = rng.randrange(len(body) + 1)
            return (
                body[:place] + rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\0", b"//", b"\x1b")) + body[place:]
            )
        case 5:
            return b"".join(bytes([byte ^ (rng.random() < 0.02)]) for byte in body[:2000])
        case _:
            return rng.choice((b"", b" ", b"null", b"[]", b"\x1f\x8b\x08\0", rng.randbytes(50)))
