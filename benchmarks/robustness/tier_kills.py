"""Kills an engine with host memory and a disk for KV pages, repeatedly, and checks what the next one answers.

The victim holds conversations in so little memory that pages leave the device and the host all the time. It gets
SIGKILL at a random moment: while it starts, in the middle of load, or while it ends in an orderly way. The next one has
the same folder. Every answer of every life must be that of an engine without any of this.

    python -m benchmarks.robustness.tier_kills --kills 500 --json benchmarks/results/tier_kills.json
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanoflow.cli.options import CommandParser

LIVES_A_STORE = 25
MOMENTS = {"load": 0.8, "start": 0.1, "end": 0.1}
_NUM_TALKS, _NUM_ROUNDS, _MOST_AT_ONCE, _MAX_TOKENS = 12, 4, 4, 12
_ENGINE: dict[str, Any] = {
    "device": "cpu",
    "num_threads": 1,
    "num_pages": 28,
    "max_model_len": 448,
    "max_num_seqs": 4,
    "max_batch_tokens": 128,
    "skip_tokenizer_init": True,
}
_TIERS: dict[str, Any] = {"kv_host_gib": 0.003, "kv_disk_gib": 0.25}
_START_S = 120.0


@dataclass(slots=True, kw_only=True)
class Kill:
    """One kill, and what the victim had said before it.

    Attributes:
        moment: When it came: "load", "start" or "end".
        after_s: Seconds after the engine was ready, had begun to start or to end.
        num_answers, num_cached_tokens: Answers, and tokens of their prompts that were found in some tier.
        first_cached_tokens: Those of the first answer: an earlier life computed them.
        loaded_bytes: That came back to the device.
        problems: Faults; empty if all is well.
    """

    moment: str
    after_s: float
    num_answers: int = 0
    num_cached_tokens: int = 0
    first_cached_tokens: int = 0
    loaded_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def talks() -> list[list[int]]:
    """The first prompts of conversations; some begin alike."""
    rng = random.Random(7)
    systems = [[rng.randrange(300, 2000) for _ in range(count)] for count in (0, 50, 90)]
    return [
        systems[place % 3] + [rng.randrange(300, 2000) for _ in range(rng.randint(30, 80))]
        for place in range(_NUM_TALKS)
    ]


def open_llm(model: str, **options: Any) -> Any:
    """An engine in this process."""
    from nanoflow.engine.llm import LLM

    return LLM(model, **_ENGINE, **options)


def answers(llm: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """The tokens that are said, and how many tokens of the prompt were found."""
    from nanoflow.request import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens or 0) for output in outputs]


def reference(model: str, pipe: int) -> None:
    """Say what an engine without lower tiers answers, one request after the other: prompts and answers of all turns."""
    llm = open_llm(model)
    for talk in talks():
        prompt = talk
        for turn in range(_NUM_ROUNDS):
            ((said, _),) = answers(llm, [prompt])
            _tell(pipe, prompt=prompt, said=said)
            prompt = [*prompt, *said, 400 + turn]


def victim(model: str, folder: Path, turns: Sequence[dict[str, list[int]]], seed: int, ends: bool, pipe: int) -> None:
    """Converse until killed, or for a while and then end."""
    rng = random.Random(seed)
    llm = open_llm(model, kv_dir=str(folder), **_TIERS)
    _tell(pipe, ready=True)
    until_s = time.monotonic() + (1.0 if ends else _START_S)
    while time.monotonic() < until_s:
        chosen = rng.choices(range(len(turns)), k=rng.randint(1, _MOST_AT_ONCE))
        for index, (said, num_cached) in zip(chosen, answers(llm, [turns[i]["prompt"] for i in chosen]), strict=True):
            _tell(pipe, index=index, said=said, cached=num_cached)
        if rng.random() < 0.02:
            llm.reset_prefix_cache()
        llm._engine.check_integrity()
        _tell(pipe, loaded=llm._engine.stats().tiers["host"].loaded_bytes)
    _tell(pipe, ends=True)
    llm.close()
    _tell(pipe, ended=True)


def run(num_kills: int, model: str, folder: Path, max_life_s: float, deadline_s: float) -> list[Kill]:
    """Kill a number of times, or until a time."""
    process, lines = _start(reference, model)
    turns = list(lines)
    os.waitpid(process, 0)
    if len(turns) != _NUM_TALKS * _NUM_ROUNDS or "problem" in turns[-1]:
        raise RuntimeError(f"no reference: {turns[-1:]}")
    kills: list[Kill] = []
    while len(kills) < num_kills and time.monotonic() < deadline_s:
        moment = random.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        longest_s = {"load": max_life_s, "start": 0.5, "end": 0.1}[moment]
        kill = Kill(moment=moment, after_s=round(random.uniform(0.0, longest_s), 3))
        home = folder / str(len(kills) // LIVES_A_STORE)
        _strike(kill, _start(victim, model, home, turns, random.getrandbits(32), moment == "end"), turns)
        kills.append(kill)
        _show(len(kills), kill)
    return kills


def _start(work: Any, *arguments: Any) -> tuple[int, Iterator[dict[str, Any]]]:
    """Fork a process that does the work: its id, and what it says."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        try:
            work(*arguments, writing)
        except BaseException as error:
            _tell(writing, problem=repr(error))
        os._exit(0)
    os.close(writing)
    return process, _said(reading)


