"""What a client is told of a body that makes no sense: enough to mend it, and no more than can be read."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.server.errors import ApiError, invalid_body


def problem(field: str, message: str = "is wrong") -> dict[str, Any]:
    return {"type": "value_error", "loc": ("body", field), "msg": f"Value error, {message}"}


@pytest.mark.parametrize(("count", "more"), [(4, None), (5, 1), (9, 5)])
def test_the_first_few_problems_are_told_and_the_others_counted(count: int, more: int | None) -> None:
    error = invalid_body([problem(f"field{place}") for place in range(count)])
    shown = [f"field{place}: is wrong" for place in range(4)]
    assert error.message.split("; ") == shown + ([] if more is None else [f"and {more} more"])
    assert (error.status, error.param) == (400, "field0")


def test_the_same_problem_is_told_once() -> None:
    assert invalid_body([problem("a"), problem("a"), problem("b")]).message == "a: is wrong; b: is wrong"


def test_a_message_is_cut_and_can_be_written_as_json() -> None:
    body = ApiError(400, "x" * 2000, param="\ud800").body()["error"]
    assert body["message"] == "x" * 1000 + "..." and body["param"] == "?"
