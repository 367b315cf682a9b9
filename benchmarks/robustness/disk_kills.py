"""Kills a process that uses a store of KV pages on disk, repeatedly, and checks what the next process finds there.

The victim writes pages, reads them, forgets some and now and then all, and says what it has been told: that a page is
stored, that one is forgotten. It gets SIGKILL at a random moment, while it opens the store too. After each kill the
store must open; pages that were said to be stored must be there, unless the store is so tight that they had to go;
pages that were said to be forgotten must not be; and every page that is read must be the right one.

    python -m benchmarks.robustness.disk_kills --kills 500 --json benchmarks/results/disk_kills.json
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nanoflow.cli.options import CommandParser
from nanoflow.kvcache.disk import DiskTier
from nanoflow.kvcache.segments import Bytes

PAGE_BYTES = (5000, 40_960)
CAPACITY_BYTES = {"roomy": 4 << 30, "tight": 4 << 20}
LIVES_A_STORE = 10
_MAX_READ, _MAX_WAITING = 300, 40
_PIPE_BYTES = 1 << 20
_WAIT_S = 60.0


@dataclass(slots=True, kw_only=True)
class Kill:
    """One kill and what was found after it.

    Attributes:
        room: Whether pages had to go for others: "tight", or not: "roomy".
        after_s: When it came.
        num_stored, num_forgotten: Pages that the victim was told of.
        num_found, open_s: Pages of all lives that were there afterwards, and the time that finding them took.
        problems: Faults; empty if all is well.
    """

    room: str
    after_s: float
    num_stored: int = 0
    num_forgotten: int = 0
    num_found: int = 0
    open_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def key_of(page: str) -> bytes:
    """The key of a page; its name begins with its KV group."""
    return hashlib.sha256(page.encode()).digest()


def page_of(page: str) -> Bytes:
    """What is in it, uint8 [page_bytes of its group]."""
    size = PAGE_BYTES[int(page[0])]
    return np.resize(np.frombuffer(hashlib.sha256(key_of(page)).digest(), dtype=np.uint8), size)


def open_store(folder: Path, room: str) -> DiskTier:
    """The store that victims use."""
    return DiskTier.open(
        folder, capacity_bytes=CAPACITY_BYTES[room], fingerprint="kills", page_bytes=PAGE_BYTES, queue_bytes=1 << 20
    )


class Victim:
    """Uses a store until it is killed, and says in a pipe what it has been told.

    A line is a letter and the name of a page: `W` it is stored, `f` it is about to be forgotten, `F` it is forgotten;
    `a` and `A` the same of all pages of earlier lives, and so many of this one; `X` something is wrong.
    """

    def __init__(self, folder: Path, room: str, life: int, pipe: int) -> None:
        self._folder, self._room, self._life, self._pipe = folder, room, life, pipe
        self._random = random.Random(life)
        self._pages: list[str] = []
        self._waiting: deque[Future[bool]] = deque()

    def run(self) -> None:
        """Until it is killed."""
        tier = open_store(self._folder, self._room)
        while True:
            page = f"{self._random.randrange(2)}-{self._life}-{len(self._pages)}"
            self._pages.append(page)
            future = tier.write(int(page[0]), key_of(page), page_of(page))
            future.add_done_callback(partial(self._tell_stored, page))
            self._waiting.append(future)
            if len(self._waiting) > _MAX_WAITING:
                self._waiting.popleft().result()
            chance = self._random.random()
            if chance < 0.1:
                self._read(tier, self._random.choice(self._pages))
            elif chance < 0.12:
                page = self._random.choice(self._pages)
                self._tell("f", page)
                tier.forget([key_of(page)])
                self._tell("F", page)
            elif chance < 0.121:
                self._tell("a", str(len(self._pages)))
                tier.forget_all()
                self._tell("A", str(len(self._pages)))

    def _read(self, tier: DiskTier, page: str) -> None:
        into = np.empty(PAGE_BYTES[int(page[0])], dtype=np.uint8)
        if tier.read(int(page[0]), key_of(page), into).result() and not np.array_equal(into, page_of(page)):
            self._tell("X", f"read a wrong page for {page}")

    def _tell_stored(self, page: str, future: Future[bool]) -> None:
        if future.result():
            self._tell("W", page)

    def _tell(self, letter: str, page: str) -> None:
        os.write(self._pipe, f"{letter} {page}\n".encode())


@dataclass(slots=True)
class Told:
    """What victims of a store have been told."""

    stored: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)

    def hear(self, lines: Sequence[str], kill: Kill) -> None:
        """Take in what a victim has said."""
        # Threads say that pages are stored, so that may come after it was said that they are forgotten.
        stored = [line[2:] for line in lines if line[0] == "W"]
        for letter, page in [(line[0], line[2:]) for line in lines if line[0] != "W"]:
            match letter:
                case "f":
                    self.unknown.add(page)
                case "F":
                    self.forgotten.add(page)
                case "a" | "A":
                    before = self.stored | {each for each in stored if int(each.split("-")[2]) < int(page)}
                    self.unknown |= before
                    self.forgotten |= before if letter == "A" else set()
                case _:
                    kill.problems.append(page)
        self.stored = (self.stored | set(stored)) - self.unknown
        kill.num_stored, kill.num_forgotten = len(stored), sum(line[0] == "F" for line in lines)


def run(num_kills: int, folder: Path, max_life_s: float, deadline_s: float) -> list[Kill]:
    """Kill a number of times, or until a time."""
    kills: list[Kill] = []
    told: dict[str, Told] = {}
    while len(kills) < num_kills and time.monotonic() < deadline_s:
        life = len(kills)
        room = ("roomy", "tight")[life % 2]
        home = folder / f"{room}-{life // (2 * LIVES_A_STORE)}"
        if not home.exists():
            told[room] = Told()
        kill = Kill(room=room, after_s=round(random.uniform(0.0, max_life_s), 4))
        told[room].hear(_life(home, life, kill), kill)
        _check(home, told[room], kill)
        kills.append(kill)
        _show(len(kills), kill)
    return kills


def _life(home: Path, life: int, kill: Kill) -> list[str]:
    """One victim from its start to its end: the lines that it has said."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    victim = os.fork()
    if not victim:
        try:
            Victim(home, kill.room, life, writing).run()
        except BaseException as error:
            os.write(writing, f"X the victim ended: {error!r}\n".encode())
        os._exit(1)
    os.close(writing)
    time.sleep(kill.after_s)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    with os.fdopen(reading) as pipe:
        return [line.rstrip("\n") for line in pipe if line.endswith("\n")]


