"""Soak test of a whole server: mixed load over HTTP for minutes; memory, files and threads of every process recorded.

The requests vary all the time: short and long prompts, streams and whole answers, several completions, stop strings,
log probabilities, penalties, conversations, token ids, invalid requests, and clients that disconnect. After the
warm-up the memory of each process may grow by at most `--most-growth`. At the end nothing may be left: no running
request, page, file or thread. It does not check what the engine computes; `tests/soak.py` does.

  python -m benchmarks.robustness.soak --minutes 20 --json benchmarks/results/soak.json --check
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.document import write_document
from benchmarks.common.server_process import free_port, started
from nanoflow.bench.client import Address, ExchangeFailed, exchange, post, read_address, read_answer
from nanoflow.bench.processes import ProcessState, processes_of
from nanoflow.cli.options import CommandParser

_MIB = 2**20
_TIMEOUT_S = 300.0
# Time for the server to end requests whose clients have disconnected, and to finish its periodic work.
_REST_S = 5.0
_WORDS = (
    "def",
    "class",
    "return",
    "import",
    "for",
    "in",
    "if",
    "else",
    "print",
    "list",
    "range",
    "self",
    "data",
    "item",
)
_WRONG: tuple[bytes, ...] = (
    b"{",
    b'{"model": "m", "prompt": 3.5}',
    b'{"model": "m", "prompt": "x", "max_tokens": -1}',
    b'{"model": "m", "prompt": "x", "n": 1e9}',
    b'{"model": "m", "prompt": "\\ud800"}',
    b'{"model": "m", "prompt": ["x", 5]}',
    b'{"model": "m", "messages": []}',
)


@dataclass(slots=True, kw_only=True)
class Course:
    """What has happened so far.

    Attributes:
        num_of: Number of requests by kind and end, such as "stream 200".
        samples: Seconds since the start, and the state of every process then.
    """

    num_of: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, list[ProcessState]]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Start a server, load it and report. Exit status 1 if --check is given and something grew or was left."""
    args = parse_args(argv)
    port = free_port()
    command = [sys.executable, "-m", "nanoflow", "serve", args.model, "--port", str(port), "--served-model-name", "m"]
    with started([*command, "--trust-request-chat-template", *args.options], port, 300.0, args.log) as server:
        assert server.pid is not None
        course = asyncio.run(_soak(server.url, server.pid, args))
        problems = _left_behind(server.url, server.pid, course, args)
    growth = growth_of(course, args.warm_up_minutes * 60)
    for role, part in growth.items():
        numbers = f"{part['begin_mib']:.0f} -> {part['end_mib']:.0f} MiB ({part['growth']:+.1%})"
        print(f"{role}: {numbers}, at most {part['peak_mib']:.0f} MiB")
        if part["growth"] > args.most_growth:
            problems.append(f"{role} grew by {part['growth']:.1%}")
    print(dict(sorted(course.num_of.items())))
    for problem in problems:
        print(f"problem: {problem}")
    if args.json is not None:
        _write(args, course, growth, problems)
    return 1 if args.check and problems else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.robustness.soak", description=__doc__)
    parser.add_argument("--model", default="default", help="model to serve (default: the embedded model)")
    parser.add_argument("--minutes", type=float, default=20.0, help="length of the load (default: 20)")
    parser.add_argument("--warm-up-minutes", type=float, default=3.0, help="memory counts from then on (default: 3)")
    parser.add_argument("--clients", type=int, default=12, help="clients that send at the same time (default: 12)")
    parser.add_argument("--interval-s", type=float, default=10.0, help="seconds between samples (default: 10)")
    parser.add_argument("--most-growth", type=float, default=0.1, help="part by which memory may grow (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the load (default: 0)")
    parser.add_argument("--log", type=Path, help="file for the server's output")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    parser.add_argument("--check", action="store_true", help="exit with 1 if memory grew or something was left")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="further options of nanoflow serve; after all others"
    )
    args = parser.parse_args(argv)
    if not 0 < args.warm_up_minutes < args.minutes or args.clients < 1:
        parser.error("--warm-up-minutes must be less than --minutes, both above 0, and --clients at least 1")
    return args


