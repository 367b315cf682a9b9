"""`benchmarks/engine/batch_order.py`: which requests a file has, and what is read of a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from benchmarks.engine import batch_order
from benchmarks.engine.batch_order import Run, measured, parse_args

GROUPS = ["--groups", "3", "--lines", "4", "--words", "20"]


def bodies(*argv: str) -> list[dict[str, Any]]:
    return batch_order._bodies(parse_args(argv))


def test_lines_of_a_group_begin_alike_and_end_differently() -> None:
    prompts = [body["prompt"] for body in bodies(*GROUPS)]
    assert len(set(prompts)) == 12
    beginnings = [" ".join(prompt.split()[:20]) for prompt in prompts]
    assert sorted(beginnings.count(each) for each in set(beginnings)) == [4, 4, 4]
    assert beginnings != sorted(beginnings, key=beginnings.index), "they are shuffled"


def test_a_mix_has_its_lengths_kind_after_kind_if_asked() -> None:
    mix = ["--mix", "40/5x2,10/20x3"]
    in_turn = [(len(body["prompt"]), body["max_tokens"]) for body in bodies(*mix, "--in-turn")]
    assert in_turn == [(40, 5)] * 2 + [(10, 20)] * 3
    assert len(bodies(*mix, *GROUPS)) == 17


def test_no_requests_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([])
    assert "give --groups, --mix or both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "told"), [(0, "tokens in 1,002.5 s, 12 tokens/s\n"), (0, "nothing"), (1, "no such model")]
)
def test_a_run_is_what_its_summary_and_answers_say(
    status: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    answers = [{"response": {"body": {"usage": each}}} for each in (usage, {**usage, "prompt_tokens_details": None})]
    output = tmp_path / "out.jsonl"
    output.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, status, stderr=told)

    monkeypatch.setattr(subprocess, "run", run)
    args = parse_args([*GROUPS, "--options=--kv-cache-gib 1"])
    if "in 1" not in told:
        with pytest.raises(RuntimeError, match=told):
            measured(tmp_path / "in.jsonl", output, "arrival", args)
        return
    found = measured(tmp_path / "in.jsonl", output, "arrival", args)
    assert found == Run(order="arrival", wall_s=1002.5, prompt_tokens=14, completion_tokens=4, cached_tokens=4)
    assert found.tokens_per_s == pytest.approx(18 / 1002.5)
    assert commands[0][-2:] == ["--kv-cache-gib", "1"] and "arrival" in commands[0]
