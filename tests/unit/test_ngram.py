"""Prompt look-up: what it finds, and how the option that asks for it is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.option import ConfigError
from nanoflow.scheduler.ngram import continuation
from nanoflow.speculation import check_speculation, in_full

# Looking up


@pytest.mark.parametrize(
    ("sequence", "count", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 3, [9, 1, 2]),
        # The longest match counts, not the latest.
        ([5, 1, 2, 8, 4, 2, 9, 5, 1, 2], 2, [8, 4]),
        # Of equal ones the latest.
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),
        # A period goes on beyond the end.
        ([4, 6, 7, 6, 7], 5, [6, 7, 6, 7, 6]),
        ([3, 3], 4, [3, 3, 3, 3]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
    ],
)
def test_the_continuation_of_the_longest_match(sequence: list[int], count: int, expected: list[int]) -> None:
    found = continuation(np.array(sequence, np.int32), count, longest=3, shortest=1)
    assert found.tolist() == expected and found.dtype == np.int32


def test_a_match_shorter_than_asked_for_is_none() -> None:
    sequence = np.array([9, 1, 2, 8, 7, 1, 2], np.int32)
    assert continuation(sequence, 2, longest=4, shortest=2).tolist() == [8, 7]
    assert continuation(sequence, 2, longest=4, shortest=3).tolist() == []


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_look_up_is_what_a_plain_search_finds(sequence: list[int], count: int, shortest: int, more: int) -> None:
    def search() -> list[int]:
        for length in range(shortest + more, shortest - 1, -1):
            for start in range(len(sequence) - length - 1, -1, -1):
                if sequence[start : start + length] == sequence[len(sequence) - length :]:
                    grown = list(sequence)
                    for place in range(count):
                        grown.append(grown[start + length + place])
                    return grown[len(sequence) :]
        return []

    found = continuation(np.array(sequence, np.int32), count, longest=shortest + more, shortest=shortest)
    assert found.tolist() == search()


# The option


@pytest.mark.parametrize(
    ("text", "full"), [("ngram:4", "ngram:4:4:2"), (" NGRAM:1:1 ", "ngram:1:1:1"), ("ngram:8:6:3", "ngram:8:6:3")]
)
def test_the_option_is_read(text: str, full: str) -> None:
    assert in_full(text) == full
    check_speculation(text)


@pytest.mark.parametrize(
    "text",
    ["", "ngram", "ngram:", "ngram:0", "ngram:33", "ngram:4:2:3", "ngram:4:65", "ngram:x", "ngram:4:3:2:1", "eagle:4"],
)
def test_an_option_that_cannot_be_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^speculative: [^\n]+$"):
        check_speculation(text)