def _said(reading: int) -> Iterator[dict[str, Any]]:
    with os.fdopen(reading) as pipe:
        for line in pipe:
            if line.endswith("\n"):
                yield json.loads(line)


def _strike(kill: Kill, started: tuple[int, Iterator[dict[str, Any]]], turns: Sequence[dict[str, list[int]]]) -> None:
    """Kill a victim at its moment, and judge what it has said."""
    process, lines = started
    heard: list[dict[str, Any]] = []
    awaited = {"load": "ready", "end": "ends"}.get(kill.moment)
    if awaited:
        for line in lines:
            heard.append(line)
            if awaited in line or "problem" in line:
                break
    time.sleep(kill.after_s)
    os.kill(process, signal.SIGKILL)
    heard += lines
    os.waitpid(process, 0)
    if awaited and not any(awaited in line for line in heard):
        kill.problems.append("the engine did not come so far")
    said = [line for line in heard if "index" in line]
    for line in said:
        expected = turns[line["index"]]["said"]
        if line["said"] != expected:
            kill.problems.append(f"turn {line['index']} got {line['said']}, not {expected}")
    kill.problems += [line["problem"] for line in heard if "problem" in line]
    kill.num_answers = len(said)
    kill.num_cached_tokens = sum(line["cached"] for line in said)
    kill.first_cached_tokens = said[0]["cached"] if said else 0
    kill.loaded_bytes = max((line["loaded"] for line in heard if "loaded" in line), default=0)


def _tell(pipe: int, **line: Any) -> None:
    os.write(pipe, (json.dumps(line) + "\n").encode())


def _show(number: int, kill: Kill) -> None:
    found = (
        f"{kill.num_answers:4} answers, {kill.num_cached_tokens:6} tokens found, {kill.first_cached_tokens:4} at first"
    )
    loaded = f"{kill.loaded_bytes / 2**20:6.1f} MiB loaded"
    print(f"{number:4} {kill.moment:5} after {1e3 * kill.after_s:5.0f} ms: {found}, {loaded}", flush=True)
    for problem in kill.problems:
        print(f"     WRONG: {problem}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, print and write."""
    parser = CommandParser(prog="python -m benchmarks.robustness.tier_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="number of kills (500)")
    parser.add_argument("--seconds", type=float, default=7200.0, help="start no further victim after this time (7200)")
    parser.add_argument("--max-life-s", type=float, default=1.5, help="a victim under load lives so long at most (1.5)")
    parser.add_argument("--model", default="default", help="model folder or name (the embedded model)")
    parser.add_argument("--folder", type=Path, help="where stores are made (a folder for temporary files)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and conversations (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the kills here")
    arguments = parser.parse_args(argv)
    random.seed(arguments.seed)
    begin_s = time.monotonic()
    import nanoflow.engine.llm  # noqa: F401  # imported once, for all victims; it starts no threads

    with TemporaryDirectory(dir=arguments.folder) as folder:
        kills = run(arguments.kills, arguments.model, Path(folder), arguments.max_life_s, begin_s + arguments.seconds)
    totals = Counter[str]()
    for kill in kills:
        totals.update(answers=kill.num_answers, cached_tokens=kill.num_cached_tokens)
        totals.update(first_cached_tokens=kill.first_cached_tokens, loaded_bytes=kill.loaded_bytes)
    num_wrong = sum(bool(kill.problems) for kill in kills)
    print(f"{len(kills)} kills in {time.monotonic() - begin_s:.0f} s, {num_wrong} with problems; {dict(totals)}")
    if arguments.json:
        from benchmarks.common.document import write_document

        options = {"kills": arguments.kills, "max_life_s": arguments.max_life_s, "seed": arguments.seed}
        write_document(
            arguments.json,
            "tier_kills",
            options=options,
            wall_s=round(time.monotonic() - begin_s, 1),
            num_kills=len(kills),
            num_with_problems=num_wrong,
            totals=dict(totals),
            kills=[asdict(kill) for kill in kills],
        )
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
