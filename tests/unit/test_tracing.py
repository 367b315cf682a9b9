"""Spans of requests: what they hold, how they end, whose trace they continue, and what is said where packages lack."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.testclient import TestClient

from nanoflow.config import ConfigError, ServerConfig
from nanoflow.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server import tracing
from nanoflow.server.app import create_app
from nanoflow.server.backend import EnginePrompt
from nanoflow.server.tracing import Tracing, check_tracing, traces_url
from tests.fake_async_engine import FakeAsyncEngine

CONFIG = ServerConfig(served_model_name="toy", otlp_traces_endpoint="http://127.0.0.1:4318")
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
MESSAGES = [{"role": "user", "content": "hi"}]


class TimedEngine(FakeAsyncEngine):
    """Its outputs have times: 1 s in the queue, 2 s to the first token after that, 4 s to the last one."""

    async def generate(
        self, prompt: EnginePrompt, params: SamplingParams, request_id: str | None = None, *, streams: bool = True
    ) -> AsyncGenerator[RequestOutput, None]:
        start_s = time.monotonic()
        async for output in super().generate(prompt, params, request_id, streams=streams):
            output.metrics = RequestMetrics(
                arrival_s=start_s,
                first_scheduled_s=start_s + 1,
                first_token_s=start_s + 3,
                last_token_s=start_s + 7,
                num_preemptions=2,
            )
            yield output


class Spans:
    """What OpenTelemetry's provider, tracer and span are for this server, in one object that remembers."""

    def __init__(self) -> None:
        self.ended: list[Spans] = []
        self.attributes: dict[str, Any] = {}
        self.events: list[tuple[str, int]] = []
        self.status: Any = None
        self.name = ""
        self.start_time = 0
        self.context: Any = None

    def get_tracer(self, _name: str, _version: str) -> Spans:
        return self

    def start_span(self, name: str, *, context: Any, kind: Any, attributes: Any, start_time: int) -> Spans:
        span = Spans()
        span.ended, span.name, span.attributes, span.context = self.ended, name, dict(attributes), context
        span.start_time = start_time
        assert kind.name == "SERVER"
        return span

    def set_attribute(self, name: str, value: Any) -> None:
        self.attributes[name] = value

    def set_attributes(self, values: dict[str, Any]) -> None:
        self.attributes |= values

    def add_event(self, name: str, timestamp: int) -> None:
        self.events.append((name, timestamp))

    def set_status(self, status: Any) -> None:
        self.status = status

    def end(self) -> None:
        self.ended.append(self)

    def shutdown(self) -> None:
        self.attributes["closed"] = True


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    made = Spans()
    monkeypatch.setattr(Tracing, "of", staticmethod(lambda _config: Tracing(made)))
    return made


@pytest.fixture
def http(spans: Spans) -> Any:
    return TestClient(create_app(TimedEngine(), CONFIG), base_url="http://127.0.0.1")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_span(http: Any, spans: Spans, stream: bool) -> None:
    before_ns = time.time_ns()
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0.5, "seed": 3, "stream": stream}
    answer = http.post("/v1/chat/completions", json=body, headers=PARENT)
    assert answer.status_code == 200, answer.text
    (span,) = spans.ended
    assert span.name == "chat toy" and before_ns <= span.start_time <= time.time_ns() and span.status is None
    found = span.attributes
    assert found["gen_ai.operation.name"] == "chat" and found["gen_ai.response.id"].startswith("chatcmpl-")
    assert found["gen_ai.response.id"] in answer.text
    wanted = {"temperature": 0.5, "max_tokens": 5, "seed": 3, "top_p": 1.0}
    assert {name: found[f"gen_ai.request.{name}"] for name in wanted} == wanted
    assert (found["gen_ai.usage.output_tokens"], found["gen_ai.response.finish_reasons"]) == (5, ["length"])
    assert found["gen_ai.usage.input_tokens"] == len("user: hi\nassistant: ") + 1, "and a special token"
    times = {name.rpartition(".")[2]: value for name, value in found.items() if ".latency." in name}
    assert times == pytest.approx(
        {
            "time_in_queue": 1,
            "time_in_model_prefill": 2,
            "time_in_model_decode": 4,
            "time_in_model_inference": 6,
            "time_to_first_token": 3,
            "e2e": 7,
        }
    )
    assert [name for name, _ in span.events] == ["admitted", "first token", "last token"]
    assert span.events[1][1] - span.events[0][1] == pytest.approx(2e9, abs=1e6)
    assert abs(span.events[0][1] - span.start_time - 1e9) < 1e9, "on the clock of the span"
    assert found["nanoflow.num_preemptions"] == 2


