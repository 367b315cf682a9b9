"""The fuzz finds what it looks for: bad answers are told from good ones, and inputs are the same every time."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.fuzz.judge import NOT_HTTP, Broken, Reply, problem_of, read_reply
from tests.fuzz.messages import hostile

_JSON = {"content-type": "application/json"}
_STREAM = {"content-type": "text/event-stream; charset=utf-8"}
_ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}


def refusal(status: int = 400, **parts: object) -> Reply:
    """A refusal in OpenAI's shape, with other parts."""
    return Reply(status=status, headers=_JSON, body=json.dumps({"error": {**_ERROR, **parts}}).encode())


def test_good_answers_are_good() -> None:
    assert problem_of(refusal()) is None and problem_of(refusal(503)) is None
    assert problem_of(Reply(status=400, headers={}, body=NOT_HTTP)) is None
    assert problem_of(Reply(status=200, headers=_JSON, body=b"{}")) is None
    assert problem_of(Reply(status=200, headers=_STREAM, body=b"data: {}\n\ndata: [DONE]\n\n")) is None
    named = b'event: message_start\ndata: {"a": 1}\n\nevent: message_stop\ndata: {"a": 1}\n\n'
    assert problem_of(Reply(status=200, headers=_STREAM, body=named)) is None
    own = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    assert problem_of(Reply(status=400, headers=_JSON, body=json.dumps(own).encode())) is None
    assert problem_of(Reply(status=405, headers={}, body=b""), is_head=True) is None


@pytest.mark.parametrize(
    "reply",
    [
        refusal(500),
        refusal(502),
        refusal(message=""),
        refusal(message="a\nb"),
        refusal(message=5),
        refusal(param=["x"]),
        refusal(message='File "/x/y.py", line 5'),
        Reply(status=400, headers=_JSON, body=b'{"detail": "x"}'),
        Reply(status=400, headers={}, body=b""),
        Reply(status=404, headers={}, body=b"Not Found"),
        Reply(status=200, headers=_JSON, body=b"{"),
        Reply(status=200, headers=_STREAM, body=b"data: {}\n\n"),
        Reply(status=200, headers=_STREAM, body=b"data: {\n\ndata: [DONE]\n\n"),
        Reply(status=200, headers=_STREAM, body=b"event: message_start\ndata: {}\n\n"),
        Reply(status=200, headers=_STREAM, body=b""),
    ],
)
def test_bad_answers_are_found(reply: Reply) -> None:
    assert problem_of(reply) is not None


def read(data: bytes) -> list[Reply]:
    """Every answer in what came over a connection."""

    async def run() -> list[Reply]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        replies = []
        while (reply := await read_reply(reader)) is not None:
            replies.append(reply)
        return replies

    return asyncio.run(run())


def test_answers_are_read_off_a_connection() -> None:
    plain, chunked = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"2\r\n{}\r\n3\r\n   \r\n0\r\n\r\n"
    head = b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n"
    replies = read(b"HTTP/1.1 100 Continue\r\n\r\n" + plain + head + chunked + plain)
    assert [(reply.status, reply.body) for reply in replies] == [(200, b"{}"), (404, b"{}   "), (200, b"{}")]


@pytest.mark.parametrize(
    "data",
    [
        *(b"HTTP/1.1 200 OK\r\n", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{}"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
    ],
)
def test_broken_answers_are_told(data: bytes) -> None:
    with pytest.raises(Broken):
        read(data)


def test_an_input_is_a_function_of_seed_and_number() -> None:
    inputs = [hostile(3, number) for number in range(400)]
    assert inputs == [hostile(3, number) for number in range(400)]
    assert len({each.data for each in inputs}) > 350 and {each.data for each in inputs} != {
        hostile(4, number).data for number in range(400)
    }
    assert {each.kind for each in inputs} == {
        *("body", "header", "chunks", "line", "pipeline", "cut", "slow", "leave"),
    }
