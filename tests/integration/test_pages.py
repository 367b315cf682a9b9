"""Every command and every snippet of the documentation does what the page says; none is left out.

Blocks are found by `tests/pages.py`; what is done with each command stands in `tests/page_rules.py`. A command that is
not in that table fails, and so does an entry that no page has.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from nanoflow.cli.main import build_parser, main
from nanoflow.models import llama, readings, registry
from nanoflow.models.generation import SamplingDefaults
from nanoflow.models.locate import locate_model
from nanoflow.plan.book import BookLimits, MadeFor, PlanEntry
from nanoflow.request import SamplingParams
from tests.page_rules import QUICK_SEARCH, RULES, SHOWN, STORED_PROFILE, Install, Make, Rule, Run, Serve
from tests.pages import ROOT, SHELLS, Block, blocks, inline_commands
from tests.server_process import ServerProcess, running_server

BLOCKS = list(blocks())
SHELL_BLOCKS = [block for block in BLOCKS if block.is_of_commands]
MODEL_CARD = "src/nanoflow/default_model/README.md"
OTHERS = [block for block in BLOCKS if not block.is_of_commands and block.page != MODEL_CARD]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def at(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    options = ("--device", "cpu", "--max-num-seqs", "8", "--served-model-name", "default")
    with running_server((str(locate_model("default")), *options)) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of a block run: with what the repository and the reader have."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "my-model").symlink_to(locate_model("default"))
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"{place},{100 + place},20" for place in range(50))]
    (tmp_path / "lengths.csv").write_text("\n".join(rows) + "\n")
    body = {"prompt": "def ", "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


# --- nothing is left out ---------------------------------------------------------------------------------------------


def test_every_command_has_a_rule_and_every_rule_a_command() -> None:
    written = {command for block in SHELL_BLOCKS for command in block.commands}
    assert written - RULES.keys() == set(), "commands of pages that tests/page_rules.py does not know"
    assert RULES.keys() - written == set(), "rules for commands that no page has"
    assert len(SHELL_BLOCKS) >= 6 and len(written) >= 25


def test_every_other_block_is_known() -> None:
    first_lines = {block.first_line for block in OTHERS}
    assert first_lines - SHOWN.keys() == set(), "blocks that tests/page_rules.py does not know"
    assert SHOWN.keys() - first_lines == set()
    for block in OTHERS:
        is_shell = block.language in SHELLS[1:]
        assert not is_shell, f"{at(block)} is marked as a shell's and begins with no known program"


def test_the_model_card_shows_what_the_model_wrote() -> None:
    samples = {block.text for block in BLOCKS if block.page == MODEL_CARD and not block.is_of_commands}
    facts = (ROOT / MODEL_CARD).with_name("model_card.json").read_text(encoding="utf-8")
    written = json.dumps(json.loads(facts), ensure_ascii=False)
    assert samples
    for sample in samples:
        assert json.dumps(sample, ensure_ascii=False)[1:-1] in written, sample


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [pytest.param(each, marks=pytest.mark.slow if QUICK_SEARCH in each.commands else ()) for each in SHELL_BLOCKS],
    ids=at,
)
def test_the_commands_of_a_block_end_as_the_page_says(
    block: Block,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    for command in block.commands:
        rule: Rule = RULES[command]
        if isinstance(rule, Run):
            run(command, rule, monkeypatch, capsys)
        elif isinstance(rule, Make):
            shown = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
            assert shown.returncode == 0 and shown.stdout, shown.stderr
        elif isinstance(rule, Install):
            check_installation(command, block)
        else:
            build_parser().parse_args(shlex.split(command)[1:])
            if isinstance(rule, Serve):
                ask(request.getfixturevalue("server"))
            elif rule.result is not None:
                place_result(command, rule.result, folder)


def run(command: str, rule: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of ours in this process, and compare what it says and writes with its rule."""
    build_parser().parse_args(shlex.split(command)[1:])
    monkeypatch.setattr(sys, "stdin", io.StringIO(rule.typed or ""))
    capsys.readouterr()
    status = main(shlex.split(rule.instead or command)[1:])
    said = capsys.readouterr()
    assert status == 0, f"{command}: {said.err}"
    for pattern in rule.says:
        assert re.search(pattern, said.out, re.MULTILINE), f"{command}: no {pattern!r} in {said.out}"
    for name in rule.writes:
        assert Path(name).stat().st_size > 100, f"{command} did not write {name}"
    if rule.shows is not None:
        assert said.out.splitlines() == block_that_begins(rule.shows).text.splitlines()


