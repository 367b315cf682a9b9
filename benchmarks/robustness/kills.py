"""Kills processes of a server under load, repeatedly, and checks what becomes of its requests and what is left.

The victims are in turn the engine, a further front end, the main process, and all processes at once. They get SIGKILL
at random moments: under load, while the server or its engine starts, and while the server drains. After each kill it
checks that every request ends with its result or an error; that only connections to the killed process break; that
nothing hangs; that a server which goes on answers again and has no more open files; and that a server which has ended
leaves no process, no file in the folder for temporary files and nothing in shared memory.

    python -m benchmarks.robustness.kills --kills 200 --json benchmarks/results/kills.json
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.document import write_document
from benchmarks.common.server_process import free_port
from benchmarks.robustness.kills_load import Load, Outcome, is_healthy
from nanoflow.cli.options import CommandParser

TARGETS = ("engine", "front end", "whole")
MOMENTS = {"load": 0.7, "start": 0.15, "drain": 0.15}
START_BOUND_S, RECOVER_BOUND_S, END_BOUND_S = 240.0, 240.0, 90.0
_ARGUMENTS = ("--api-servers", "2", "--restart-engine", "1000", "--shutdown-timeout", "5", "--served-model-name", "m")


@dataclass(slots=True, kw_only=True)
class Kill:
    """One kill and its consequences.

    Attributes:
        target, moment: What was killed, and when.
        ended_with: Exit status of the server; None if it went on.
        recovered_s: Seconds until it answered again, if it went on.
        outcomes: Number of the affected requests by how they ended.
        problems: Faults; empty if all is well.
    """

    target: str
    moment: str
    ended_with: int | None = None
    recovered_s: float | None = None
    outcomes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Life:
    """A server from its start to its end, with a folder for temporary files of its own, and the load on it."""

    def __init__(self, folder: Path, model: str) -> None:
        self.port = free_port()
        self.folder = folder
        self.members: set[int] = set()
        self.log = (folder.parent / f"{folder.name}.log").open("w+b")
        command = (sys.executable, "-m", "nanoflow", "serve", model, "--port", str(self.port), *_ARGUMENTS)
        environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        self.shared_before = _shared_memory()
        self.fds_before: dict[str, int] = {}
        self.load = Load(f"http://127.0.0.1:{self.port}")

    async def ready(self, bound_s: float, killed: int | None = None) -> bool:
        """Wait until the server answers without the killed process; False if it does not."""

        def is_over() -> bool:
            is_replaced = killed is None or not _is_running(killed)
            return self.process.poll() is not None or (is_replaced and self.is_whole() and is_healthy(self.load.url))

        return await _until(is_over, bound_s) and self.process.poll() is None

    def is_whole(self) -> bool:
        """Whether there is a process of each kind."""
        return bool(self.pids("engine")) and bool(self.pids("front end"))

    def pids(self, target: str) -> list[int]:
        """Living processes of a kind."""
        family = descendants(self.process.pid)
        self.members |= {*family, self.process.pid}
        words = {"engine": "nanoflow.engine.process", "front end": "nanoflow.server.front_end"}
        if target in words:
            return [pid for pid in family if words[target] in _command(pid)]
        return [self.process.pid] if target == "main" else [self.process.pid, *family]

    def left(self) -> list[str]:
        """What a server that has ended has left behind."""
        alive = [pid for pid in self.members if _is_running(pid)]
        files = [path.name for path in self.folder.iterdir()]
        shared = sorted(_shared_memory() - self.shared_before)
        found = {"processes": alive, "files": files, "shared memory": shared}
        return [f"{kind} left: {what}" for kind, what in found.items() if what]

    def fds(self) -> int:
        """Number of open files of the main process."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def tail(self) -> str:
        """The end of its output."""
        self.log.seek(0)
        return self.log.read()[-2000:].decode(errors="replace")


async def run(num_kills: int, model: str, folder: Path, deadline_s: float) -> list[Kill]:
    """Kill a number of times, or until a time; the server is started again where it has ended."""
    kills: list[Kill] = []
    life: Life | None = None
    start_s = 10.0
    while len(kills) < num_kills and time.monotonic() < deadline_s:
        target = TARGETS[len(kills) % len(TARGETS)]
        kill = Kill(target=target, moment=random.choices(list(MOMENTS), list(MOMENTS.values()))[0])
        if life is None:
            home = folder / f"life-{len(kills)}"
            home.mkdir()
            life, begin_s = Life(home, model), time.monotonic()
            if kill.moment == "start":
                await asyncio.sleep(random.uniform(0.0, start_s))
                life.pids("all")
            elif await life.ready(START_BOUND_S):
                start_s = time.monotonic() - begin_s
                life.fds_before["main"] = await _settled(life.fds)
                life.load.start()
                await asyncio.sleep(1.0)
            else:
                kill.problems.append(f"the server did not start: {life.tail()}")
        elif kill.moment == "start":  # of another engine: the first is killed for it
            _kill(life.pids("engine"))
            await asyncio.sleep(random.uniform(0.0, start_s))
        await _strike(life, kill)
        kills.append(kill)
        _show(len(kills), kill)
        if life.process.poll() is not None or kill.problems:
            life.process.kill()
            life.process.wait()
            life.log.close()
            life = None
    if life is not None:
        await life.load.stop()
        life.process.terminate()
        life.process.wait(END_BOUND_S)
    return kills


