"""The command line as users run it, in processes of its own, with the default model."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

NANOFLOW = (sys.executable, "-m", "nanoflow")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
DEADLINE_S = 120
GREEDY = ("generate", "def main(", "--temperature", "0", "--max-tokens", "12")


def run_cli(*argv: str, text: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*NANOFLOW, *argv], input=text, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == status, done.stderr
    return done


class Terminal:
    """A command that believes that a person watches."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen([*NANOFLOW, *argv], stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown = ""

    def write(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, wanted: str, *, is_interrupting: bool = False) -> str:
        """Everything shown up to and with `wanted`, which is then forgotten.

        Interrupting, Ctrl-C is pressed, and again after each silent second: one that falls between a prompt and the
        wait for its line is noticed only with the next key.
        """
        deadline_s, is_silent = time.monotonic() + DEADLINE_S, True
        while wanted not in self.shown:
            assert time.monotonic() < deadline_s, f"{wanted!r} not in {self.shown!r}"
            if is_interrupting and is_silent:
                self.process.send_signal(signal.SIGINT)
            is_silent = not select.select([self._master], [], [], 1.0)[0]
            if not is_silent:
                self.shown += os.read(self._master, 65536).decode().replace("\r\n", "\n")
        seen, _, self.shown = self.shown.partition(wanted)
        return seen + wanted

    def read_to_end(self) -> str:
        """Everything shown until the command ends."""
        try:
            while piece := os.read(self._master, 65536):
                self.shown += piece.decode().replace("\r\n", "\n")
        except OSError:  # How a pseudo-terminal says that the other side is closed.
            pass
        return self.shown


@contextmanager
def terminal(*argv: str) -> Iterator[Terminal]:
    opened = Terminal(argv)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()


@pytest.fixture(scope="module")
def piped() -> str:
    """What GREEDY prints into a pipe."""
    return run_cli(*GREEDY).stdout


def test_generate_json_is_greedy_and_complete(piped: str) -> None:
    argv = ("generate", "def main(", "import ", "--json", "--temperature", "0", "--max-tokens", "8", "--ignore-eos")
    lines = [json.loads(line) for line in run_cli(*argv).stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["def main(", "import "]
    assert [len(line["token_ids"]) for line in lines] == [8, 8]
    assert [line["finish_reason"] for line in lines] == ["length", "length"]
    assert len(lines[0]["text"]) > 8 and piped.startswith(lines[0]["text"]), "another process says more"


def test_a_terminal_streams_what_a_pipe_prints(piped: str) -> None:
    with terminal(*GREEDY) as shown:
        assert shown.read_to_end() == piped
        assert shown.process.wait() == 0


def test_ctrl_c_ends_generate_quietly() -> None:
    with terminal("generate", "def main(", "--max-tokens", "1000", "--ignore-eos") as shown:
        shown.read_until("(")
        shown.process.send_signal(signal.SIGINT)
        assert "Traceback" not in shown.read_to_end()
        assert shown.process.wait() == 130


def test_a_missing_model_is_one_line() -> None:
    error = run_cli("generate", "x", "--model", "/nowhere/model", status=1).stderr
    assert error.startswith("nanoflow: error: ") and error.count("\n") == 1


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return str(tmp_path / "template.jinja")


def test_piped_chat(template: str) -> None:
    done = run_cli(
        *("chat", "--chat-template", template, "--temperature", "0", "--max-tokens", "4", "--ignore-eos"),
        text="import \n/reset\nimport \n",
    )
    lines = done.stdout.split("\n")
    assert len(lines) % 2 == 1 and lines[: len(lines) // 2] == lines[len(lines) // 2 : -1]
    assert done.stderr == ""


def test_ctrl_c_in_a_chat_stops_the_answer_only(template: str) -> None:
    with terminal("chat", "--chat-template", template, "--ignore-eos", "--temperature", "0") as shown:
        shown.read_until(">>> ")
        shown.write("import \n")
        shown.read_until("import ")
        time.sleep(0.2)
        shown.process.send_signal(signal.SIGINT)
        shown.read_until(">>> ")
        shown.read_until("leaves)", is_interrupting=True)
        shown.write("/quit\n")
        assert "Traceback" not in shown.read_to_end()
        assert shown.process.wait() == 0


def test_bench_throughput_writes_a_record(tmp_path: Path) -> None:
    argv = ("bench", "throughput", "--workload", "16/8", "--num-requests", "6", "--repeats", "2")
    done = run_cli(*argv, "--json", str(tmp_path / "run.json"))
    assert "total tokens/s" in done.stdout
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["model"]["device"] == "cpu" and record["plan"].startswith("sequential")
    assert 0 < record["bounds"]["serial_tokens_per_s"] < record["bounds"]["optimal_tokens_per_s"]
    assert "of the serial bound (%)" in done.stdout
    for run in record["repeats"]:
        assert (run["num_completed"], run["num_failed"], run["num_short"]) == (6, 0, 0)
        assert (run["num_prompt_tokens"], run["num_output_tokens"]) == (96, 48)
        assert 0 < run["ttft_s"]["p50"] <= run["latency_s"]["p50"] <= run["duration_s"]


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    process = subprocess.Popen([*NANOFLOW, "serve", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(line for line in process.stdout if line.startswith("nanoflow serves ")).split()[-1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130)
    finally:
        process.kill()


def test_bench_serve(server_url: str, tmp_path: Path) -> None:
    run_cli(
        *("bench", "serve", "--url", server_url, "--workload", "16/8", "--num-requests", "6", "--request-rate", "20"),
        *("--goodput", "ttft_ms:60000", "--json", str(tmp_path / "run.json")),
    )
    record = json.loads((tmp_path / "run.json").read_text())
    (run,) = record["repeats"]
    assert (run["num_completed"], run["num_failed"], run["num_output_tokens"]) == (6, 0, 48)
    assert run["itl_s"]["mean"] > 0
    assert run["goodput_requests_per_s"] == pytest.approx(run["requests_per_s"])


def test_bench_serve_reports_what_the_server_refuses(server_url: str) -> None:
    argv = ("bench", "serve", "--url", server_url, "--workload", "99999/8", "--num-requests", "2")
    assert "completes no request: HTTP 400" in run_cli(*argv, status=1).stderr
    done = run_cli(*argv, "--num-warmup", "0", status=1)
    assert "2 failed: HTTP 400" in done.stdout
