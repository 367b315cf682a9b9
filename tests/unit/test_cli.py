from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest

import nanoflow
from nanoflow.batch_files.options import BatchConfig
from nanoflow.bench.machine import _parse_gpu
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.cli import chat, main, options, session
from nanoflow.config import EngineConfig, ServerConfig, option
from nanoflow.engine.errors import EngineDeadError
from nanoflow.models.generation import NO_DEFAULTS, SamplingDefaults
from nanoflow.option_names import names_of
from nanoflow.outputs import CompletionOutput, FinishReason, RequestOutput
from nanoflow.request import SamplingParams
from tests.slowness import slowness

HEAVY = {"torch", "transformers", "fastapi", "numpy", "httpx", "msgspec", "tqdm", "asyncio"}
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a stand-in where a command will import from."""

    def put(module: str, **names: Any) -> None:
        fake = ModuleType(module)
        vars(fake).update(names)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


def run_cli(*argv: str) -> int:
    try:
        return main.main(argv)
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        return leave.code


# --- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A config with one field of each kind."""

    token_budget: int = option(7, "Half (50%) of it")
    rate: float = option(float("inf"), "Rate")
    name: str | None = option(None, "Name")
    is_fast: bool = option(True, "Fast")
    color: Literal["red", "blue"] = option("red", "Color")
    stops: str | Sequence[str] | None = option(None, "Stops")
    ids: Sequence[int] | None = option(None, "Ids")


GROUP = options.OptionGroup(kind=Sample, title="sample")


def parse(*argv: str, group: options.OptionGroup[Sample] = GROUP) -> Sample:
    parser = options.CommandParser(prog="sample")
    group.add_to(parser)
    return group.read(parser.parse_args(argv))


def test_flags_default_to_the_dataclass() -> None:
    assert parse() == Sample()


def test_flags_parse_by_type() -> None:
    given = parse(
        *("--token-budget", "9", "--rate", "2.5", "--name", "x", "--no-is-fast", "--color", "blue"),
        *("--stops", "a", "--stops", "b", "--ids", "3"),
    )
    assert given == Sample(token_budget=9, rate=2.5, name="x", is_fast=False, color="blue", stops=["a", "b"], ids=[3])


def test_command_can_skip_fields_and_move_defaults() -> None:
    group = options.OptionGroup(kind=Sample, title="t", skip=frozenset({"name"}), defaults={"token_budget": 8})
    assert parse(group=group).token_budget == 8
    with pytest.raises(SystemExit):
        parse("--name", "x", group=group)


def test_help_shows_texts_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("Half (50%) of it (default: 7)", "Fast (default: on)", "Rate (default: inf)", "Name --is-fast"):
        assert text in shown