async def _strike(life: Life, kill: Kill) -> None:
    """Kill, wait for the consequences and judge them."""
    begin_s = time.monotonic()
    must_end = kill.target == "whole" or kill.moment == "drain"
    if kill.moment == "drain":
        life.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(random.uniform(0.0, 2.0))
    else:
        await asyncio.sleep(random.uniform(0.0, 1.0))
    victims = life.pids(random.choice(("main", "all")) if kill.target == "whole" else kill.target)
    kill_s = time.monotonic()
    _kill(victims[:1] if kill.target == "front end" else victims)
    if must_end:
        if not await _until(lambda: life.process.poll() is not None, END_BOUND_S):
            kill.problems.append("the server did not end")
    elif await life.ready(RECOVER_BOUND_S, victims[0] if victims else None):
        kill.recovered_s = round(time.monotonic() - kill_s, 2)
    elif life.process.poll() is None:
        kill.problems.append("the server did not answer again")
    kill.ended_with = life.process.poll()
    # While a server starts for the first time, whatever ends one of its processes ends all.
    if kill.ended_with is not None and not must_end and life.load.is_running:
        kill.problems.append(f"the server ended: {life.tail()}")
    if kill.ended_with is not None:
        await life.load.stop()
        await _until(lambda: not life.left(), END_BOUND_S)
        kill.problems += life.left()
    elif not life.load.is_running:  # it was hit while it started, and went on
        life.load.start()
    elif life.fds_before and kill.target == "front end":
        await life.load.pause()
        if await _settled(life.fds, at_most=life.fds_before["main"]) > life.fds_before["main"]:
            kill.problems.append(f"open files: {life.fds()} after {life.fds_before['main']}")
        life.load.start()
    else:
        await asyncio.sleep(1.0)
    ended = life.load.take()
    kill.outcomes = dict(Counter(one.kind for one in ended))
    kill.problems += _wrong(ended, kill, begin_s)


def _wrong(ended: Iterable[Outcome], kill: Kill, begin_s: float) -> list[str]:
    """Requests that ended in a way they must not."""
    may_break = kill.target != "engine" or kill.moment == "drain"
    allowed = {"answered", "told"} | ({"broken off"} if may_break else set())
    # A server that has ended refuses; so does one that is about to.
    allowed |= {"refused", "broken off"} if kill.ended_with is not None else set()
    return [
        f"a request {one.kind} {one.end_s - begin_s:.1f} s after the start of the kill: {one.detail}"
        for one in ended
        if one.kind not in allowed
    ]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _show(number: int, kill: Kill) -> None:
    end = f"ended with {kill.ended_with}" if kill.recovered_s is None else f"answers after {kill.recovered_s:5.1f} s"
    requests = ", ".join(f"{count} {name}" for name, count in sorted(kill.outcomes.items()))
    print(f"{number:4} {kill.target:10} in {kill.moment:6} {end:22} {requests}", flush=True)
    for problem in kill.problems:
        print(f"     WRONG: {problem}", flush=True)


async def _until(is_true: Callable[[], bool], bound_s: float) -> bool:
    deadline_s = time.monotonic() + bound_s
    while not await asyncio.to_thread(is_true):
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(0.1)
    return True


async def _settled(count: Callable[[], int], *, at_most: int | None = None) -> int:
    """The count once it is stable for a second, or at most a given bound; after ten seconds in any case."""
    last, since_s, begin_s = count(), time.monotonic(), time.monotonic()
    while time.monotonic() - begin_s < 10.0 and (at_most is None or last > at_most):
        await asyncio.sleep(0.2)
        if (now := count()) != last:
            last, since_s = now, time.monotonic()
        if at_most is None and time.monotonic() - since_s > 1.0:
            break
    return last


def descendants(pid: int) -> list[int]:
    """Process ids of all descendants of a process."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, print and write."""
    parser = CommandParser(prog="python -m benchmarks.robustness.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of kills (200)")
    parser.add_argument("--seconds", type=float, default=7200.0, help="start no further kill after this time (7200)")
    parser.add_argument("--model", default="default", help="model folder or name (the embedded model)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and victims (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the kills here")
    arguments = parser.parse_args(argv)
    random.seed(arguments.seed)
    begin_s = time.monotonic()
    with TemporaryDirectory() as folder:
        kills = asyncio.run(run(arguments.kills, arguments.model, Path(folder), begin_s + arguments.seconds))
    outcomes = sum((Counter(kill.outcomes) for kill in kills), Counter[str]())
    num_wrong = sum(bool(kill.problems) for kill in kills)
    print(f"{len(kills)} kills in {time.monotonic() - begin_s:.0f} s, {num_wrong} with problems; {dict(outcomes)}")
    if arguments.json:
        write_document(
            arguments.json,
            "kills",
            options={name: value for name, value in vars(arguments).items() if name != "json"},
            wall_s=round(time.monotonic() - begin_s, 1),
            num_kills=len(kills),
            num_with_problems=num_wrong,
            requests=dict(outcomes),
            kills=[asdict(kill) for kill in kills],
        )
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
