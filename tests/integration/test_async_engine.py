"""`AsyncEngine`: many callers, an engine in its own process, and everything that can end either of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nanoflow.config import EngineConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.errors import EngineDeadError, EngineError
from nanoflow.outputs import FinishReason, RequestOutput
from nanoflow.request import SamplingParams
from tests.error_chain import is_shown_alone
from tests.fake_engine import CRASHING, FAILING, REFUSED, SLOW
from tests.toy_models import ENGINE_OPTIONS, write_toy_model
from tests.toy_tokenizers import panicking_backend, write_tokenizer

FAKE = "tests.fake_engine_process"
# With the slow fake engine four seconds: whoever ends earlier was ended.
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_model(tmp_path_factory.mktemp("model")))


@asynccontextmanager
async def fake_engine(model: str) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(EngineConfig(model=model), module=FAKE)
    try:
        yield engine
    finally:
        await engine.close()


def with_engine(model: str, body: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Run a test's body with a fake engine."""

    async def run() -> None:
        async with fake_engine(model) as engine:
            await body(engine)

    asyncio.run(run())


async def last(engine: AsyncEngine, prompt: Any, params: SamplingParams, name: str | None = None) -> RequestOutput:
    """The finished output."""
    *_, output = [output async for output in engine.generate(prompt, params, name)]
    assert output.finished
    return output


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until it is so."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        await asyncio.sleep(0.02)


