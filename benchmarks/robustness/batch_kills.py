"""Kills a process that answers a file of requests, repeatedly, and checks that every line is answered exactly once.

The victim does what `nanoflow batch` does, with an engine that answers at once: it reads the input, reads what is
answered already, and appends. It gets SIGKILL at a random moment, while it starts too. Now and then the output also
loses the end of its last line, as a write that was cut off leaves it. After the kills a last process answers the rest.
Then every line must have one answer, with its own custom_id. Before that a long file is answered, and memory watched.

    python -m benchmarks.robustness.batch_kills --lines 20000 --kills 200 --json benchmarks/results/batch_kills.json
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from nanoflow.batch_files import look_ahead
from nanoflow.batch_files.answers import Answers, Identity
from nanoflow.batch_files.lines import Answer
from nanoflow.batch_files.order import RequestCost
from nanoflow.batch_files.requests import Requests
from nanoflow.batch_files.source import read_lines, scan
from nanoflow.cli.options import CommandParser

_COST = RequestCost(token_s=1e-5, key_s=1e-8)
_AT_ONCE, _LOOK_AHEAD = 256, 1000
_TEXT = "a text that repeats itself, "
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Kills:
    """What the kills have left.

    Attributes:
        num_lines: Lines of the input; every hundredth is no request.
        num_kills: Kills.
        num_amid: How many of them came before all lines were answered.
        num_torn: How many of them were followed by a cut through the last line.
        num_answers: Lines of the output.
        num_missing, num_twice, num_wrong: Lines without an answer, with two, and with that of another line.
        wall_s: Seconds.
    """

    num_lines: int
    num_kills: int
    num_amid: int
    num_torn: int
    num_answers: int
    num_missing: int
    num_twice: int
    num_wrong: int
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One process that answers a long file.

    Attributes:
        num_lines, input_bytes: The file.
        rss_before_mib, rss_peak_mib: Resident memory when it began, and the largest until its end.
        wall_s: Seconds.
    """

    num_lines: int
    input_bytes: int
    rss_before_mib: float
    rss_peak_mib: float
    wall_s: float


def write_input(path: Path, num_lines: int) -> None:
    """A file of requests; every hundredth line is none."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, num_lines + 1):
            body = {"prompt": f"{number % 10} {_TEXT * (1 + number % 20)}", "max_tokens": 1 + number % 100}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write("this is no request\n" if number % 100 == 0 else json.dumps(line) + "\n")


async def answer_at_once(_path: str, body: bytes) -> Answer:
    """What the engine says: the first bytes of the body, so that the answer can be told from another."""
    await asyncio.sleep(0)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    said = msgspec.json.encode({"said": body[:100].decode(), "usage": usage})
    return Answer(status_code=200, request_id="req-1", body=msgspec.Raw(said))


def answer_all(source: Path, output: Path) -> None:
    """Answer all lines that have no answer."""
    known = scan(source)
    with Answers.open(output, Identity.of(known, "stub"), known.num_numbers) as answers:
        requests = Requests(call=answer_at_once, sink=answers, repeated=known.repeated, num_at_once=_AT_ONCE)
        lines = (line for line in read_lines(source, known) if line.number not in answers.done)
        asyncio.run(requests.run(look_ahead.throughput(_COST, _LOOK_AHEAD)(lines)))


def kill_repeatedly(folder: Path, num_lines: int, num_kills: int) -> Kills:
    """Kill, let a last process finish, and check."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    write_input(source, num_lines)
    begin_s, num_amid, num_torn = time.monotonic(), 0, 0
    whole_s = _in_child(source, folder / "first.jsonl", None)
    for _ in range(num_kills):
        _in_child(source, output, random.uniform(0.0, 0.5 * whole_s))
        num_answered = output.read_bytes().count(b"\n") if output.exists() else 0
        num_amid += num_answered < num_lines
        if output.exists() and random.random() < 0.3 and (size := output.stat().st_size):
            os.truncate(output, size - random.randint(1, min(size, 60)))
            num_torn += 1
        if num_answered == num_lines:
            # Begin anew with a part, so that the next kills find work under way.
            os.truncate(output, int(output.stat().st_size * random.uniform(0.0, 0.9)))
    _in_child(source, output, None)
    lines = output.read_bytes().splitlines()
    answers = [json.loads(line) for line in lines]
    numbers = Counter(int(answer["id"].removeprefix("batch_req_")) for answer in answers)
    return Kills(
        num_lines=num_lines,
        num_kills=num_kills,
        num_amid=num_amid,
        num_torn=num_torn,
        num_answers=len(answers),
        num_missing=num_lines - len(numbers),
        num_twice=sum(count > 1 for count in numbers.values()),
        num_wrong=sum(not _is_right(answer) for answer in answers),
        wall_s=round(time.monotonic() - begin_s, 1),
    )


