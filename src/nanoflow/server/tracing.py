"""A span of each request for OpenTelemetry, sent to a collector (`--otlp-traces-endpoint`).

Names of attributes are those of OpenTelemetry's conventions for generative AI (`gen_ai.*`); the times that these do not
name (`gen_ai.latency.*`) have vLLM's names. A request that carries a `traceparent` header continues that trace. The
packages are those of the extra `otel`; without the option nothing of them is imported.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import nanoflow
from nanoflow.config import ConfigError, ServerConfig
from nanoflow.outputs import RequestMetrics, RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.server.errors import ApiError

Operation = Literal["chat", "text_completion", "embeddings"]
See = Callable[[int, RequestOutput], None]

PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP, GRPC = "http/protobuf", "grpc"
# How a collector is spoken to: the module of the exporter, and the package that has it.
_EXPORTERS = {
    HTTP: ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "nanoflow-engine[otel]"),
    GRPC: ("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "opentelemetry-exporter-otlp-proto-grpc"),
}
_TRACES_PATH = "/v1/traces"
_CLOSE_TIMEOUT_S = 3.0
_NS = 1_000_000_000


def check_tracing(config: ServerConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Check, before anything is loaded, that spans can be sent if they are asked for.

    Raises:
        ConfigError: A package is missing, or the protocol in the environment is unknown.
    """
    if config.otlp_traces_endpoint is None:
        return
    module, package = _EXPORTERS[_protocol(environment)]
    if not all(_is_there(name) for name in ("opentelemetry.sdk.trace", module)):
        raise ConfigError(f"otlp_traces_endpoint needs a package that is not installed: pip install '{package}'")


def _protocol(environment: Mapping[str, str]) -> str:
    name, protocol = next(
        ((name, environment[name]) for name in PROTOCOL_VARIABLES if environment.get(name)), ("", HTTP)
    )
    if protocol not in _EXPORTERS:
        raise ConfigError(f"{name} must be one of {', '.join(_EXPORTERS)}, got {protocol!r}")
    return protocol


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False


class Tracing:
    """Makes spans.

    Args:
        provider: OpenTelemetry's `TracerProvider`, or what tests have in its place.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nanoflow", nanoflow.__version__)

    @staticmethod
    def of(config: ServerConfig) -> Tracing | None:
        """What sends spans to the collector of these options; None if there is none. `check_tracing` has passed."""
        if config.otlp_traces_endpoint is None:
            return None
        from importlib import import_module

        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        protocol = _protocol(os.environ)
        exporter = import_module(_EXPORTERS[protocol][0]).OTLPSpanExporter
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "nanoflow")})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        endpoint = traces_url(config.otlp_traces_endpoint) if protocol == HTTP else config.otlp_traces_endpoint
        provider.add_span_processor(BatchSpanProcessor(exporter(endpoint=endpoint)))
        return Tracing(provider)

    def request(
        self, operation: Operation, headers: Mapping[str, str], *, model: str, params: SamplingParams, call_id: str
    ) -> RequestTrace:
        """The trace of a request that arrives now; its span begins now, and exists once it is followed."""
        return RequestTrace(
            tracer=self._tracer,
            name=f"{operation} {model}",
            has_text=operation != "embeddings",
            carrier={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "nanoflow",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": call_id,
                **(_parameters(params) if operation != "embeddings" else {}),
            },
        )

    def close(self) -> None:
        """Send what is left, for a few seconds at most: a collector that does not answer must not keep the server."""
        thread = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        thread.start()
        thread.join(_CLOSE_TIMEOUT_S)


def traces_url(endpoint: str) -> str:
    """The address of a collector for OTLP over HTTP: an address without a path gets that of traces."""
    parts = urlsplit(endpoint)
    return endpoint if parts.path not in ("", "/") else urlunsplit(parts._replace(path=_TRACES_PATH))


def _parameters(params: SamplingParams) -> dict[str, Any]:
    """What was asked for; parameters that were not given are left out."""
    found = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.choice.count": params.n if params.n != 1 else None,
        "gen_ai.request.stop_sequences": list(params.stop or ()) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """The trace of one request.

    Attributes:
        tracer: Makes the span.
        name, attributes: Of the span, as far as they are known when it begins.
        has_text: The answer is text; a vector has no tokens that were generated, and does not end in one way or other.
        carrier: Headers that name the trace that it belongs to.
        start_ns: When the request arrived, in nanoseconds since 1970.
    """

    tracer: Any
    name: str
    has_text: bool
    carrier: Mapping[str, str]
    attributes: Mapping[str, Any]
    start_ns: int = field(default_factory=time.time_ns)

    @contextlib.contextmanager
    def followed(self) -> Iterator[See]:
        """Make the span around a block, which tells it of every output by the index of its prompt."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(self.carrier))
        span = self.tracer.start_span(
            self.name, context=parent, kind=SpanKind.SERVER, attributes=dict(self.attributes), start_time=self.start_ns
        )
        outputs: dict[int, RequestOutput] = {}
        try:
            yield outputs.__setitem__
        except BaseException as problem:
            _fail(span, problem)
            raise
        finally:
            _tell(span, [outputs[index] for index in sorted(outputs)], has_text=self.has_text)
            span.end()


