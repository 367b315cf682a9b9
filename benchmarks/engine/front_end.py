"""CPU time of the front end for each streamed token: a whole server around an engine without a model.

In each iteration the engine gives every running request one token of a real text, so that decoding costs what it costs
in use. A client process sends all requests at once over HTTP and reads their streams to the end. The result is the CPU
time of the processes that answer HTTP, from the first request to the end of the last, divided by the number of tokens.

    python -m benchmarks.engine.front_end --streams 64 256 1000 --iteration-ms 0 5 --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser

ITERATION_S = "NANOFLOW_BENCH_ITERATION_S"
TEXT = (
    "The quick brown fox jumps over the lazy dog. def add(first, second):\n    return first + second\n"
    "Naïve café, 東京, and a smile \N{GRINNING FACE} to end with. "
)
READY_TIMEOUT_S = 120.0
CLIENT_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement.

    Attributes:
        num_streams: Requests at once.
        iteration_ms: Minimum time of an iteration of the engine; 0 for as fast as possible.
        num_front_ends: Processes that answer HTTP.
        has_stop: Whether requests have a stop string, which never occurs.
        num_tokens: Streamed tokens of all requests.
        cpu_us_per_token: CPU time of the front ends / tokens.
        num_chunks: Events in which the tokens arrived.
        wall_s: Seconds from the first request to the last byte.
    """

    num_streams: int
    iteration_ms: float
    num_front_ends: int
    has_stop: bool
    num_tokens: int
    cpu_us_per_token: float
    num_chunks: int
    wall_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each number of streams at each speed of the engine."""
    parser = CommandParser(prog="python -m benchmarks.engine.front_end", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--iteration-ms", type=float, nargs="+", default=[0.0, 5.0])
    parser.add_argument("--tokens", type=int, default=256, help="of each stream (default: 256)")
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the least CPU time counts (default: 3)")
    parser.add_argument("--stop", action="store_true", help="give each request a stop string that never comes")
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions instead of /v1/completions")
    parser.add_argument("--json", type=Path, help="write the points here")
    parser.add_argument("--client", nargs=2, metavar=("URL", "BODY"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.client:
        print(json.dumps(asyncio.run(load(args.client[0], args.client[1].encode(), args.streams[0]))))
        return 0
    points = []
    print(f"{'streams':>8} {'iteration ms':>12} {'tokens/chunk':>12} {'us a token':>10} {'tokens/s':>10}")
    for iteration_ms in args.iteration_ms:
        with _server(args.api_servers, iteration_ms) as (url, pids):
            for num_streams in args.streams:
                point = min(
                    (_measure(args, url, pids, num_streams, iteration_ms) for _ in range(args.repeats)),
                    key=lambda one: one.cpu_us_per_token,
                )
                points.append(point)
                print(
                    f"{num_streams:8} {iteration_ms:12g} {point.num_tokens / point.num_chunks:12.1f} "
                    f"{point.cpu_us_per_token:10.1f} {point.num_tokens / point.wall_s:10.0f}",
                    flush=True,
                )
    if args.json:
        write_document(args.json, "front_end", path="chat" if args.chat else "completions", points=points)
    return 0


def _measure(args: argparse.Namespace, url: str, pids: list[int], num_streams: int, iteration_ms: float) -> Point:
    body: dict[str, Any] = {"max_tokens": args.tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": "hello"}]} if args.chat else {"prompt": "hello"}
    if args.stop:
        body["stop"] = ["this never comes"]
    path = "/v1/chat/completions" if args.chat else "/v1/completions"
    before_s = sum(map(_cpu_s, pids))
    command = (sys.executable, "-m", "benchmarks.engine.front_end", "--streams", str(num_streams))
    client = (*command, "--client", url + path, json.dumps(body))
    done = subprocess.run(client, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=True)
    seen = json.loads(done.stdout)
    num_tokens = num_streams * args.tokens
    return Point(
        num_streams=num_streams,
        iteration_ms=iteration_ms,
        num_front_ends=len(pids),
        has_stop=args.stop,
        num_tokens=num_tokens,
        cpu_us_per_token=(sum(map(_cpu_s, pids)) - before_s) / num_tokens * 1e6,
        num_chunks=seen["num_chunks"],
        wall_s=seen["wall_s"],
    )


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The server


@contextmanager
def _server(num_front_ends: int, iteration_ms: float) -> Iterator[tuple[str, list[int]]]:
    """A server around the engine without a model: its root URL and the ids of its front ends."""
    from tests.server_process import launch

    flags = ("--api-servers", str(num_front_ends), "--port", "0", "--served-model-name", "bench")
    command = (
        sys.executable,
        "-m",
        "tests.fake_serve",
        "default",
        "--engine-module",
        "benchmarks.engine.front_end_engine",
    )
    server = launch(*command, *flags, **{ITERATION_S: str(iteration_ms / 1000)})
    try:
        server.wait_ready(READY_TIMEOUT_S)
        yield server.root_url, [server.process.pid, *_front_ends(server.process.pid)]
    finally:
        server.stop()


def _front_ends(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [child for child in children if "front_end\0" in Path(f"/proc/{child}/cmdline").read_text()]


# The clients


async def load(url: str, body: bytes, num_streams: int) -> dict[str, float]:
    """Send a number of requests at once and read each to its end."""
    host, _, rest = url.removeprefix("http://").partition(":")
    port, _, path = rest.partition("/")
    head = f"POST /{path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
    start_s = time.perf_counter()
    counts = await asyncio.gather(*(_stream(host, int(port), request) for _ in range(num_streams)))
    return {"num_chunks": sum(counts), "wall_s": time.perf_counter() - start_s}


async def _stream(host: str, port: int, request: bytes) -> int:
    """Number of events of one stream, without the last, which marks its end."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    num_events, tail = 0, b""
    while data := await reader.read(1 << 16):
        num_events += data.count(b"data: {")
        tail = (tail + data)[-64:]
    writer.close()
    if b"[DONE]" not in tail:
        raise RuntimeError(f"a stream ended early: {tail!r}")
    return num_events


if __name__ == "__main__":
    sys.exit(main())
