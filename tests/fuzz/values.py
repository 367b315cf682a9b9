"""Hostile JSON values, as JSON text: so that what no Python value can say is said too, a name twice or 1e999.

A value depends on its generator alone. What they are put into is `bodies.py`'s and `files.py`'s.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

_NUMBERS: Sequence[str] = (
    *("0", "-0", "1", "-1", "2", "3.5", "-0.0", "2.0", "1e0", "1e3", "1e308", "1e999", "-1e999", "1e-400", "0.1"),
    *(str(sign * (2**power + more)) for sign in (1, -1) for power in (15, 31, 32, 53, 63, 64) for more in (-1, 0)),
    *("9" * 30, "9" * 5000, "NaN", "Infinity", "-Infinity", "nan", "0x10", "01", "+1", ".5", "5.", "1_000"),
)
_TEXTS: Sequence[str] = (
    *("", " ", "a", "x" * 300, "\0", "a\0b", "\n" * 40, "\t", "\x7f", "\x80", "\ufeff", "\ufffd", "\U0001f600" * 20),
    *("e\u0301\u0302\u0303" * 20, "\u202etxt", "\u2028", "{{", "{% for i in range(9) %}", "%s%n", "../../etc/passwd"),
    *("<|endoftext|>", "<|user|>", "<s></s>", "token_id:5", "null", "true", "1", "-1", "1e5", "NaN", "[]", "{}"),
    *("default", "m", "data: [DONE]\n\n", "__class__", "$ref", "assistant", "tool", "text", "image_url"),
)
_LITERALS: Sequence[str] = ("null", "true", "false", "[]", "{}", "[null]", "[[]]", '""', "undefined", "'a'", "")
_SURROGATES: Sequence[str] = (r'"\ud800"', r'"\udc00\ud800"', r'"a\udfffb"', r'"\u0000"', r'"\uZZZZ"', r'"\x"')


def hostile_value(rng: random.Random, depth: int = 0) -> str:
    """A value as JSON text, or what looks like one."""
    return rng.choice(_RARE if depth == 0 and rng.random() < 0.02 else _KINDS)(rng, depth)


def hostile_text(rng: random.Random) -> str:
    """A text."""
    return rng.choice(_TEXTS) * rng.choice((1, 1, 1, 2, 50))


def _number(rng: random.Random, _depth: int) -> str:
    return rng.choice(_NUMBERS)


def _text(rng: random.Random, _depth: int) -> str:
    return json.dumps(hostile_text(rng), ensure_ascii=rng.random() < 0.5)


def _literal(rng: random.Random, _depth: int) -> str:
    return rng.choice(_LITERALS)


def _surrogate(rng: random.Random, _depth: int) -> str:
    return rng.choice(_SURROGATES)


def _list(rng: random.Random, depth: int) -> str:
    items = rng.choice((1, 2, 3, 8)) if depth < 3 else 0
    return "[" + ", ".join(hostile_value(rng, depth + 1) for _ in range(items)) + "]"


def _object(rng: random.Random, depth: int) -> str:
    names = rng.choices(("a", "type", "text", "role", "content", "5", "-1", "", "a"), k=2 if depth < 3 else 0)
    return "{" + ", ".join(f"{json.dumps(name)}: {hostile_value(rng, depth + 1)}" for name in names) + "}"


def _repeated(rng: random.Random, _depth: int) -> str:
    item = rng.choice(('"a"', "5", "null", "[5]", '"' + "b" * 200 + '"'))
    return "[" + ", ".join([item] * rng.choice((17, 65, 1025))) + "]"


def _nested(rng: random.Random, _depth: int) -> str:
    levels = rng.choice((30, 300, 3000, 30000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return opening * levels + "1" + closing * rng.choice((levels, levels - 1, 0))


def _long_text(rng: random.Random, _depth: int) -> str:
    return json.dumps(rng.choice(("a", "ab ", "\u00e9", "\U0001f600", "<|user|>")) * rng.choice((3000, 30000)))


def _wide(rng: random.Random, _depth: int) -> str:
    return "{" + ", ".join(f'"{number}": {rng.choice(("1", "null", "-1e5"))}' for number in range(3000)) + "}"


_Kind = Callable[[random.Random, int], str]
_KINDS: Sequence[_Kind] = (_number, _number, _text, _text, _literal, _surrogate, _list, _object)
_RARE: Sequence[_Kind] = (_repeated, _nested, _long_text, _wide)
