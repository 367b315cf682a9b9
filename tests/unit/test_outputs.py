"""What users hold: text that grows without copies, and log probabilities that read like a list of mappings."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from nanoflow.outputs import CompletionOutput, Logprob, LogprobRows, position_logprobs

ANY_TEXT = st.text(st.characters() | st.sampled_from("\r\n\0🎓"), max_size=10)


@given(start=ANY_TEXT, pieces=st.lists(st.tuples(ANY_TEXT, st.integers(0, 40))))
def test_a_text_that_grows_reads_like_a_string(start: str, pieces: list[tuple[str, int]]) -> None:
    completion, text = CompletionOutput(index=0, text=start), start
    for piece, num_chars in pieces:
        completion.append_text(piece)
        text += piece
        assert completion.text_since(num_chars) == text[num_chars:]
        assert (completion.text, completion.num_chars) == (text, len(text))


def test_a_completion_is_a_plain_dataclass() -> None:
    completion, same = CompletionOutput(index=0), CompletionOutput(index=0, text="ab🎓")
    for piece in ("", "a", "b", "🎓"):
        completion.append_text(piece)
    assert completion == same and repr(completion) == repr(same) and "text='ab🎓'" in repr(same)
    for copied in (pickle.loads(pickle.dumps(completion)), copy.deepcopy(completion), dataclasses.replace(completion)):
        assert copied == same
    assert dataclasses.asdict(completion)["text"] == "ab🎓"
    completion.text += "c"
    assert completion.text == "ab🎓c" and CompletionOutput(index=0).text == ""


def test_a_stream_copies_only_what_is_new() -> None:
    completion = CompletionOutput(index=0, text="x" * 500_000)
    completion.append_text("y")
    assert completion.text_since(0) == "x" * 500_000 + "y"
    buffer = completion.__dict__["text"]
    assert isinstance(buffer, io.StringIO)
    # From the first piece that is read on the buffer makes room for more than it needs.
    assert completion.text_since(500_000) == "y"
    completion.append_text("token")
    tracemalloc.start()
    try:
        for _ in range(100):
            num_chars = completion.num_chars
            completion.append_text("token")
            assert completion.text_since(num_chars) == "token"
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert completion.__dict__["text"] is buffer
    assert peak_bytes < 100_000


def _text_of(token_id: int) -> str:
    return f"<{token_id}>"


ROWS = [([5, 1, 2], [-1.0, -0.5, -2.0], 9), ([1, 1, 2], [-0.5, -0.5, -2.0], 1), ([7], [-3.0], 4)]


def test_rows_read_like_a_list_of_mappings() -> None:
    rows = LogprobRows(_text_of)
    for row in ROWS:
        rows.add(*row)
    expected = [position_logprobs(*row, _text_of) for row in ROWS]
    assert list(rows) == expected and rows == expected and expected == rows
    assert (rows[0], rows[-1], rows[1:], rows[::-1]) == (expected[0], expected[-1], expected[1:], expected[::-1])
    assert len(rows) == 3 and repr(rows) == repr(expected)
    assert rows != expected[:2] and rows != 3
    assert list(rows[0].items())[:2] == [
        (5, Logprob(logprob=-1.0, rank=9, decoded_token="<5>")),
        (1, Logprob(logprob=-0.5, rank=1, decoded_token="<1>")),
    ]
    assert rows[1] == {1: rows[1][1], 2: rows[1][2]}


def test_a_copy_of_rows_is_a_list() -> None:
    rows = LogprobRows(_text_of)
    rows.add(*ROWS[0])
    for copied in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert type(copied) is list and copied == rows