async def _soak(url: str, pid: int, args: argparse.Namespace) -> Course:
    """Load the server for the given time, with a sample of all processes before, at every interval, and at rest."""
    course, address = Course(), read_address(url.removesuffix("/v1"))
    start_s = time.monotonic()
    await _request(
        address, random.Random(0), "whole", course
    )  # Whatever is made at the first request exists from here on.
    course.samples.append((0.0, processes_of([pid])))
    clients = [
        asyncio.create_task(_client(address, args.seed * 1000 + number, start_s + args.minutes * 60, course))
        for number in range(args.clients)
    ]
    while not all(client.done() for client in clients):
        await asyncio.wait(clients, timeout=args.interval_s)
        course.samples.append((time.monotonic() - start_s, processes_of([pid])))
        _print_sample(*course.samples[-1])
    await asyncio.gather(*clients)
    await asyncio.sleep(_REST_S)
    return course


async def _client(address: Address, seed: int, until_s: float, course: Course) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until_s:
        await _request(address, rng, rng.choice(tuple(_KINDS)), course)


async def _request(address: Address, rng: random.Random, kind: str, course: Course) -> None:
    """Send one request of a kind; a client that disconnects does so before the answer is complete."""
    path, body = _KINDS[kind](rng)
    message = post(address, path.removeprefix("/"), body, {})
    if kind == "cancel":
        with suppress(TimeoutError, ExchangeFailed, OSError):
            await asyncio.wait_for(exchange(address, message, _TIMEOUT_S), rng.uniform(0.0, 0.5))
        course.num_of["cancel"] += 1
        return
    try:
        status = str(read_answer(await exchange(address, message, _TIMEOUT_S)).status)
    except (ExchangeFailed, OSError) as error:
        status = type(error).__name__
    course.num_of[f"{kind} {status}"] += 1


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


def _completion(rng: random.Random, **fields: Any) -> tuple[str, bytes]:
    """A completion, mostly of a short prompt, sometimes of the longest that is allowed."""
    num_words = rng.choice((1, 4, 16, 64, rng.randint(1, 200)))
    body = {
        "model": "m",
        "prompt": _text(rng, num_words),
        "max_tokens": rng.choice((1, 8, 32, rng.randint(1, 128))),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "seed": rng.getrandbits(31),
        **fields,
    }
    return "/v1/completions", json.dumps(body).encode()


def _batch(rng: random.Random) -> tuple[str, bytes]:
    prompts = [_text(rng, rng.randint(1, 40)) for _ in range(rng.randint(2, 8))]
    return _completion(rng, prompt=prompts, n=rng.randint(1, 3), max_tokens=rng.randint(1, 24))


def _sampling(rng: random.Random) -> tuple[str, bytes]:
    fields = {"top_p": rng.uniform(0.5, 1.0), "top_k": rng.randint(1, 50), "presence_penalty": rng.uniform(-1, 1)}
    return _completion(rng, **fields, logit_bias={str(rng.randrange(100)): rng.uniform(-5, 5)}, temperature=1.0)


def _shaped(rng: random.Random) -> tuple[str, bytes]:
    """A completion with a shape that is new now and then."""
    number = rng.randrange(200)
    schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"}}, "additionalProperties": False}
    shapes = ({"guided_json": schema}, {"guided_choice": ["a", f"b{number}"]}, {"guided_regex": f"[a-z]{{{number}}}"})
    return _completion(rng, **rng.choice(shapes))


def _conversation(rng: random.Random) -> tuple[str, bytes]:
    turns = [
        {"role": ("user", "assistant")[place % 2], "content": _text(rng, rng.randint(1, 30))} for place in range(3)
    ]
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    body = {"model": "m", "messages": turns, "max_tokens": rng.randint(1, 48), "stream": rng.random() < 0.5}
    return "/v1/chat/completions", json.dumps({**body, "chat_template": template}).encode()


def _tokens(rng: random.Random) -> tuple[str, bytes]:
    return "/tokenize", json.dumps({"model": "m", "prompt": _text(rng, rng.randint(1, 4000))}).encode()


