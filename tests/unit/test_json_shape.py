"""How deep and how large JSON is, counted without parsing it, is what parsing finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.server import json_shape as module
from nanoflow.server.json_shape import ITEMS_A_CONTAINER, ITEMS_A_NAME, JsonShape, json_shape

_TEXTS = st.text(st.sampled_from(list('ab\\"[]{},:\n\u00e9')), max_size=6)
_VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)


def shape_of(value: Any) -> JsonShape:
    """The same from the value: commas, names and lists."""
    if not isinstance(value, list | dict):
        return JsonShape(depth=0, num_items=0)
    inner = list(map(shape_of, value.values() if isinstance(value, dict) else value))
    own = max(len(value) - 1, 0) + ITEMS_A_CONTAINER + (ITEMS_A_NAME * len(value) if isinstance(value, dict) else 0)
    return JsonShape(
        depth=1 + max((one.depth for one in inner), default=0), num_items=own + sum(one.num_items for one in inner)
    )


@settings(deadline=None, max_examples=300)
@given(value=_VALUES, piece_bytes=st.integers(1, 9), is_ascii=st.booleans())
def test_what_is_counted_is_what_there_is(value: Any, piece_bytes: int, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", 2 * piece_bytes)
        assert json_shape(text) == shape_of(value)


def test_brackets_in_strings_neither_hide_nor_add_depth() -> None:
    assert json_shape(b'["]]]]", [["[[[["]]]').depth == 3
    assert json_shape(rb'["\"]", [[1]]]').depth == 3
    assert json_shape(b'"[[["').depth == 0


@pytest.mark.parametrize("text", [b"", b"]]]]", b'"', b"\\", b"[" * 1000, b"\xff\x00,"])
def test_what_is_no_json_is_counted_without_an_error(text: bytes) -> None:
    assert json_shape(text).depth == (1000 if text.startswith(b"[") else 0)