def _fail(span: Any, problem: BaseException) -> None:
    """Mark a span as failed. The client's leaving ends the block by cancelling it, or by closing its generator."""
    from opentelemetry.trace import Status, StatusCode

    if isinstance(problem, ApiError):
        kind, text = problem.code or str(problem.status), problem.message
    elif isinstance(problem, Exception):
        kind, text = type(problem).__name__, ""
    else:
        kind, text = "cancelled", "the client has left, or the call was given up"
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, text or None))


def _tell(span: Any, outputs: Sequence[RequestOutput], *, has_text: bool) -> None:
    """Add what is known at the end: tokens, how completions ended, and times."""
    if not outputs:
        return
    completions = [completion for output in outputs for completion in output.outputs if has_text]
    reasons = [completion.finish_reason.value for completion in completions if completion.finish_reason is not None]
    span.set_attributes(
        {
            "gen_ai.usage.input_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "gen_ai.usage.cache_read.input_tokens": sum(output.num_cached_tokens for output in outputs),
            **({"gen_ai.usage.output_tokens": sum(len(each.token_ids) for each in completions)} if has_text else {}),
            **({"gen_ai.response.finish_reasons": reasons} if reasons else {}),
        }
    )
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    if metrics:
        _tell_times(span, metrics)


def _tell_times(span: Any, metrics: Sequence[RequestMetrics]) -> None:
    """Add times and events. Of several prompts the earliest times count, and the latest end."""
    arrived_s = min(each.arrival_s for each in metrics)
    admitted_s = min((each.first_scheduled_s for each in metrics if each.first_scheduled_s is not None), default=None)
    first_s = min((each.first_token_s for each in metrics if each.first_token_s is not None), default=None)
    last_s = max((each.last_token_s for each in metrics if each.last_token_s is not None), default=None)
    spans_s = {
        "time_in_queue": _span_s(arrived_s, admitted_s),
        "time_in_model_prefill": _span_s(admitted_s, first_s),
        "time_in_model_decode": _span_s(first_s, last_s),
        "time_in_model_inference": _span_s(admitted_s, last_s),
        "time_to_first_token": _span_s(arrived_s, first_s),
        "e2e": _span_s(arrived_s, last_s),
    }
    span.set_attributes({f"gen_ai.latency.{name}": value for name, value in spans_s.items() if value is not None})
    span.set_attribute("nanoflow.num_preemptions", sum(each.num_preemptions for each in metrics))
    offset_ns = time.time_ns() - time.monotonic_ns()
    for name, time_s in (("admitted", admitted_s), ("first token", first_s), ("last token", last_s)):
        if time_s is not None:
            span.add_event(name, timestamp=offset_ns + round(time_s * _NS))


def _span_s(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