_KINDS: Mapping[str, Any] = {
    "whole": _completion,
    "stream": lambda rng: _completion(rng, stream=True),
    "cancel": lambda rng: _completion(rng, stream=rng.random() < 0.7, max_tokens=128),
    "batch": _batch,
    "stops": lambda rng: _completion(rng, stop=[_text(rng, 1) for _ in range(rng.randint(1, 4))], stream=True),
    "logprobs": lambda rng: _completion(rng, logprobs=rng.randint(0, 5), echo=rng.random() < 0.5),
    "sampling": _sampling,
    "shape": _shaped,
    "chat": _conversation,
    "tokenize": _tokens,
    "wrong": lambda rng: (rng.choice(("/v1/completions", "/v1/chat/completions", "/v1/nowhere")), rng.choice(_WRONG)),
}


def growth_of(course: Course, warm_up_s: float) -> dict[str, dict[str, float]]:
    """Growth of memory by role of process, from the end of the warm-up to the end of the run.

    Both are medians of three samples. For a role with several processes, such as those for chat templates, which are
    started as needed, each sample is the mean over the processes.
    """
    found: dict[str, dict[str, float]] = {}
    for role in sorted({state.role for _, states in course.samples for state in states}):
        held = [
            (time_s, statistics.fmean(state.rss_bytes for state in states if state.role == role) / _MIB)
            for time_s, states in course.samples
            if any(state.role == role for state in states)
        ]
        counted = [mib for time_s, mib in held if time_s >= warm_up_s] or [held[-1][1]]
        begin, end = statistics.median(counted[:3]), statistics.median(counted[-3:])
        growth = end / begin - 1 if begin else 0.0
        found[role] = {"begin_mib": begin, "end_mib": end, "peak_mib": max(mib for _, mib in held), "growth": growth}
    return found


def _left_behind(url: str, pid: int, course: Course, args: argparse.Namespace) -> list[str]:
    """Lines about what the server holds after the load and did not before, and about answers that must not occur."""
    problems = []
    metrics = get(url.removesuffix("/v1") + "/metrics")
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        is_gauge = any(part in name for part in ("num_requests_running", "num_requests_waiting", "cache_usage_perc"))
        if is_gauge and not line.startswith("#") and float(value) != 0:
            problems.append(f"{name} is {value}")
    first, last = course.samples[0][1], processes_of([pid])
    for role in sorted({state.role for state in last} - {"template", "grammar"}):
        for what, slack in (("num_files", 12), ("num_threads", 40)):
            before, after = (sum(getattr(s, what) for s in states if s.role == role) for states in (first, last))
            # Pools of threads and of template processes, with their pipes, are filled when needed and stay.
            if after > before + slack:
                problems.append(f"{role}: {what} {before} -> {after}")
    for kind, count in course.num_of.items():
        word, _, status = kind.partition(" ")
        if status and (not status.isdecimal() or int(status) >= 500 or (status != "200" and word != "wrong")):
            problems.append(f"{count} x {kind}")
    return problems


def get(url: str) -> str:
    """Text at a URL of this machine."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
        return str(answer.read().decode())


def _print_sample(time_s: float, states: Sequence[ProcessState]) -> None:
    parts = (f"{s.role} {s.rss_bytes / _MIB:.0f} MiB {s.num_files} files {s.num_threads} threads" for s in states)
    print(f"{time_s:6.0f} s  " + "; ".join(parts), flush=True)


def _write(
    args: argparse.Namespace, course: Course, growth: Mapping[str, Mapping[str, float]], problems: Sequence[str]
) -> None:
    worst = max(growth.values(), key=lambda part: part["growth"])
    write_document(
        args.json,
        "soak",
        options={name: value for name, value in vars(args).items() if name not in ("json", "check", "log")},
        num_requests=sum(course.num_of.values()),
        num_of=dict(sorted(course.num_of.items())),
        growth=growth,
        worst_growth=worst["growth"],
        problems=problems,
        samples=[
            {"time_s": round(time_s, 1), "processes": [asdict(s) for s in states]} for time_s, states in course.samples
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
