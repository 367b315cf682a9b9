"""Attacks on a server beside good clients: the longest gap in their streams, and the longest answer of /health.

`nanoflow serve` runs the embedded model. `--streams` clients stream completions all the time, one after the other, and
another client asks for /health twenty times a second. They are watched for some seconds without an attack, and then
for some seconds with each attack of `attacks.py`.

    python -m benchmarks.robustness.under_attack --json benchmarks/results/evil_beside_good.json
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.document import write_document
from benchmarks.common.server_process import free_port, started
from benchmarks.robustness.attacks import ATTACKS, Address, post
from nanoflow.cli.options import CommandParser

HEALTH_INTERVAL_S = 0.05
QUIET_S = 1.0
START_S = 120.0
# The name in records.
BENCHMARK = "evil_beside_good"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What good clients measured during one attack.

    Attributes:
        use: Name of the attack; "nothing" for none.
        longest_gap_ms: Between two pieces of one good stream.
        longest_health_ms: From a request for /health to its answer.
        num_pieces: Pieces that all good streams received.
        statuses: How often the attacker was answered with each status.
    """

    use: str
    longest_gap_ms: float
    longest_health_ms: float
    num_pieces: int
    statuses: dict[str, int] = field(default_factory=dict)


class Watch:
    """The good clients, and what they measured since the last `take`."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._gap_s = self._health_s = 0.0
        self._num_pieces = 0

    async def stream(self) -> None:
        """Stream completions one after the other, for ever."""
        fields = {"prompt": "def add(first, second):", "max_tokens": 400, "ignore_eos": True, "stream": True}
        request = post("/v1/completions", fields)
        while True:
            reader, writer = await asyncio.open_connection(*self._address)
            writer.write(request)
            last_s = None
            while await reader.read(1 << 16):
                now_s = time.perf_counter()
                if last_s is not None:
                    self._gap_s = max(self._gap_s, now_s - last_s)
                last_s, self._num_pieces = now_s, self._num_pieces + 1
            writer.close()

    async def ask_health(self) -> None:
        """Ask for /health, for ever."""
        reader, writer = await asyncio.open_connection(*self._address)
        while True:
            begin_s = time.perf_counter()
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"}")
            self._health_s = max(self._health_s, time.perf_counter() - begin_s)
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def take(self, use: str, statuses: dict[str, int] | None = None) -> Row:
        """What was measured; starts again from nothing."""
        row = Row(
            use=use,
            longest_gap_ms=self._gap_s * 1e3,
            longest_health_ms=self._health_s * 1e3,
            num_pieces=self._num_pieces,
            statuses=statuses or {},
        )
        self._gap_s, self._health_s, self._num_pieces = 0.0, 0.0, 0
        return row


async def attack(name: str, address: Address, seconds: float, watch: Watch) -> Row:
    """Measure during one attack. The attacker is a separate process; the time in which it prepares does not count."""
    command = (sys.executable, "-m", "benchmarks.robustness.attacks", name, address[0], str(address[1]), str(seconds))
    client = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None
    await client.stdout.readline()
    await asyncio.sleep(QUIET_S / 2)
    watch.take("before")
    client.stdin.write(b"go\n")
    out = await client.stdout.read()
    await client.wait()
    return watch.take(name, json.loads(out))


async def measure(address: Address, uses: list[str], *, num_streams: int, seconds: float) -> list[Row]:
    """A row without an attack, then one for each attack."""
    watch = Watch(address)
    clients = [asyncio.create_task(watch.stream()) for _ in range(num_streams)]
    clients.append(asyncio.create_task(watch.ask_health()))
    await asyncio.sleep(2 * QUIET_S)
    watch.take("before")
    await asyncio.sleep(2 * seconds)
    rows = [watch.take("nothing")]
    show(rows[0])
    for name in uses:
        rows.append(await attack(name, address, seconds, watch))
        show(rows[-1])
        await asyncio.sleep(QUIET_S)
    for client in clients:
        client.cancel()
    ends = await asyncio.gather(*clients, return_exceptions=True)
    broken = [end for end in ends if not isinstance(end, asyncio.CancelledError)]
    if broken:
        raise RuntimeError(f"{len(broken)} good clients were not served: {broken[0]!r}")
    return rows


def show(row: Row) -> None:
    """One line of the table."""
    statuses = " ".join(f"{status}x{count}" for status, count in row.statuses.items())
    print(
        f"{row.use:36}{row.longest_gap_ms:10.0f}{row.longest_health_ms:10.0f}{row.num_pieces:9}  {statuses}", flush=True
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all attacks, or those that are named."""
    parser = CommandParser(prog="python -m benchmarks.robustness.under_attack", description=__doc__)
    parser.add_argument("--uses", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), metavar="NAME")
    parser.add_argument("--streams", type=int, default=50, help="clients that stream (default: 50)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each attack (default: 3)")
    parser.add_argument("--api-servers", type=int, default=1, help="processes that answer (default: 1)")
    parser.add_argument("--log", type=Path, help="of the server")
    parser.add_argument("--json", type=Path, help="write a record here")
    args = parser.parse_args(argv)
    print(f"{'beside':36}{'gap ms':>10}{'health ms':>10}{'pieces':>9}  statuses")
    port = free_port()
    serve = (sys.executable, "-m", "nanoflow", "serve", "default", "--port", str(port))
    with started((*serve, "--api-servers", str(args.api_servers)), port, START_S, args.log):
        rows = asyncio.run(measure(("127.0.0.1", port), args.uses, num_streams=args.streams, seconds=args.seconds))
    if args.json:
        write_document(
            args.json,
            BENCHMARK,
            num_streams=args.streams,
            seconds=args.seconds,
            num_front_ends=args.api_servers,
            load_average=os.getloadavg()[0],
            rows=[dataclasses.asdict(row) for row in rows],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