def test_outputs_grow_and_end(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        seen = [
            (len(output.outputs[0].token_ids), output.finished)
            async for output in engine.generate("hello world", SamplingParams(max_tokens=20))
        ]
        assert [done for _, done in seen] == [False] * (len(seen) - 1) + [True]
        assert [count for count, _ in seen] == sorted(count for count, _ in seen) and seen[-1][0] == 20

    with_engine(model, body)


def test_many_requests_at_once_get_each_its_own(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        texts = [f"hello {number}!" for number in range(100)]
        outputs = await asyncio.gather(*(last(engine, text, SamplingParams(max_tokens=40)) for text in texts))
        for text, output in zip(texts, outputs, strict=True):
            assert output.outputs[0].text.startswith(text[: len(output.outputs[0].text)])

    with_engine(model, body)


def test_long_texts_are_encoded_beside_the_event_loop(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; at most 255 fit"):
            await last(engine, "hello world " * 20_000, LONG)

    with_engine(model, body)


def test_a_slow_reader_misses_nothing(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        counts = []
        async for output in engine.generate([SLOW, 5], SamplingParams(max_tokens=30)):
            counts.append(len(output.outputs[0].token_ids))
            await asyncio.sleep(0.1)
        assert counts[-1] == 30 and len(counts) < 20

    with_engine(model, body)


def test_closing_and_cancelling_free_the_engine(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with aclosing(engine.generate([SLOW], LONG, "a")) as outputs:
            await anext(outputs)
        task = asyncio.create_task(last(engine, [SLOW], LONG, "b"))
        await until(lambda: engine.stats.num_running == 1)
        task.cancel()
        await until(lambda: engine.stats.num_running == 0, timeout_s=2.0)
        assert (await last(engine, "hello", SamplingParams(), "a")).finished

    with_engine(model, body)


def test_abort_ends_a_request_for_its_reader(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        task = asyncio.create_task(last(engine, [SLOW], LONG, "a"))
        await until(lambda: engine.stats.num_running == 1)
        await engine.abort("a")
        assert (await task).outputs[0].finish_reason is FinishReason.ABORT
        await engine.abort("unknown")
        await until(lambda: engine.stats.num_running == 0, timeout_s=2.0)

    with_engine(model, body)


def test_stop_strings_free_the_engine(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        ids = [SLOW, *engine.tokenizer.encode("hello")]
        output = await last(engine, ids, SamplingParams(max_tokens=200, stop="lo"))
        assert output.outputs[0].text == "hel"
        await until(lambda: engine.stats.num_running == 0, timeout_s=2.0)

    with_engine(model, body)


def test_bad_requests_are_refused_and_leave_the_others(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        running = asyncio.create_task(last(engine, [SLOW, 5], SamplingParams(max_tokens=30), "a"))
        await until(lambda: engine.stats.num_running == 1)
        with pytest.raises(ValueError, match="'a' is already there"):
            await last(engine, "hello", LONG, "a")
        with pytest.raises(ValueError, match="the prompt is empty"):
            await last(engine, "", LONG)
        refused = await last(engine, [REFUSED], LONG)
        assert refused.error == "the fake engine refuses this prompt"
        assert refused.outputs[0].finish_reason is FinishReason.ERROR
        failed = await last(engine, [FAILING], LONG)
        assert failed.error == "the fake engine failed here" and len(failed.outputs[0].token_ids) == 2
        assert (await running).outputs[0].finish_reason is FinishReason.LENGTH

    with_engine(model, body)


def test_tokens_that_cannot_become_text_end_their_request_alone(tmp_path: Path) -> None:
    folder = str(write_toy_model(tmp_path))
    write_tokenizer(tmp_path, panicking_backend())

    async def body(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        # Its first token is the first that cannot be decoded.
        bad, good = await asyncio.gather(last(engine, [1, *[2] * 6], params), last(engine, [2, SLOW], LONG))
        assert bad.outputs[0].finish_reason is FinishReason.ERROR and "cannot decode" in (bad.error or "")
        assert good.outputs[0].finish_reason is FinishReason.LENGTH
        await until(lambda: engine.stats.num_running == 0)

    with_engine(folder, body)


def test_heartbeats_come_from_an_idle_engine(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        await asyncio.sleep(1.5)
        assert engine.heartbeat_age_s < 1.3
        assert engine.stats.num_running == 0

    with_engine(model, body)


def test_a_crash_ends_all_requests_with_its_reason(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def body(engine: AsyncEngine) -> None:
        running = asyncio.create_task(last(engine, [SLOW], LONG))
        await until(lambda: engine.stats.num_running == 1)
        with pytest.raises(EngineDeadError, match=r"^RuntimeError: the fake engine crashes$"):
            await last(engine, [CRASHING], LONG)
        with pytest.raises(EngineDeadError, match="crashes"):
            await running
        with pytest.raises(EngineDeadError, match="crashes"):
            await last(engine, "hello", LONG)
        assert not engine.is_alive
        await engine.abort("unknown")

    with_engine(model, body)
    assert "Traceback" in capfd.readouterr().err


def test_a_killed_process_ends_all_requests_at_once(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        running = asyncio.create_task(last(engine, [SLOW], LONG))
        await until(lambda: engine.stats.num_running == 1)
        assert engine._child is not None
        os.kill(engine._child.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="was ended by SIGKILL"):
            await asyncio.wait_for(running, 2.0)
        assert not engine.is_alive

    with_engine(model, body)


def test_close_ends_the_process_and_leaves_no_file(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def run() -> None:
        before = set(Path("/proc/self/fd").iterdir())
        async with fake_engine(model) as engine:
            child = engine._child
            assert child is not None
            assert list(tmp_path.iterdir()) == [], "nothing is there to be left"
            running = asyncio.create_task(last(engine, [SLOW], LONG))
            await until(lambda: engine.stats.num_running == 1)
        with pytest.raises(EngineDeadError, match="closed"):
            await running
        with pytest.raises(EngineDeadError, match="closed"):
            await last(engine, "hello", LONG)
        assert child._process.returncode == 0 and list(tmp_path.iterdir()) == []
        await engine.close()
        assert set(Path("/proc/self/fd").iterdir()) == before

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_one_line(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(model).parent / "broken"
    folder.symlink_to(model)
    with pytest.raises(EngineError, match=r"^this model is broken$"):
        asyncio.run(AsyncEngine.start(EngineConfig(model=str(folder)), module=FAKE))
    with pytest.raises(EngineError, match="nowhere") as problem:
        asyncio.run(AsyncEngine.start(EngineConfig(model="/nowhere"), module=FAKE))
    assert is_shown_alone(problem.value)
    with pytest.raises(EngineError, match="ended with status 1"):
        asyncio.run(AsyncEngine.start(EngineConfig(model=model), module="tests.no_such_module"))
    assert "Traceback" not in capfd.readouterr().err


def test_the_process_ends_when_its_parent_is_killed(model: str, tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from nanoflow import AsyncEngine, EngineConfig\n"
        "async def main():\n"
        f"    engine = await AsyncEngine.start(EngineConfig(model={model!r}), module={FAKE!r})\n"
        "    print(engine._child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        parent.kill()
    asyncio.run(until(lambda: not _is_running(child_pid)))
    assert list(tmp_path.iterdir()) == []


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_real_engine_gives_what_it_gives_in_process(model: str) -> None:
    from nanoflow import LLM

    params = SamplingParams(max_tokens=24, seed=3, n=2, logprobs=1, ignore_eos=True)
    prompts = [f"hello {number}" for number in range(8)]
    with LLM(model, **ENGINE_OPTIONS) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)

    async def run() -> None:
        engine = await AsyncEngine.start(EngineConfig(model=model, **ENGINE_OPTIONS))
        try:
            assert engine.facts.max_model_len == 256
            outputs = await asyncio.gather(*(last(engine, prompt, params) for prompt in prompts))
            for output, reference in zip(outputs, expected, strict=True):
                assert [one.text for one in output.outputs] == [one.text for one in reference.outputs]
            await until(lambda: engine.stats.num_running == engine.stats.pages_in_use == 0)
        finally:
            await engine.close()

    asyncio.run(run())


def test_advice_is_answered_while_requests_run(model: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        running = asyncio.ensure_future(last(engine, [SLOW, 5], LONG))
        found = await engine.prefetch([5, 6, 7, 8])
        assert (found.num_tokens, found.num_cached_tokens) == (4, 2)
        assert await engine.prefetch_session("other") is None
        session = await engine.prefetch_session("12")
        assert session is not None and session.num_tokens == 12
        assert not running.done()
        crashing = asyncio.ensure_future(last(engine, [CRASHING], LONG))
        while engine.is_alive:
            await asyncio.sleep(0.01)
        for asked in (engine.prefetch([5]), engine.prefetch_session("12")):
            with pytest.raises(EngineDeadError, match="crashes"):
                await asked
        await asyncio.gather(running, crashing, return_exceptions=True)

    with_engine(model, body)