def test_a_span_continues_the_trace_of_its_caller(http: Any, spans: Spans) -> None:
    from opentelemetry.trace import get_current_span

    for headers in (PARENT, {}, {"traceparent": "nonsense"}):
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
    parents = [get_current_span(span.context).get_span_context() for span in spans.ended]
    assert f"{parents[0].trace_id:032x} {parents[0].span_id:016x}" == f"{TRACE_ID} {PARENT_ID}"
    assert not parents[1].is_valid and not parents[2].is_valid


def test_several_prompts_are_one_span(http: Any, spans: Spans) -> None:
    http.post("/v1/completions", json={"prompt": ["a", "bb"], "n": 2, "max_tokens": 3})
    (span,) = spans.ended
    assert span.name == "text_completion toy" and span.attributes["gen_ai.request.choice.count"] == 2
    assert span.attributes["gen_ai.usage.output_tokens"] == 12
    assert span.attributes["gen_ai.response.finish_reasons"] == ["length"] * 4


def test_a_vector_has_no_tokens_of_text(spans: Spans) -> None:
    trace = Tracing(spans).request("embeddings", {}, model="toy", params=SamplingParams(), call_id="x")
    output = RequestOutput(
        request_id="", prompt=None, prompt_token_ids=[1, 2], outputs=[CompletionOutput(index=0, token_ids=[3])]
    )
    with trace.followed() as see:
        see(0, output)
    found = spans.ended[0].attributes
    assert found["gen_ai.usage.input_tokens"] == 2 and spans.ended[0].name == "embeddings toy"
    assert not {name for name in found if "output_tokens" in name or "finish" in name or "request.temp" in name}


def test_a_failed_request_says_why(http: Any, spans: Spans) -> None:
    for prompt in ("fail", "a" * 300):
        http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3})
    failed, long = spans.ended
    assert failed.attributes["error.type"] == "500" and failed.status.status_code.name == "ERROR"
    assert long.attributes["error.type"] == "context_length_exceeded" and "maximum context" in long.status.description
    assert "gen_ai.usage.input_tokens" not in long.attributes


def test_a_request_that_was_given_up_is_no_success(spans: Spans) -> None:
    trace = Tracing(spans).request("chat", {}, model="toy", params=SamplingParams(), call_id="x")
    with pytest.raises(GeneratorExit), trace.followed():
        raise GeneratorExit
    assert spans.ended[0].attributes["error.type"] == "cancelled"


def test_nothing_is_traced_without_an_endpoint() -> None:
    config = dataclasses.replace(CONFIG, otlp_traces_endpoint=None)
    check_tracing(config, {tracing.PROTOCOL_VARIABLES[0]: "anything"})
    assert Tracing.of(config) is None


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"^otlp_traces_endpoint needs .*: pip install 'nanoflow-engine\[otel\]'$"):
        check_tracing(CONFIG, {})
    with pytest.raises(ConfigError, match="pip install 'opentelemetry-exporter-otlp-proto-grpc'"):
        check_tracing(CONFIG, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL must be one of http/protobuf, grpc, got 'json'"):
        check_tracing(CONFIG, {"OTEL_EXPORTER_OTLP_PROTOCOL": "json"})
    monkeypatch.setattr(tracing, "find_spec", lambda name: name)
    check_tracing(CONFIG, {})


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "ftp://host", "http://", "grpc://host:4317", ""])
def test_an_endpoint_is_an_address(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be an address such as"):
        ServerConfig(otlp_traces_endpoint=url)


def test_an_address_without_a_path_gets_that_of_traces() -> None:
    assert traces_url("http://host:4318") == traces_url("http://host:4318/") == "http://host:4318/v1/traces"
    assert traces_url("https://host/otlp/v1/traces?a=b") == "https://host/otlp/v1/traces?a=b"


def test_spans_of_the_real_package() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    made = Tracing(provider)
    trace = made.request("chat", PARENT, model="toy", params=SamplingParams(stop=["x"]), call_id="c")
    with trace.followed() as see:
        metrics = RequestMetrics(arrival_s=time.monotonic())
        see(0, RequestOutput(request_id="", prompt=None, prompt_token_ids=[1], outputs=[], metrics=metrics))
    (span,) = memory.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE_ID and f"{span.parent.span_id:016x}" == PARENT_ID
    assert (
        span.attributes["gen_ai.request.stop_sequences"] == ("x",) and span.attributes["gen_ai.usage.input_tokens"] == 1
    )
    assert span.end_time >= span.start_time and span.status.is_unset
    made.close()
