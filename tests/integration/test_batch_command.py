"""`nanoflow batch`: the whole command with an engine without a model."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from nanoflow.batch_files.answers import Answers
from nanoflow.batch_files.options import BatchConfig
from nanoflow.cli.batch_run import End, cost_of, run_batch
from nanoflow.cli.main import main
from nanoflow.config import EngineConfig
from tests.batches import CHAT, completion, read, write
from tests.fake_engine import CRASHING, SLOW
from tests.toy_models import write_toy_model

FAKE = "tests.fake_engine_process"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def answer(folder: Path, model: str, **options: object) -> End:
    config = BatchConfig(**{"progress": False, "served_model_name": "toy", **options})  # type: ignore[arg-type]
    engine_config = EngineConfig(model=model, device="cpu")
    return run_batch(folder / "in", folder / "out", engine_config, config, engine_module=FAKE)


def test_ctrl_c_ends_in_order_and_the_same_command_goes_on(tmp_path: Path, model: str) -> None:
    # The engine takes 20 ms for each step of a request with the slow token, so that Ctrl-C comes amid them.
    lines = [completion(str(number), prompt=[65, SLOW], max_tokens=1, model="toy") for number in range(60)]
    lines += [b"nonsense", completion("x", model="other"), completion("chat", url=CHAT, prompt="no messages")]
    write(tmp_path / "in", lines)

    def press() -> None:
        while not (tmp_path / "out").exists() or len(read(tmp_path / "out")) < 10:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    end = answer(tmp_path, model, num_at_once=3)
    thread.join()
    before = (tmp_path / "out").read_bytes()
    assert end.status == 130 and "the same command goes on" in end.summary
    assert 10 <= len(read(before)) < 63
    end = answer(tmp_path, model, num_at_once=10**12, order="arrival")  # no more than there are lines
    assert (tmp_path / "out").read_bytes().startswith(before)
    answers = {line["id"]: line for line in read(tmp_path / "out")}
    assert len(answers) == len(read(tmp_path / "out")) == 63
    statuses = [answers[f"batch_req_{number}"]["response"]["status_code"] for number in range(1, 64)]
    assert statuses == [200] * 60 + [400, 404, 400]
    assert answers["batch_req_1"]["response"]["body"]["usage"]["completion_tokens"] == 1
    assert end.status == 1 and "63 of 63 lines" in end.summary and "the first error: line 6" in end.summary
    # Nothing is left to do: no engine is started, and the status is the same.
    assert answer(tmp_path, model).status == 1


def test_an_engine_that_dies_leaves_the_rest_for_later_and_so_does_a_full_disk(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [completion("a"), completion("b", prompt=[CRASHING], max_tokens=3)]
    write(tmp_path / "in", lines)
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "append", Mock(side_effect=OSError(errno.ENOSPC, "no space")))
        end = answer(tmp_path, model, num_at_once=1, order="arrival")
    assert end.status == 1 and "no space" in end.summary and "0 of 2 lines" in end.summary
    assert "the same command goes on" in end.summary
    end = answer(tmp_path, model, num_at_once=1, order="arrival")
    assert end.status == 1 and "nanoflow: error: " in end.summary and "1 of 2 lines" in end.summary
    assert [line["custom_id"] for line in read(tmp_path / "out")] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing", "-o", "out"], "there is no file missing"),
        (["in", "-o", "in"], "in is the input"),
        (["in", "-o", "no/out"], "no is no folder"),
        (["in", "-o", "."], "it is no file"),
        (["in", "-o", "-"], "answers go to a file"),
        ([".", "-o", "out"], ". is no file: a batch is read twice"),
        (["in", "-o", "text"], "text exists and has no text.batch beside it"),
        (["in", "-o", "out", "--look-ahead", "0"], "look_ahead must be positive"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", [completion("a")])
    (tmp_path / "text").write_text("mine")
    assert main(["batch", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("nanoflow: error: ") and says in said and said.count("\n") == 1
    assert (tmp_path / "text").read_text() == "mine" and not (tmp_path / "text.batch").exists()


def test_costs_of_what_is_not_known_are_those_of_something() -> None:
    assert cost_of(EngineConfig(model="preset:llama-3-8b"), "cpu").token_s > 0
    known = cost_of(EngineConfig(model="preset:llama-2-70b"), "NVIDIA H200")
    assert known.token_s > 8 * cost_of(EngineConfig(model="preset:llama-3-8b"), "NVIDIA H200").token_s