@pytest.mark.parametrize("flag", ["--token-budge", "--token", "--token-budgets=3"])
def test_unknown_option_names_the_nearest(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse(flag)
    assert leave.value.code == 2
    assert f"unknown option '{flag.partition('=')[0]}'; did you mean '--token-budget'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("--token-budget", "x"), ("--color", "green"), ("stray",)])
def test_bad_values_leave_with_2(argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse(*argv)
    assert leave.value.code == 2


@pytest.mark.parametrize("kind", [EngineConfig, ServerConfig, SamplingParams, BenchConfig, LoadConfig, BatchConfig])
def test_every_option_has_a_help_text(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    skip = frozenset({"logit_bias"})  # A mapping has no flag.
    parser = options.CommandParser(prog="all")
    options.OptionGroup(kind=kind, title="all", skip=skip).add_to(parser)
    for action in parser._actions:
        if action.help == argparse.SUPPRESS and action.dest in names_of(kind):
            continue  # An alias, which stands in the help of its option.
        assert action.help and len(action.help) > 10, action.dest


# --- main ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["batch", "--help"], ["bench", "serve", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    program = (
        "import sys; from nanoflow.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True)
    shown, _, modules = done.stdout.partition("MODULES")
    assert "examples:" in shown
    assert not HEAVY & set(modules.split())


@pytest.mark.timing
def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start_s = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nanoflow", "serve", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start_s

    # In turn, as the speed of a shared machine changes from one second to the next.
    assert min(seconds() / slowness() for _ in range(5)) < 0.3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--version") == 0
    assert capsys.readouterr().out == f"nanoflow {nanoflow.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--max-batch-token", "5"], "unknown option '--max-batch-token'; did you mean '--max-batch-tokens'?"),
        (["bench", "serve", "--goodptu", "x"], "unknown option '--goodptu'; did you mean '--goodput'?"),
        (["bench", "throughput", "--url", "x"], "unknown option '--url'"),
        (["env", "more"], "unexpected argument 'more'"),
        (["serv"], "argument COMMAND: invalid choice: 'serv'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_command_line_leaves_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*argv) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--page-size", "0"], "page_size must be positive, got 0"),
        (["generate", "--temperature", "-1", "x"], "temperature must be in [0.0, 100.0], got -1.0"),
        (["generate", "--file", "/nowhere/x"], "No such file or directory"),
        (["serve", "one", "--model", "two"], "two models given"),
        (["bench", "throughput", "--workload", "9"], "workload must be IN/OUT (as 512/512)"),
        (["bench", "serve", "--workload", "trace:/nowhere"], "cannot read trace /nowhere"),
        (["bench", "throughput", "--goodput", "tttf_ms:3"], "did you mean 'ttft_ms'?"),
    ],
)
def test_errors_of_the_user_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*argv) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("nanoflow: error: ") and message in shown and shown.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError):
        main.main(["serve", "--page-size", "0", "--debug"])
    monkeypatch.setenv("NANOFLOW_DEBUG", "1")
    with pytest.raises(ValueError):
        main.main(["serve", "--page-size", "0"])


