"""What is started often imports neither torch nor transformers; a one-off command takes little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

_HEAVY = ("torch", "transformers", "triton")
_GENERATE_MIB = 700
_ADDRESS_SPACE_KIB = 4_000_000

# Several programs one after the other, in one process: what one imports, the others are blamed for too.
_RUN = """
import contextlib, io
from nanoflow.cli.main import main
for line in LINES:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(line.split())
"""
_LOAD = """
from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer
tokenizer = Tokenizer.load(EngineConfig())
assert tokenizer.decode(tokenizer.encode("def f")) == "def f" and tokenizer.has_chat_template
"""
_MODULES = """
import nanoflow.server.serve, nanoflow.server.front_end, nanoflow.engine.async_engine, nanoflow.bench.clients
import nanoflow.engine.template_process, nanoflow.cli.session
from nanoflow import LLM, SamplingParams
"""
_HELP = (
    "",
    "generate",
    "chat",
    "serve",
    "bench serve",
    "bench throughput",
    "bench rounds",
    "plan",
    "search",
    "simulate",
    "profile",
)
_ON_PAPER = (
    "env",
    "analyze preset:llama-3-8b --gpu h100",
    f"plan show {RESULTS / 'plans_llama-3-8b_h200_1024-512.json'}",
    "profile preset:llama-3-8b --estimate h200 -o {folder}/profile.json --max-batch-tokens 256",
)


def heavy_after(program: str) -> list[str]:
    """Which heavy packages a program has imported at its end."""
    say = f"import sys\nprint(*(name for name in {_HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{say}"], capture_output=True, text=True, check=True, timeout=100
    )
    return done.stdout.splitlines()[-1].split()


def test_processes_of_a_server_but_the_engine_are_light() -> None:
    assert heavy_after(_MODULES + _LOAD) == []


def test_help_is_light() -> None:
    assert heavy_after(f"LINES = {[f'{name} --help' for name in _HELP]!r}" + _RUN) == []


def test_commands_that_run_no_model_are_light(tmp_path: Path) -> None:
    lines = [line.format(folder=tmp_path) for line in _ON_PAPER]
    assert heavy_after(f"LINES = {lines!r}" + _RUN) == []
    assert (tmp_path / "profile.json").is_file()


def test_the_probe_sees_what_is_heavy() -> None:
    assert heavy_after("import transformers") == ["transformers"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_generate_takes_little_memory_and_reserves_little() -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({_ADDRESS_SPACE_KIB * 1024},) * 2)\n"
    program = limit + (
        "import sys; from nanoflow.cli.main import main\n"
        "status = main(['generate', 'def ', '--max-tokens', '8'])\n"
        "lines = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(status, int(lines['VmHWM'].split()[0]) // 1024, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    status, peak_mib = map(int, done.stderr.splitlines()[-1].split())
    assert status == 0 and done.stdout.strip()
    assert peak_mib < _GENERATE_MIB
