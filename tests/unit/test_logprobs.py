"""Log probabilities as clients read them: tokens are known by id and bytes, whatever their text is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow.outputs import Logprob
from nanoflow.server.logprobs import LOWEST_LOGPROB, chat_logprobs, completion_logprobs, prompt_logprobs

# Two tokens that read alike, two parts of one character, U+FFFD itself, and a name that looks like another's.
BYTES = {1: b"a", 2: b"a", 3: b"\xe2\x9c", 4: b"\x93", 5: b"\xef\xbf\xbd", 6: b"bytes:\\x93", 7: b""}


class Texts:
    def token_text(self, token_id: int) -> str:
        return BYTES[token_id].decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return BYTES[token_id]


def _place(*token_ids: int) -> dict[int, Logprob]:
    return {token_id: Logprob(logprob=-float(rank), rank=rank) for rank, token_id in enumerate(token_ids, start=1)}


def test_no_alternative_is_lost_and_the_chosen_token_keeps_its_name() -> None:
    place = {1: Logprob(logprob=-1.0), 2: Logprob(logprob=-3.0), 3: Logprob(logprob=-2.0), 4: Logprob(logprob=-4.0)}
    shown = completion_logprobs([2], [place], text_offsets=[5], texts=Texts())
    assert shown["tokens"] == ["a"] and shown["token_logprobs"] == [-3.0] and shown["text_offset"] == [5]
    assert shown["top_logprobs"] == [{"a": -3.0, "token_id:1": -1.0, "bytes:\\xe2\\x9c": -2.0, "bytes:\\x93": -4.0}]


@given(st.permutations(list(BYTES)), st.integers(1, len(BYTES)))
def test_every_alternative_has_a_name_of_its_own(token_ids: list[int], count: int) -> None:
    chosen = token_ids[0]
    shown = completion_logprobs([chosen], [_place(*token_ids[:count])], text_offsets=[0], texts=Texts())
    (alternatives,) = shown["top_logprobs"]
    assert alternatives is not None and len(alternatives) == count
    assert alternatives[shown["tokens"][0]] == shown["token_logprobs"][0] == -1.0


def test_bytes_of_parts_of_characters_are_their_own_and_add_up() -> None:
    content = chat_logprobs([3, 4, 5], [_place(3, 4), _place(4), _place(5)], num_top=2, texts=Texts())["content"]
    assert [entry["bytes"] for entry in content] == [[0xE2, 0x9C], [0x93], [0xEF, 0xBF, 0xBD]]
    assert [entry["token"] for entry in content] == ["\ufffd", "\ufffd", "\ufffd"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "✓\ufffd"
    assert [top["bytes"] for top in content[0]["top_logprobs"]] == [[0xE2, 0x9C], [0x93]]


def test_prompt_scores_go_by_id() -> None:
    shown = prompt_logprobs([None, _place(1, 2)], Texts())
    assert shown[0] is None and shown[1] is not None and list(shown[1]) == ["1", "2"]


@pytest.mark.parametrize("logprob", [float("-inf"), LOWEST_LOGPROB - 1])
def test_minus_infinity_is_a_number_in_json(logprob: float) -> None:
    place = {1: Logprob(logprob=logprob)}
    assert completion_logprobs([1], [place], text_offsets=[0], texts=Texts())["token_logprobs"] == [LOWEST_LOGPROB]