def place_result(command: str, stored: str, folder: Path) -> None:
    """The stored result of a command in the place that its -o names."""
    words = shlex.split(command)
    shutil.copyfile(ROOT / stored, folder / words[words.index("-o") + 1])


def ask(server: ServerProcess) -> None:
    models = httpx.get(f"{server.root_url}/v1/models").json()["data"]
    body = {"model": models[0]["id"], "prompt": "def ", "max_tokens": 4}
    answer = httpx.post(f"{server.root_url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0


def check_installation(command: str, block: Block) -> None:
    """The command installs this project, and with it what the comment says."""
    name, extras = PROJECT["project"]["name"], PROJECT["project"]["optional-dependencies"]
    if command in (f"pip install {name}", *(f"pip install '{name}[{extra}]'" for extra in extras)):
        return
    assert command == "pip install -e ." and PROJECT["project"]["scripts"]["nanoflow"] == "nanoflow_engine:main"
    said = re.search(rf"{re.escape(command)} +#.* (\w+) >= ([\d.]+) comes with it", block.text)
    assert said is not None and f"{said[1]}>={said[2]}" in PROJECT["project"]["dependencies"]


@pytest.mark.parametrize(("page", "command"), inline_commands(), ids=lambda text: text[:60])
def test_options_of_commands_in_the_text_exist(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = words[0]
    options = [word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word)]
    if program == "make":
        goals = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(goals)
        return
    if program in ("pip", "openssl", "vllm"):  # not ours
        return
    if program == "pytest":
        paths = [word for word in words[1:] if "/" in word]
        markers = [words[place + 1] for place, word in enumerate(words) if word == "-m"]
        known = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
        assert all((ROOT / path).exists() for path in paths) and set(markers) <= set(known)
        return
    text = help_of(words, monkeypatch, capsys)
    missing = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)]
    assert not missing, f"{page}: {command!r} has options that do not exist: {missing}"


