"""Attacks on a server, one of each class: what a client can send that costs the server more than it should.

Each attack is a function that talks to a server for some seconds. Bodies are made before it starts, so that making them
does not take CPU time from the server on a small machine. `under_attack.py` and tests run attacks beside clients that
must not suffer. As a command it waits for a line on standard input, and then runs one attack:

    python -m benchmarks.robustness.attacks NAME HOST PORT SECONDS
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoflow.cli.options import CommandParser

Address = tuple[str, int]
Attack = Callable[[Address, float], list[int]]

_TIMEOUT_S = 60.0
_PAUSE_S = 0.2
_WORDS = "hello world, what a day "


def post(path: str, body: Any) -> bytes:
    """A request with a JSON body, on a connection that is closed after the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def chunked(path: str, content: bytes, count: int) -> bytes:
    """A request whose body is a number of equal chunks."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    chunk = b"%x\r\n%s\r\n" % (len(content), content)
    return f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk * count + b"0\r\n\r\n"


def status_of(address: Address, request: bytes) -> int:
    """Send a request and read the answer to its end: its status, or 0 if the connection was closed without one."""
    answer = b""
    with socket.create_connection(address, _TIMEOUT_S) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request)
        with contextlib.suppress(OSError):
            while piece := connection.recv(1 << 16):
                answer = answer or piece
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def again_and_again(*requests: bytes) -> Attack:
    """Send requests one after the other, with a pause after each, until time is up."""

    def attack(address: Address, seconds: float) -> list[int]:
        statuses, end_s = list[int](), time.monotonic() + seconds
        while not statuses or time.monotonic() < end_s:
            for request in requests:
                statuses.append(status_of(address, request))
                time.sleep(_PAUSE_S)
        return statuses

    return attack


def held(count: int, first: bytes = b"", drip: bytes = b"") -> Attack:
    """Open connections that send something, then a little every half second, and never read."""

    def attack(address: Address, seconds: float) -> list[int]:
        connections, end_s = list[socket.socket](), time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                with contextlib.suppress(OSError):
                    connections.append(stack.enter_context(socket.create_connection(address, _TIMEOUT_S)))
                    connections[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    connections[-1].sendall(first)
            while time.monotonic() < end_s:
                time.sleep(0.5)
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.sendall(drip)
        return []

    return attack


def _completion(**fields: Any) -> bytes:
    return post("/v1/completions", {"prompt": _WORDS, "max_tokens": 4, **fields})


def _text(num_chars: int) -> str:
    return (_WORDS * (num_chars // len(_WORDS) + 1))[:num_chars]


def _messages(count: int, content: Any = "hi") -> bytes:
    return post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}] * count, "max_tokens": 2})


def _ids(count: int) -> list[int]:
    return [index % 250 for index in range(count)]


_OPEN = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
# Each rule is twice the next one.
_GROWING = "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(20)) + 'A20: "x"\n'
_GET = b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"

# Functions that prepare an attack, by name; only the attack that runs is prepared.
ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "one long prompt": lambda: again_and_again(_completion(prompt=_text(4 << 20))),
    "one long prompt in one word": lambda: again_and_again(_completion(prompt="a" * 4000)),
    "many long prompts": lambda: again_and_again(_completion(prompt=[_text(4090)] * 1024)),
    "as many characters as are let in": lambda: again_and_again(_completion(prompt=[_text(1 << 13)] * 127)),
    "prompts times n": lambda: again_and_again(_completion(prompt=["a"] * 32, n=128)),
    "more prompts than are let in": lambda: again_and_again(_completion(prompt=["a"] * 100_000)),
    "20 MB of ids": lambda: again_and_again(_completion(prompt=_ids(5_000_000))),
    "as many ids as are let in": lambda: again_and_again(_completion(prompt=_ids(520_000))),
    "lists of ids": lambda: again_and_again(_completion(prompt=[[1]] * 58_000)),
    "stop strings": lambda: again_and_again(_completion(stop=["a" * 80_000 + chr(97 + i) for i in range(16)])),
    "as long stop strings as are let in": lambda: again_and_again(
        _completion(stop=[" hello" * 160 + chr(97 + i) for i in range(16)], max_tokens=200, prompt="hello" * 50)
    ),
    "bad words": lambda: again_and_again(_completion(bad_words=[_text(10_000)] * 128)),
    "biases": lambda: again_and_again(_completion(logit_bias={str(i): 1 for i in range(200_000)})),
    "allowed tokens": lambda: again_and_again(_completion(allowed_token_ids=_ids(500_000), n=128)),
    "schemas that take forever": lambda: again_and_again(
        _completion(guided_json={"type": "integer", "multipleOf": 1_000_003})
    ),
    "grammars that grow": lambda: again_and_again(_completion(guided_grammar=_GROWING, n=16, max_tokens=64)),
    "deep lists": lambda: again_and_again(post("/v1/completions", b"[" * 1_000_000)),
    "many lists": lambda: again_and_again(_completion(chat_template_kwargs=[[]] * 58_000)),
    "many names": lambda: again_and_again(_completion(metadata={str(i): i for i in range(100_000)})),
    "escapes": lambda: again_and_again(post("/v1/completions", b'{"prompt": "' + b"\\\\" * 4_000_000 + b'"}')),
    "many messages": lambda: again_and_again(_messages(4096), _messages(100_000)),
    "many parts": lambda: again_and_again(_messages(1, [{"type": "text", "text": "a"}] * 100_000)),
    "wrong messages": lambda: again_and_again(_messages(4096, [{"type": "image", "text": 5}])),
    "wrong ids": lambda: again_and_again(post("/detokenize", {"tokens": ["a"] * 500_000})),
    "log probabilities": lambda: again_and_again(_completion(logprobs=20, n=16, max_tokens=64)),
    "log probabilities of prompts": lambda: again_and_again(
        _completion(prompt=_text(2000), prompt_logprobs=20, echo=True, logprobs=20),
        _completion(prompt=_text(2000), echo=True, logprobs=5, stream=True),
    ),
    "a large answer": lambda: again_and_again(_completion(n=128, max_tokens=16, return_token_ids=True)),
    "tokenize": lambda: again_and_again(
        post("/tokenize", {"prompt": _text(1 << 20), "return_token_strs": True}),
        post("/tokenize", {"prompt": _text(4 << 20)}),
    ),
    "detokenize": lambda: again_and_again(post("/detokenize", {"tokens": _ids(520_000)})),
    "metrics": lambda: again_and_again(_GET % b"/metrics"),
    "a chunked body": lambda: again_and_again(chunked("/v1/completions", b" " * (1 << 20), 40)),
    "a long head": lambda: again_and_again(
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"x: a\r\n" * 20_000 + b"\r\n",
    ),
    "pipelined": lambda: again_and_again(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * 5000),
    "no HTTP": lambda: again_and_again(b"\x00\x01\r\n\r\n"),
    "idle connections": lambda: held(300),
    "slow heads": lambda: held(100, b"GET /health HTTP/1.1\r\n", b"x: y\r\n"),
    "slow bodies": lambda: held(100, _OPEN + b"content-length: 9999\r\n\r\n", b" "),
    "clients that do not read": lambda: held(
        4, post("/v1/completions", {"prompt": "a", "n": 8, "stream": True, "logprobs": 20, "max_tokens": 100})
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attack, and print how often each status was answered."""
    parser = CommandParser(prog="python -m benchmarks.robustness.attacks", description=__doc__)
    parser.add_argument("name", choices=list(ATTACKS), metavar="NAME", help=", ".join(ATTACKS))
    parser.add_argument("host", metavar="HOST")
    parser.add_argument("port", type=int, metavar="PORT")
    parser.add_argument("seconds", type=float, metavar="SECONDS")
    args = parser.parse_args(argv)
    attack = ATTACKS[args.name]()
    print("ready", flush=True)
    sys.stdin.readline()
    statuses = attack((args.host, args.port), args.seconds)
    print(json.dumps({str(status): statuses.count(status) for status in sorted(set(statuses))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