def test_engine_errors_are_one_line_and_bugs_are_not(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def fail_with(error: Exception) -> None:
        def run_server(*_: object) -> None:
            raise error

        install("nanoflow.server.serve", run_server=run_server)

    fail_with(EngineDeadError("out of luck"))
    assert run_cli("serve") == 1
    assert capsys.readouterr().err == "nanoflow: error: out of luck\n"
    fail_with(KeyError("bug"))
    with pytest.raises(KeyError):
        run_cli("serve")


def test_ctrl_c_leaves_quietly_with_130(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def run_server(*_: object) -> None:
        raise KeyboardInterrupt

    install("nanoflow.server.serve", run_server=run_server)
    assert run_cli("serve") == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-m", "nanoflow", "env"], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_serve_hands_both_configs_over(install: Install) -> None:
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    install("nanoflow.server.serve", run_server=lambda engine, server: calls.append((engine, server)))
    assert run_cli("serve", "some/model", "--port", "0", "--max-batch-tokens", "64", "--no-async-scheduling") == 0
    engine_config = EngineConfig(model="some/model", max_batch_tokens=64, async_scheduling=False)
    assert calls == [(engine_config, ServerConfig(port=0))]


# --- generate ------------------------------------------------------------------------------------------------------


def facts_of(config: EngineConfig) -> Any:
    """A model that recommends how to sample, if it is named so."""
    is_warm = config.model == "warm"
    return SimpleNamespace(sampling=SamplingDefaults(temperature=0.6, top_k=9) if is_warm else NO_DEFAULTS)


class FakeLLM:
    """Answers every prompt with its upper case; 'bad' fails."""

    seen: Any = None

    def __init__(self, **fields: Any) -> None:
        self.config = EngineConfig(**fields)
        self.facts = facts_of(self.config)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompts: list[str], params: SamplingParams, use_tqdm: bool = True) -> list[RequestOutput]:
        FakeLLM.seen = (self.config, prompts, params)
        return [self._answer(prompt, params) for prompt in prompts]

    def _answer(self, prompt: str, params: SamplingParams) -> RequestOutput:
        reason = FinishReason.ERROR if prompt == "bad" else FinishReason.LENGTH
        completions = [
            CompletionOutput(index=index, text=prompt.upper(), token_ids=[1, 2], finish_reason=reason)
            for index in range(params.n)
        ]
        error = "too bad" if prompt == "bad" else None
        return RequestOutput(
            request_id="0", prompt=prompt, prompt_token_ids=[5], outputs=completions, finished=True, error=error
        )


@pytest.fixture
def fake_llm(install: Install, monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n\nand more\n"))
    install("nanoflow.engine.llm", LLM=FakeLLM)
    return FakeLLM


def test_generate_prints_plain_text(fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("generate", "hello", "--model", "m", "--temperature", "0", "--stop", "x") == 0
    assert capsys.readouterr().out == "HELLO\n"
    params = SamplingParams(temperature=0.0, stop=["x"], max_tokens=128)
    assert fake_llm.seen == (EngineConfig(model="m", goal="throughput", max_num_seqs=1), ["hello"], params)


def test_generate_samples_as_the_model_recommends_where_nothing_else_is_asked_for(fake_llm: type[FakeLLM]) -> None:
    assert run_cli("generate", "hello", "--model", "warm", "--top-k", "3") == 0
    assert fake_llm.seen[2] == SamplingParams(temperature=0.6, top_k=3, max_tokens=128)


def test_generate_heads_several_completions_with_their_prompt(
    fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("generate", "a", "-", "--max-tokens", "5") == 0
    assert capsys.readouterr().out == ">>> a\nA\n>>> from stdin\nFROM STDIN\n>>> and more\nAND MORE\n"
    assert fake_llm.seen[2].max_tokens == 5


def test_generate_reads_files_and_piped_input(fake_llm: type[FakeLLM], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("eins\nzwei\n")
    run_cli("generate", "null", "--file", str(tmp_path / "prompts"))
    assert fake_llm.seen[1] == ["null", "eins", "zwei"]
    run_cli("generate")
    assert fake_llm.seen[1] == ["from stdin", "and more"]


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_bytes(b"\xff\xfe")
    assert run_cli("generate", "--file", str(tmp_path / "prompts")) == 1
    assert capsys.readouterr().err == (
        f"nanoflow: error: cannot read prompts from {tmp_path / 'prompts'}: not text in UTF-8\n"
    )


@pytest.mark.parametrize("argv", [(), ("generate",), ("bench",), ("bench", "throughput"), ("bench", "serve")])
def test_the_help_says_what_exit_statuses_mean(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*argv, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split()).lower()
    assert "exit status" in shown
    if len(argv) < 2:
        assert all(status in shown.partition("exit status")[2] for status in ("0 ", "1 ", "2 ", "130 "))


def test_generate_needs_a_prompt(fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    sys.stdin.read()
    assert run_cli("generate") == 1
    assert "no prompt" in capsys.readouterr().err


def test_generate_json_is_one_object_a_completion(fake_llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("generate", "ä", "bad", "--json", "--n", "2") == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [(line["prompt_index"], line["index"], line["finish_reason"]) for line in lines] == [
        (0, 0, "length"),
        (0, 1, "length"),
        (1, 0, "error"),
        (1, 1, "error"),
    ]
    assert lines[0]["prompt"] == "ä" and lines[0]["text"] == "Ä" and lines[0]["token_ids"] == [1, 2]
    assert captured.err == "nanoflow: error: prompt 1: too bad\n"


# --- sessions and chat ---------------------------------------------------------------------------------------------


class FakeAsyncEngine:
    """Says the words of the prompt one by one in an output that grows in place; 'forever' never ends."""

    log: list[str]

    @classmethod
    async def start(cls, config: EngineConfig) -> FakeAsyncEngine:
        engine = cls()
        engine.log = FakeAsyncEngine.log = []
        if config.model == "missing":
            raise ValueError("no such model")
        if config.model == "endless":
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(60)
            finally:
                engine.log.append("start cancelled")
        engine.facts = facts_of(config)  # type: ignore[attr-defined]
        engine.tokenizer = SimpleNamespace(  # type: ignore[attr-defined]
            apply_chat_template=lambda messages, chat_template_kwargs=None: " ".join(
                [*(message["content"] for message in messages), *map(str, (chat_template_kwargs or {}).items())]
            ),
            chat_templates=SimpleNamespace(usual=None),
        )
        return engine

    async def generate(self, prompt: str, params: SamplingParams) -> AsyncIterator[RequestOutput]:
        completion = CompletionOutput(index=0)
        output = RequestOutput(request_id="0", prompt=prompt, prompt_token_ids=[1], outputs=[completion])
        try:
            for word in prompt.split():
                if word == "bad":
                    completion.finish_reason, output.error = FinishReason.ERROR, "cannot"
                completion.text += word + " "
                yield output
                await asyncio.sleep(60 if word == "forever" else 0)
        finally:
            self.log.append("ended")

    async def close(self) -> None:
        self.log.append("closed")


@pytest.fixture
def fake_engine(install: Install) -> type[FakeAsyncEngine]:
    install("nanoflow.engine.async_engine", AsyncEngine=FakeAsyncEngine)
    return FakeAsyncEngine


def test_session_streams_pieces(fake_engine: type[FakeAsyncEngine]) -> None:
    with session.EngineSession(EngineConfig()) as engine:
        assert list(engine.stream("one two", SamplingParams())) == ["one ", "two "]
        with pytest.raises(ValueError, match="cannot"):
            list(engine.stream("bad", SamplingParams()))
    assert fake_engine.log == ["ended", "ended", "closed"]


def test_closing_a_stream_aborts_the_request(fake_engine: type[FakeAsyncEngine]) -> None:
    with session.EngineSession(EngineConfig()) as engine:
        pieces = engine.stream("one forever never", SamplingParams())
        assert [next(pieces), next(pieces)] == ["one ", "forever "]
        pieces.close()
        assert list(engine.stream("next", SamplingParams())) == ["next "]
    assert fake_engine.log == ["ended", "ended", "closed"]


def test_a_session_that_cannot_start_leaves_no_thread(fake_engine: type[FakeAsyncEngine]) -> None:
    with pytest.raises(ValueError, match="no such model"):
        session.EngineSession(EngineConfig(model="missing"))
    assert not [thread for thread in threading.enumerate() if thread.name == "engine session"]


def test_ctrl_c_stops_a_start(fake_engine: type[FakeAsyncEngine]) -> None:
    assert run_cli("chat", "--model", "endless") == 130
    assert fake_engine.log == ["start cancelled"]


def test_generate_streams_to_a_terminal(
    fake_engine: type[FakeAsyncEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_cli("generate", "one two") == 0
    assert capsys.readouterr().out == "one two \n"


def test_a_prompt_that_fails_on_a_terminal_is_one_line(
    fake_engine: type[FakeAsyncEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_cli("generate", "bad") == 1
    assert capsys.readouterr().err == "nanoflow: error: cannot\n"


def test_chat_keeps_resets_and_quits(
    fake_engine: type[FakeAsyncEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n/reset\nc\n/help\n/quit\nnever\n"))
    assert run_cli("chat", "--system", "s") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:3] == ["s a ", "s a s a b ", "s c "]
    assert "/reset" in captured.out and "never" not in captured.out


def test_chat_gives_variables_to_the_template(
    fake_engine: type[FakeAsyncEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert run_cli("chat", "--chat-template-kwargs", '{"enable_thinking": false}') == 0
    assert capsys.readouterr().out == "a ('enable_thinking', False) \n"


@pytest.mark.parametrize(("value", "problem"), [("{", "no JSON"), ("[1]", "a JSON object is expected")])
def test_other_variables_than_an_object_are_one_line(
    value: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("chat", "--chat-template-kwargs", value) == 2
    assert problem in capsys.readouterr().err


def test_chat_goes_on_after_an_error(
    fake_engine: type[FakeAsyncEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("bad\ngood\n"))
    assert run_cli("chat") == 1
    captured = capsys.readouterr()
    assert captured.out == "bad \ngood \n"
    assert captured.err == "error: cannot\n"


def test_ctrl_c_stops_the_answer_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    is_closed: list[bool] = []

    def reply(messages: Sequence[dict[str, str]]) -> Generator[str]:
        asked.append([message["content"] for message in messages])
        try:
            yield "half"
            if len(asked) == 1:
                raise KeyboardInterrupt
            yield " and half"
        finally:
            is_closed.append(True)

    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    chat.talk(reply, system=None)
    assert asked == [["a"], ["a", "half", "b"]]
    assert is_closed == [True, True]
    assert capsys.readouterr().out == "half\nhalf and half\n"


class ChatServer(BaseHTTPRequestHandler):
    """A server that names one model and streams two pieces, or an error for the user text 'bad'."""

    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._start(200 if self.path == "/v1/models" else 404)
        self.wfile.write(b'{"data": [{"id": "served"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        ChatServer.bodies.append(body)
        self._start(400 if body["messages"][-1]["content"] == "bad" else 200)
        thoughts = [{"reasoning_content": piece} for piece in ("h", "m")] if self._is_thoughtful(body) else []
        for delta in (*thoughts, {"content": ""}, {"content": "Hel"}, {"content": "lo"}):
            self.wfile.write(b"data: %s\n\n" % json.dumps({"choices": [{"delta": delta}]}).encode())
        self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    @staticmethod
    def _is_thoughtful(body: dict[str, Any]) -> bool:
        return bool(body["messages"][-1]["content"] == "think")

    def _start(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def chat_server() -> Iterator[str]:
    ChatServer.bodies = []
    with ThreadingHTTPServer(("127.0.0.1", 0), ChatServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_chat_with_a_server(
    chat_server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nbad\nyo\n"))
    assert run_cli("chat", "--url", chat_server, "--temperature", "0.5") == 1, "a line was not answered"
    captured = capsys.readouterr()
    assert captured.out == "Hello\nHello\n"
    assert "HTTP 400" in captured.err
    assert [message["content"] for message in ChatServer.bodies[-1]["messages"]] == ["hi", "Hello", "yo"]
    sent = {name: value for name, value in ChatServer.bodies[0].items() if name != "messages"}
    assert sent == {"model": "served", "temperature": 0.5, "stream": True}


def test_reasoning_is_printed_and_no_part_of_the_conversation(
    chat_server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("think\nyo\n"))
    assert run_cli("chat", "--url", chat_server) == 0
    assert capsys.readouterr().out == "hm\n\nHello\nHello\n"
    assert [message["content"] for message in ChatServer.bodies[-1]["messages"]] == ["think", "Hello", "yo"]


@pytest.mark.parametrize("end", ["", "/"])
def test_chat_finds_the_api_below_a_server(chat_server: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert run_cli("chat", "--url", chat_server.removesuffix("/v1") + end) == 0
    assert ChatServer.bodies[0]["model"] == "served"


def test_chat_says_what_is_meant_where_there_is_no_api(chat_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("chat", "--url", f"{chat_server.removesuffix('/v1')}/nowhere") == 1
    assert "neither there nor below /v1" in capsys.readouterr().err
    assert run_cli("chat", "--url", "127.0.0.1:8000") == 1
    assert "give it as http://HOST:PORT/v1" in capsys.readouterr().err


def test_chat_sends_variables_to_a_server(chat_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert run_cli("chat", "--url", chat_server, "--chat-template-kwargs", '{"enable_thinking": false}') == 0
    assert ChatServer.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_chat_without_a_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("chat", "--url", "http://127.0.0.1:9/v1") == 1
    assert "no model to talk to at http://127.0.0.1:9/v1/" in capsys.readouterr().err


# --- env -----------------------------------------------------------------------------------------------------------


def test_env_describes_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("env", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["software"]["nanoflow"] == nanoflow.__version__
    assert document["software"]["packages"]["torch"]
    assert document["machine"]["num_cores"] >= 1 and document["machine"]["memory_bytes"] > 2**28
    assert run_cli("env") == 0
    assert document["machine"]["cpu_name"] in capsys.readouterr().out


def test_gpu_lines_of_the_driver() -> None:
    gpu = _parse_gpu("NVIDIA H200, 143771, 570.86.15, 700.00")
    assert (gpu.name, gpu.memory_bytes, gpu.driver_version) == ("NVIDIA H200", 143771 * 2**20, "570.86.15")
    assert gpu.power_limit_w == 700.0
    assert _parse_gpu("Some, [N/A], 1.2, [N/A]").power_limit_w is None
