"""Whatever values parameters have: Python and HTTP take or refuse them alike, and the engine goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.outputs import RequestOutput
from nanoflow.request import KINDS, RequestError, SamplingParams
from nanoflow.server.app import create_app
from tests.toy_models import ENGINE_OPTIONS, VOCAB_SIZE, write_toy_model

PROMPT = [5, 6, 7, 8]
GOOD = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
# What HTTP has under another meaning, or not at all.
# Of a prompt's tokens the server decides itself, with a side to cut off.
ONLY_PYTHON = {"detokenize", "output_kind", "pooling", "truncate_prompt_tokens"}


class Doors:
    """One engine with its two doors, in an event loop of its own."""

    def __init__(self, model: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = self.loop.run_until_complete(AsyncEngine.start(EngineConfig(model=model, **ENGINE_OPTIONS)))
        app = create_app(self.engine, ServerConfig())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")
        self.right = self.good().outputs[0].token_ids

    def python(self, fields: dict[str, Any]) -> list[list[int]] | str:
        """Token ids of each completion, or the refusal."""
        try:
            output = self._last(SamplingParams(**{"max_tokens": 3, **fields}))
        except RequestError as error:
            return str(error)
        assert output.error is None, output.error
        return [one.token_ids for one in output.outputs]

    def over_http(self, fields: dict[str, Any]) -> list[int] | str:
        """Number of tokens and of completions, or the refusal."""
        content = json.dumps({"prompt": PROMPT, "max_tokens": 3, **fields}).encode()
        headers = {"content-type": "application/json"}
        post = self.http.post("/v1/completions", content=content, headers=headers)
        answer = self.loop.run_until_complete(post)
        if answer.status_code == 400:
            message: str = answer.json()["error"]["message"]
            return message
        assert answer.status_code == 200, answer.text
        return [answer.json()["usage"]["completion_tokens"], len(answer.json()["choices"])]

    def text(self, fields: dict[str, Any]) -> str:
        """The text over HTTP."""
        post = self.http.post("/v1/completions", json={"prompt": PROMPT, **fields})
        text: str = self.loop.run_until_complete(post).json()["choices"][0]["text"]
        return text

    def good(self) -> RequestOutput:
        return self._last(GOOD)

    def metrics(self) -> str:
        return self.loop.run_until_complete(self.http.get("/metrics")).text

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()

    def _last(self, params: SamplingParams) -> RequestOutput:
        async def read() -> RequestOutput:
            *_, output = [one async for one in self.engine.generate(PROMPT, params)]
            return output

        return self.loop.run_until_complete(asyncio.wait_for(read(), 30))


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    made = Doors(str(write_toy_model(tmp_path_factory.mktemp("model"))))
    yield made
    made.close()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 25),
    st.integers(),
    st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400]),
    st.floats(-3, 3),
    st.floats(),
    st.sampled_from([5e-324, 1e-6, 0.01, 1.0, 100.0, 1e308]),
    st.text(max_size=4),
)
LISTS = st.one_of(
    st.lists(SCALARS, max_size=4),
    st.lists(st.integers(-1, VOCAB_SIZE + 1), max_size=6),
    st.lists(st.text(max_size=3), max_size=4),
    st.lists(st.sampled_from(["he", "o", " w", "x" * 40]), max_size=4),
    st.dictionaries(st.integers(-1, VOCAB_SIZE + 1).map(str) | st.text(max_size=3), SCALARS, max_size=3),
    st.dictionaries(st.integers(0, VOCAB_SIZE - 1).map(str), st.floats(-100, 100), max_size=3),
    st.just(list(range(VOCAB_SIZE))),
)
LIST_FIELDS = {"stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logit_bias"}


def _values(name: str) -> st.SearchStrategy[Any]:
    return LISTS | SCALARS if name in LIST_FIELDS else SCALARS | LISTS


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(set(KINDS) - ONLY_PYTHON)), min_size=1, max_size=3, unique=True))
    return {name: draw(_values(name)) for name in names}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(fields=parameters())
def test_both_doors_take_and_refuse_the_same(doors: Doors, fields: dict[str, Any]) -> None:
    # What null means differs for one parameter alone, and echo takes a 0.
    given = {name: value for name, value in fields.items() if name != "max_tokens" or value not in (None, 0)}
    python, over_http = doors.python(given), doors.over_http(given)
    assert isinstance(python, str) == isinstance(over_http, str), (python, over_http)
    if not isinstance(python, str):
        if "seed" in given and given["seed"] is not None:
            assert over_http == [sum(map(len, python)), len(python)]
        assert len(python) == over_http[1]
    assert doors.good().outputs[0].token_ids == doors.right


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2.5},
        {"top_k": np.float64(2.5)},
        {"n": True},
        {"seed": 2**64},
        {"stop_token_ids": "ab"},
        {"stop_token_ids": [2**70]},
        {"logit_bias": {"x": 1.0}},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
        {"allowed_token_ids": [VOCAB_SIZE]},
        {"allowed_token_ids": [-1]},
        {"detokenize": 1},
        {"skip_special_tokens": "no"},
        {"bad_words": "abc"},
        {"bad_words": ["x" * 500]},
        {"max_tokens": 2**40},
    ],
)
def test_what_python_refuses_ends_nothing(doors: Doors, fields: dict[str, Any]) -> None:
    assert isinstance(doors.python(fields), str)
    assert doors.good().outputs[0].token_ids == doors.right


@pytest.mark.parametrize(
    "fields",
    [
        {"n": np.int64(2), "temperature": np.float32(0.5), "top_k": np.uint8(3), "seed": np.int32(7)},
        {"logit_bias": {np.int64(3): np.float16(2.0)}, "stop_token_ids": np.array([1, 2])},
        {"ignore_eos": np.bool_(True), "allowed_token_ids": range(VOCAB_SIZE), "min_tokens": np.int16(2)},
        {"top_p": 0, "top_k": 2**63 - 1, "seed": 2**64 - 1, "repetition_penalty": 0.01},
        {"temperature": 5e-324, "min_p": 1, "frequency_penalty": -2, "seed": -(2**63)},
    ],
)
def test_what_python_takes_the_engine_serves(doors: Doors, fields: dict[str, Any]) -> None:
    assert isinstance(doors.python(fields), list)
    assert doors.good().outputs[0].token_ids == doors.right


@pytest.mark.parametrize("name", ["top_k", "seed", "stop_token_ids", "logit_bias", "allowed_token_ids", "temperature"])
def test_what_slips_past_the_doors_ends_its_request_alone(doors: Doors, name: str) -> None:
    """As if a door had a hole: the engine itself ends the one request."""
    params = SamplingParams(max_tokens=4)
    object.__setattr__(params, name, {"what": "ever"})
    try:
        output = doors._last(params)
    except Exception as error:  # the front end may stumble over it, and then the caller alone is told
        assert "dead" not in type(error).__name__.lower()
    else:
        assert output.error is not None and output.outputs[0].finish_reason == "error"
    assert doors.good().outputs[0].token_ids == doors.right


class Broken:
    """A detokenizer that fails from its third call on."""

    def __init__(self) -> None:
        self.num_calls = 0

    def push(self, _token_ids: Sequence[int]) -> str:
        self.num_calls += 1
        if self.num_calls > 2:
            raise LookupError("no such piece")
        return "x"

    def flush(self) -> str:
        raise LookupError("no such piece")


@pytest.mark.parametrize("more", [{}, {"stop": "zz"}, {"n": 2}])
@pytest.mark.parametrize("is_stream", [False, True])
def test_text_that_cannot_be_made_is_a_500_and_no_more(
    doors: Doors, monkeypatch: pytest.MonkeyPatch, is_stream: bool, more: dict[str, Any]
) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": is_stream, **more}
    with monkeypatch.context() as patch:
        patch.setattr("nanoflow.engine.output.make_detokenizer", lambda *_: Broken())
        answer = doors.loop.run_until_complete(doors.http.post("/v1/completions", json=fields))
    # A stream whose first tokens fail before they were read has not begun yet.
    assert answer.status_code in ((200, 500) if is_stream else (500,))
    error = json.loads(answer.text.split("data: ")[-2]) if answer.status_code == 200 else answer.json()
    assert error["error"]["message"] == (
        "the request failed: its answer could not be made of its tokens; the log says why"
    )
    assert doors.good().outputs[0].token_ids == doors.right
    doors.loop.run_until_complete(_idle(doors.engine))


async def _idle(engine: AsyncEngine) -> None:
    """Wait until the engine has nothing left, also of what failed here."""
    for _ in range(200):
        if engine.stats.num_running == engine.stats.num_waiting == engine.stats.pages_in_use == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the engine still computes")


def test_top_p_0_is_greedy(doors: Doors) -> None:
    greedy = doors.python({"temperature": 0.0, "max_tokens": 9})
    assert doors.python({"temperature": 2.0, "top_p": 0, "max_tokens": 9, "seed": 3}) == greedy


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": list(range(40, 90))},
        {"allowed_token_ids": list(range(40, 90)), "bad_words": ["A", "BC", "D E"], "frequency_penalty": -1},
        {"bad_words": ["a", "b", "c"], "logit_bias": {"70": 5}},
    ],
)
def test_both_doors_give_the_same_answer(doors: Doors, fields: dict[str, Any]) -> None:
    fields = {"seed": 3, "max_tokens": 30, "ignore_eos": True, **fields}
    answers = doors.python(fields)
    assert not isinstance(answers, str), answers
    (token_ids,) = answers
    assert set(token_ids) <= set(fields.get("allowed_token_ids", range(VOCAB_SIZE)))
    text = doors.text(fields)
    assert text == doors.engine.tokenizer.decode(token_ids)
    assert not any(word in text for word in fields.get("bad_words", ()))


def test_tokens_are_counted_exactly(doors: Doors) -> None:
    def counted(name: str) -> float:
        lines = [line for line in doors.metrics().splitlines() if line.startswith(f"nanoflow:{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def cut_short() -> int:
        """Leave after a few tokens of each of eight completions."""
        async for output in doors.engine.generate(
            PROMPT * 10, SamplingParams(n=8, max_tokens=200, ignore_eos=True), "x"
        ):
            if len(output.outputs[0].token_ids) >= 3:
                await doors.engine.abort("x")
            if output.finished:
                return sum(len(one.token_ids) for one in output.outputs)
        raise AssertionError

    before, prompts_before = counted("generation_tokens_total"), counted("prompt_tokens_total")
    made = doors.loop.run_until_complete(cut_short())
    for fields in ({"n": 3, "seed": 1}, {"stop": ["e", "a"]}, {"echo": True, "logprobs": 1, "max_tokens": 2}):
        answer = doors.over_http({"max_tokens": 30, **fields})
        assert isinstance(answer, list)
        made += answer[0]
    assert counted("generation_tokens_total") - before == made
    assert counted("prompt_tokens_total") - prompts_before == 13 * len(PROMPT)
