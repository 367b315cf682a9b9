"""Background requests in a real engine: left out of iterations for a while, they get the tokens that they get alone."""

from __future__ import annotations

from tests.left_out import tokens_alone_and_beside


def test_requests_that_were_left_out_get_the_same_tokens() -> None:
    alone, beside, num_without = tokens_alone_and_beside("cpu")
    assert beside == alone and all(len(tokens) == 12 for tokens in alone)
    assert num_without > 5
