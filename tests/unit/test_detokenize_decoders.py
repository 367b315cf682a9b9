"""Text by decoders that do more than put bytes together, and U+FFFD, which anybody may write."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanoflow.engine.detokenize import WindowDetokenizer, make_detokenizer
from nanoflow.engine.tokenizer import REPLACEMENT
from tests.unit.test_detokenize import CUTS, KINDS, METASPACE, SPACE, TOKEN_OF_BYTE, full_text, grouped, pieces


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "byte-level and more", "byte-fallback and more"])
@given(prompt=st.text(f"ab é漢{REPLACEMENT}", max_size=8), text=st.text(f"ab é漢{REPLACEMENT}", max_size=8), cuts=CUTS)
@settings(max_examples=200, deadline=None)
@example(prompt=f"caf{REPLACEMENT}{REPLACEMENT}", text="b", cuts=[])
def test_a_written_replacement_character_is_a_character(kind: str, prompt: str, text: str, cuts: list[int]) -> None:
    """It is shown once, at once, and never taken for a character that is not complete."""
    tokenizer = KINDS[kind]
    prompt_ids, ids = tokenizer.encode("h" + prompt), tokenizer.encode("a" + text)
    for make in (make_detokenizer, WindowDetokenizer):
        shown = pieces(tokenizer, prompt_ids, ids, make=make)
        assert "".join(shown) == full_text(tokenizer, prompt_ids, ids) and shown[-1] == ""
        assert grouped(tokenizer, prompt_ids, ids, cuts, make=make) == "".join(shown)


def test_a_replacement_character_in_a_vocabulary_of_words_is_one() -> None:
    hello, mark = 1, 10
    assert [METASPACE.token_text(token_id) for token_id in (hello, mark)] == [" hello", REPLACEMENT]
    assert pieces(METASPACE, [hello, mark, mark], [mark, hello, mark]) == [REPLACEMENT, " hello", REPLACEMENT, ""]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@given(data=st.binary(max_size=30), cuts=CUTS, num_prompt=st.integers(0, 12))
@settings(max_examples=200, deadline=None)
@example(data=b"\xc2\xa4\xc3", cuts=[], num_prompt=0)
@example(data=b"\xe2\xf0A", cuts=[], num_prompt=2)
def test_decoders_of_bytes_that_do_more_show_what_bytes_show(
    kind: str, data: bytes, cuts: list[int], num_prompt: int
) -> None:
    tokenizer, more = KINDS[kind], KINDS[f"{kind} and more"]
    ids = [TOKEN_OF_BYTE[byte] if kind == "byte-level" else 1 + byte for byte in data if byte != ord("~")]
    prompt, ids = [*tokenizer.encode("h"), *ids[:num_prompt]], ids[num_prompt:]
    expected = "".join(pieces(tokenizer, prompt, ids)).replace(SPACE, " " if kind == "byte-fallback" else SPACE)
    assert "".join(pieces(more, prompt, ids)) == expected
    assert grouped(more, prompt, ids, cuts) == "".join(pieces(more, prompt, ids))