def help_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What --help says of a command, or the source of a process that has none."""
    if words[0] == "nanoflow":
        names = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
        call: Callable[[], object] = lambda: main([*names, "--help"])  # noqa: E731
    elif words[1] == "-m" and words[2].startswith("nanoflow."):
        return Path(str(import_module(words[2]).__file__)).read_text(encoding="utf-8")
    else:
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        path = ROOT / f"{module.replace('.', '/')}.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        monkeypatch.setattr(sys, "path", [str(path.parent), str(ROOT), *sys.path])
        call = lambda: runpy.run_path(str(path), run_name="__main__")  # noqa: E731
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call()
    assert left.value.code in (0, None)
    return capsys.readouterr().out


# --- snippets and what pages show ------------------------------------------------------------------------------------


def block_that_begins(first_line: str) -> Block:
    (found,) = [block for block in OTHERS if block.first_line == first_line]
    return found


def test_the_quick_start_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    block = block_that_begins("from nanoflow import LLM, SamplingParams")
    code = block.text.replace('LLM("default",', 'LLM("default", device="cpu",')
    assert code != block.text
    exec(compile(code, at(block), "exec"), {})
    endings = re.findall(r" (stop|length)$", capsys.readouterr().out, re.MULTILINE)
    assert len(endings) == 2, "a completion for each prompt, and why it ended"


def test_a_prompt_is_found_the_second_time(capsys: pytest.CaptureFixture[str]) -> None:
    block = block_that_begins("# The second time, all full pages of the prompt are found.")
    exec(compile(block.text.replace('LLM("default"', 'LLM("default", device="cpu"'), at(block), "exec"), {})
    first, second = map(int, re.findall(r"^\d+$", capsys.readouterr().out, re.MULTILINE))
    assert first == 0 and second > 0


def test_requests_of_both_classes(capsys: pytest.CaptureFixture[str]) -> None:
    block = block_that_begins(
        "# Two requests that somebody waits for, the second more urgently, and one for which nobody does."
    )
    exec(compile(block.text.replace('LLM("default"', 'LLM("default", device="cpu"'), at(block), "exec"), {})
    assert len(re.findall(r" (stop|length)$", capsys.readouterr().out, re.MULTILINE)) == 3


def test_the_two_ways_to_ask_for_drafts() -> None:
    block = block_that_begins("from nanoflow import LLM")
    names: dict[str, Any] = {}
    code = block.text.replace('LLM("default",', 'LLM("default", device="cpu",')
    for part in code.split("# vLLM's name of the same:"):
        exec(compile(part, at(block), "exec"), names)
        with names["llm"] as llm:
            assert len(llm.generate("x = 1\n" * 9, SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)) == 1


@pytest.mark.parametrize("first_line", [line for line, rule in SHOWN.items() if rule == "run against the server"])
def test_what_asks_a_server(first_line: str, server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    block = block_that_begins(first_line)
    code = block.text.replace("http://127.0.0.1:8000", server.root_url)
    assert code != block.text
    exec(compile(code, at(block), "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_picture_of_the_quick_start_is_that_of_its_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = "benchmarks/results/plans_llama-3-8b_h200_1024-512.json"
    assert main(["plan", "show", book, "--profile", STORED_PROFILE, "--svg", "plan.svg"]) == 0
    stored = ROOT / "docs/pictures/quick-start.svg"
    assert (folder / "plan.svg").read_text() == stored.read_text(), f"draw {stored.name} anew"


def test_lines_of_a_start(server: ServerProcess) -> None:
    for first_line in SHOWN:
        if first_line.startswith("nanoflow limits for"):
            shape = re.compile(
                r"nanoflow limits for \w+: max_batch_tokens [\d,]+ \(.+\), max_num_seqs [\d,]+ \(given\), "
                r"(gaps of at most [\d,]+ ms|gaps of any length) between tokens \(.+\)"
            )
            said = [line.strip() for line in server.lines if line.startswith("nanoflow limits for")]
            assert shape.fullmatch(first_line) and len(said) == 1 and shape.fullmatch(said[0]), said
    defaults = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert f"nanoflow {defaults}" in SHOWN


def test_the_snippets_on_adding_a_model() -> None:
    found = [block for block in OTHERS if block.page == "docs/adding-a-model.md"]
    table, signature = (block.text for block in found)
    first, _, second = table.partition("# models/registry.py\n")
    names = dict(vars(readings))
    exec(first, names)
    spaces = {**vars(registry), "readings": SimpleNamespace(**names)}
    exec(second, spaces)
    architectures = spaces["ARCHITECTURES"]
    assert architectures["YourForCausalLM"].reading.model_type == "yours"
    assert architectures["LlamaForCausalLM"].reading == registry.ARCHITECTURES["LlamaForCausalLM"].reading
    (function,) = ast.parse(f"{signature}\n    ...").body
    assert isinstance(function, ast.FunctionDef)
    wanted = [argument.arg for argument in function.args.args]
    assert list(inspect.signature(llama.build).parameters)[: len(wanted)] == wanted


def test_the_plan_book_of_the_architecture() -> None:
    shown = json.loads(block_that_begins('{"version": 1,').text.replace("{...}", '"a plan"'))
    entry = PlanEntry.__dataclass_fields__.keys()
    assert shown["entries"] and all(set(each) <= entry for each in shown["entries"])
    MadeFor(**shown["made_for"])
    BookLimits(**shown["limits"])


def test_the_layers_of_the_architecture() -> None:
    drawn = set(
        re.findall(
            r"[a-z_]+",
            re.sub(
                r" {5,}\S.*", "", next(block for block in OTHERS if block.first_line.startswith("10  familiar")).text
            ),
        )
    )
    (layers,) = [each["layers"] for each in PROJECT["tool"]["importlinter"]["contracts"] if each["type"] == "layers"]
    assert {name for layer in layers for name in re.findall(r"[a-z_]+", layer)} == drawn
