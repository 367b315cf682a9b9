"""Send hostile inputs to a server and to the loaders of files; report faults, and how to reproduce each.

  python -m benchmarks.robustness.fuzz                     100,000 inputs: seven of eight over HTTP, the rest as files
  python -m benchmarks.robustness.fuzz --seed 7 --num 5000
  python -m benchmarks.robustness.fuzz --seed 7 --only 4711,4712      only these inputs

It fails if an answer is a 5xx other than 503 or there is none, if a refusal is not in OpenAI's form, if a loader raises
an error that it does not document, if the server ends, or if a page, a file or a thread is left at the end. /health is
polled twenty times a second; `--most-health-ms` bounds its latency. `tests/fuzz/` makes the inputs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.fuzz.clients import Findings, send_all
from tests.fuzz.messages import hostile

from benchmarks.common.document import write_document
from benchmarks.common.server_process import free_port, started
from nanoflow.bench.processes import ProcessState, processes_of
from nanoflow.cli.options import CommandParser

# One in this many inputs is a file.
FILES_EVERY = 8
_MAX_SHOWN = 40
_REST_S = 20.0  # for requests whose clients have left, on a machine that is busy with other things
# Pools of threads, with a few files, are filled at first use and stay.
_SLACK = {"num_files": 8, "num_threads": 40}
_GAUGE = re.compile(r"^\w+:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^}]*\})? (\S+)$", re.M)


def main(argv: Sequence[str] | None = None) -> int:
    """Send all inputs, judge the answers and report. Exit status 1 if anything was wrong."""
    args = parse_args(argv)
    numbers = args.only or range(args.num)
    findings, found = Findings(), dict[str, Any]()
    begin_s = time.monotonic()
    over_http = [number for number in numbers if number % FILES_EVERY]
    as_files = [number for number in numbers if not number % FILES_EVERY]
    if over_http:
        found |= _fuzz_server(over_http, findings, args)
    if as_files:
        _fuzz_files(as_files, findings, args.seed)
    found |= {"num_inputs": len(numbers), "duration_s": round(time.monotonic() - begin_s, 1)}
    found["num_of"] = dict(sorted(findings.num_of.items()))
    _report(findings, found, args)
    return 1 if findings.findings else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.robustness.fuzz", description=__doc__)
    parser.add_argument("--num", type=int, default=100_000, help="number of inputs (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: 0)")
    parser.add_argument(
        "--only", type=_numbers, metavar="N,N", help="these inputs of the seed, instead of the first --num"
    )
    parser.add_argument("--clients", type=int, default=24, help="clients that send at the same time (default: 24)")
    parser.add_argument("--model", default="default", help="model to serve (default: the embedded model)")
    parser.add_argument(
        "--most-health-ms", type=float, help="longest time that /health may take; if not given it is only reported"
    )
    parser.add_argument("--log", type=Path, help="file for the server's output")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args = parser.parse_args(argv)
    if args.num < 1 or args.clients < 1:
        parser.error("--num and --clients must be at least 1")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _fuzz_server(numbers: Sequence[int], findings: Findings, args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, send the inputs, and check what is left."""
    port = free_port()
    command = [sys.executable, "-m", "nanoflow", "serve", args.model, "--port", str(port), "--served-model-name", "m"]
    with started([*command, "--trust-request-chat-template"], port, 300.0, args.log) as server:
        assert server.pid is not None
        expected = _greedy(port)
        # Some inputs first, so that what is made at first use is not counted as left.
        asyncio.run(send_all(port, lambda number: hostile(args.seed, number), numbers[:50], args.clients, Findings()))
        time.sleep(1.0)
        before = processes_of([server.pid])
        with _polled(port) as poll:
            asyncio.run(send_all(port, lambda number: hostile(args.seed, number), numbers, args.clients, findings))
        health = poll()
        _rest(port)
        try:
            if _greedy(port) != expected:
                findings.add(-1, "the same request has another answer afterwards")
            _look_for_rest(port, before, processes_of([server.pid]), findings)
        except (OSError, ValueError) as error:
            findings.add(-1, f"the server does not answer any more: {error}")
    if args.most_health_ms is not None and health["max_ms"] > args.most_health_ms:
        findings.add(-1, f"/health took {health['max_ms']} ms")
    if health["num_failed"]:
        findings.add(-1, f"/health failed {health['num_failed']} times")
    return {"health": health}


@contextmanager
def _polled(port: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Poll /health within this context; afterwards the yielded function gives what was measured."""
    command = [sys.executable, "-m", "tests.fuzz.health", str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as poller:
        said: list[str] = []
        try:
            yield lambda: dict(json.loads(said[0]))
        finally:
            with suppress(ValueError):
                said.append(poller.communicate(timeout=60)[0])


def _rest(port: int) -> None:
    """Wait until no request runs, for a limited time."""
    deadline_s = time.monotonic() + _REST_S
    while time.monotonic() < deadline_s:
        time.sleep(0.5)
        with suppress(OSError):
            if not any(float(value) for _, value in _GAUGE.findall(_get(port, "/metrics"))):
                return


def _look_for_rest(
    port: int, before: Sequence[ProcessState], after: Sequence[ProcessState], findings: Findings
) -> None:
    """Record what the server holds now and did not hold before."""
    for name, value in _GAUGE.findall(_get(port, "/metrics")):
        if float(value):
            findings.add(-1, f"{name} is {value} at rest")
    for role in sorted({state.role for state in before} - {"template", "grammar"}):
        for what, slack in _SLACK.items():
            first, last = (sum(getattr(s, what) for s in states if s.role == role) for states in (before, after))
            if last > first + slack:
                findings.add(-1, f"{role}: {what} {first} -> {last}")


def _greedy(port: int) -> str:
    body = json.dumps({"prompt": "def ", "max_tokens": 16, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def _get(port: int, path: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1:{port}{path}", timeout=30
    ) as answer:
        return str(answer.read().decode())


def _fuzz_files(numbers: Sequence[int], findings: Findings, seed: int) -> None:
    """Load files in a child process, which is started again after an input that ends it."""
    left = list(numbers)
    while left:
        command = [sys.executable, "-m", "tests.fuzz.files", "--seed", str(seed)]
        text = "\n".join(map(str, left))
        child = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            findings.num_of[f"file {line['kind']} {line['end']}"] += 1
            if line["problem"] is not None:
                findings.add(line["number"], line["problem"])
        if len(lines) < len(left):
            findings.add(left[len(lines)], f"the loader ended its process with status {child.returncode}")
        left = left[len(lines) + 1 :]


def _report(findings: Findings, found: dict[str, Any], args: argparse.Namespace) -> None:
    for finding in findings.findings[:_MAX_SHOWN]:
        print(f"finding: {finding.what}")
        if finding.number >= 0:
            print(f"  python -m benchmarks.robustness.fuzz --seed {args.seed} --only {finding.number}")
    if len(findings.findings) > _MAX_SHOWN:
        print(f"... and {len(findings.findings) - _MAX_SHOWN} more")
    print(json.dumps(found, indent=1))
    print(f"{found['num_inputs']:,} inputs, {len(findings.findings)} findings, {found['duration_s']:.0f} s")
    if args.json is not None:
        options = {"seed": args.seed, "clients": args.clients, "model": args.model}
        shown = [{"number": each.number, "what": each.what} for each in findings.findings]
        write_document(args.json, "fuzz", options=options, findings=shown, **found)


if __name__ == "__main__":
    sys.exit(main())