def _is_right(answer: dict[str, object]) -> bool:
    """Whether an answer is that of its own line."""
    number = int(str(answer["id"]).removeprefix("batch_req_"))
    response = answer["response"]
    assert isinstance(response, dict)
    if number % 100 == 0:
        return answer["custom_id"] is None and response["status_code"] == 400
    is_own = str(response["body"].get("said", "")).startswith(f'{{"prompt": "{number % 10} ')
    return answer["custom_id"] == f"line-{number}" and response["status_code"] == 200 and is_own


def _in_child(source: Path, output: Path, life_s: float | None) -> float:
    """Answer in a process of its own, which is killed after some time, or lives to its end; returns its seconds."""
    begin_s = time.monotonic()
    child = os.fork()
    if not child:
        status = 1
        try:
            answer_all(source, output)
            status = 0
        finally:
            os._exit(status)
    if life_s is not None:
        time.sleep(life_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if life_s is None and status:
        raise RuntimeError(f"a victim that was left alone ended with status {status}")
    return time.monotonic() - begin_s


def watch_memory(folder: Path, num_lines: int) -> Memory:
    """Answer a long file in a process of its own."""
    source, output = folder / "long.jsonl", folder / "long-out.jsonl"
    write_input(source, num_lines)
    reading, writing = os.pipe()
    begin_s = time.monotonic()
    child = os.fork()
    if not child:
        status = 1
        try:
            _forget_peak()
            before = _peak_mib()
            answer_all(source, output)
            os.write(writing, f"{before} {_peak_mib()}".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        before, peak = map(float, pipe.read().split())
    os.waitpid(child, 0)
    return Memory(
        num_lines=num_lines,
        input_bytes=source.stat().st_size,
        rss_before_mib=round(before, 1),
        rss_peak_mib=round(peak, 1),
        wall_s=round(time.monotonic() - begin_s, 1),
    )


def _forget_peak() -> None:
    """Begin to measure anew: a child inherits the largest memory of its parent."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """Largest resident memory of this process since then."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / _MIB


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, watch, print and write."""
    parser = CommandParser(prog="python -m benchmarks.robustness.batch_kills", description=__doc__)
    parser.add_argument("--lines", type=int, default=20_000, help="lines of the file (20000)")
    parser.add_argument("--kills", type=int, default=200, help="number of kills (200)")
    parser.add_argument("--long-lines", type=int, default=1_000_000, help="lines of the long file (1000000); 0: none")
    parser.add_argument("--max-rss-mib", type=float, default=256.0, help="memory that it may take beside its start")
    parser.add_argument("--folder", type=Path, help="where files are made (a folder for temporary files)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    arguments = parser.parse_args(argv)
    random.seed(arguments.seed)
    memory = None
    with TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.long_lines:
            memory = watch_memory(Path(folder), arguments.long_lines)
            print(memory, flush=True)
        kills = kill_repeatedly(Path(folder), arguments.lines, arguments.kills)
        print(kills, flush=True)
    is_flat = memory is None or memory.rss_peak_mib - memory.rss_before_mib <= arguments.max_rss_mib
    is_good = not (kills.num_missing or kills.num_twice or kills.num_wrong) and is_flat
    print("every line once" if is_good else "WRONG")
    if arguments.json:
        from benchmarks.common.document import write_document  # loads torch, whose threads no victim shall inherit

        found = {"kills": asdict(kills), "memory": None if memory is None else asdict(memory)}
        write_document(arguments.json, "batch_kills", is_good=is_good, seed=arguments.seed, **found)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