def _check(home: Path, told: Told, kill: Kill) -> None:
    """Open the store and compare it with what was said."""
    begin_s = time.perf_counter()
    tier = open_store(home, kill.room)
    kill.open_s = round(time.perf_counter() - begin_s, 4)
    kill.num_found = tier.counts.num_pages
    lost = {page for page in told.stored if not tier.contains(int(page[0]), key_of(page))}
    if kill.room == "roomy" and lost:
        kill.problems.append(f"{len(lost)} pages that were stored are lost: {sorted(lost)[:3]}")
    risen = {page for page in told.forgotten if tier.contains(int(page[0]), key_of(page))}
    if risen:
        kill.problems.append(f"{len(risen)} pages that were forgotten are there: {sorted(risen)[:3]}")
    told.stored -= lost
    sample = random.sample(sorted(told.stored), min(_MAX_READ, len(told.stored)))
    pages = [np.empty(PAGE_BYTES[int(page[0])], dtype=np.uint8) for page in sample]
    reads = [tier.read(int(page[0]), key_of(page), into) for page, into in zip(sample, pages, strict=True)]
    for page, into, read in zip(sample, pages, reads, strict=True):
        if not read.result(_WAIT_S):
            kill.problems.append(f"{page} cannot be read")
        elif not np.array_equal(into, page_of(page)):
            kill.problems.append(f"{page} is wrong")
    try:
        tier.check_integrity()
    except RuntimeError as error:
        kill.problems.append(str(error))
    if tier.counts.num_damaged:
        kill.problems.append(f"{tier.counts.num_damaged} pages or segments are damaged")
    tier.close()


def _show(number: int, kill: Kill) -> None:
    found = f"{kill.num_stored:5} stored, {kill.num_forgotten:3} forgotten, {kill.num_found:6} found"
    print(
        f"{number:4} {kill.room} after {1e3 * kill.after_s:4.0f} ms: {found} in {1e3 * kill.open_s:.0f} ms", flush=True
    )
    for problem in kill.problems:
        print(f"     WRONG: {problem}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, print and write."""
    parser = CommandParser(prog="python -m benchmarks.robustness.disk_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="number of kills (500)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no further victim after this time (3600)")
    parser.add_argument("--max-life-s", type=float, default=0.3, help="a victim lives at most this long (0.3)")
    parser.add_argument("--folder", type=Path, help="where stores are made (a folder for temporary files)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the kills here")
    arguments = parser.parse_args(argv)
    random.seed(arguments.seed)
    begin_s = time.monotonic()
    with TemporaryDirectory(dir=arguments.folder) as folder:
        kills = run(arguments.kills, Path(folder), arguments.max_life_s, begin_s + arguments.seconds)
    totals = Counter[str]()
    for kill in kills:
        totals.update({"stored": kill.num_stored, "forgotten": kill.num_forgotten})
    num_wrong = sum(bool(kill.problems) for kill in kills)
    print(f"{len(kills)} kills in {time.monotonic() - begin_s:.0f} s, {num_wrong} with problems; {dict(totals)}")
    if arguments.json:
        from benchmarks.common.document import write_document  # loads torch, whose threads no victim shall inherit

        options = {"kills": arguments.kills, "max_life_s": arguments.max_life_s, "seed": arguments.seed}
        write_document(
            arguments.json,
            "disk_kills",
            options=options,
            wall_s=round(time.monotonic() - begin_s, 1),
            num_kills=len(kills),
            num_with_problems=num_wrong,
            pages=dict(totals),
            kills=[asdict(kill) for kill in kills],
        )
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
