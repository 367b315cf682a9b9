"""Every option, declared once: a dataclass field is the Python argument, the command-line flag and its documentation.

`option(default, help)` of `option.py` declares one. `cli/options.py` turns these classes into flags, and
`option_names.py` reads them from keyword arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from nanoflow.bounds import ServerBounds as ServerBounds
from nanoflow.compat.engine_options import ENGINE
from nanoflow.kv_events import check_kv_events
from nanoflow.kv_events import in_full as kv_events_in_full
from nanoflow.kv_tiers import check_sessions, check_tiers
from nanoflow.option import ConfigError as ConfigError
from nanoflow.option import option as option
from nanoflow.option import read_count as read_count
from nanoflow.option import require_positive
from nanoflow.response_options import ResponseOptions
from nanoflow.speculation import check_speculation, in_full

DEFAULT_MODEL = "default"
DType = Literal["auto", "float32", "bfloat16", "float16"]
KvCacheDType = Literal["auto", "fp8_e4m3"]
LoadFormat = Literal["safetensors", "random"]
Quantization = Literal["auto", "fp8", "none"]
DEFAULT_MAX_LOGPROBS = 20
Goal = Literal["throughput", "balanced", "latency"]
_CHOICES = {
    "dtype": DType,
    "kv_cache_dtype": KvCacheDType,
    "quantization": Quantization,
    "goal": Goal,
    "load_format": LoadFormat,
}

# Other defaults of `LLM`, `nanoflow generate` and `nanoflow bench throughput`: nobody watches their tokens arrive.
UNWATCHED_DEFAULTS: Mapping[str, Any] = {"goal": "throughput"}


def _read_length(text: str) -> int | None:
    return None if text in ("auto", "-1") else read_count(text)


def read_value_of(name: str) -> Callable[[str], str]:
    """Reads an option whose values may have other names in vLLM; types may be written as `torch.float16`."""
    return lambda text: ENGINE.value_of(name, text.removeprefix("torch."))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine loads a model and forms batches."""

    model: str = option(
        DEFAULT_MODEL,
        "Model folder, GGUF file, Hugging Face Hub name, 'default' for the small embedded model, or preset:NAME for a "
        "published architecture with random weights",
        read=str,
    )
    tokenizer: str | None = option(None, "Tokenizer folder or Hub name; the model's own if not given")
    skip_tokenizer_init: bool = option(
        False, "Load no tokenizer: prompts are token ids, and completions are token ids without text"
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub")
    dtype: DType = option(
        "auto", "Type of weights and activations; auto: the model's on GPU, float32 on CPU", read=read_value_of("dtype")
    )
    quantization: Quantization = option(
        "auto",
        "fp8: products of layers multiply 8-bit floating-point weights (e4m3), quantised at the start unless they are "
        "stored so; auto: weights that are stored in FP8 or MXFP4 stay so, on a GPU that can; none: none do",
        read=read_value_of("quantization"),
    )
    device: str = option("auto", "auto, cpu or cuda")
    generation_config: str = option(
        "auto",
        "Where requests that do not say how to sample take it from: auto is the model's generation_config.json, vllm "
        "is no file, else a folder with such a file",
    )
    load_format: LoadFormat = option(
        "safetensors",
        "safetensors (or GGUF, if the model is such a file), or random: weights drawn at random, for benchmarks",
        read=read_value_of("load_format"),
    )
    seed: int = option(
        0,
        "Seed from which requests without one of their own draw theirs, one after the other: if they come in the same "
        "order again they get the same. Random weights are drawn from it too",
    )
    max_model_len: int | None = option(
        None,
        "Longest prompt plus completion in tokens, as 4096 or 4K; auto, or not given: the model's own limit, or what "
        "the KV pages hold",
        read=_read_length,
    )
    goal: Goal = option(
        "balanced",
        "What limits that are not given are chosen for: throughput (most tokens a second), latency (short gaps between "
        "tokens), or balanced (almost all of the throughput, gaps bounded)",
        read=read_value_of("goal"),
    )
    max_itl_ms: float | None = option(
        None,
        "Longest gap between the tokens of a running request that a chunk of a prompt may cause, in milliseconds, by a "
        "prediction of the iteration's time; chosen by the goal if not given",
    )
    max_ttft_ms: float | None = option(
        None,
        "Longest time from arrival to first token that requests of priority batch may cause for others, in "
        "milliseconds, by a prediction of the iterations' times; no bound if not given",
    )
    max_batch_tokens: int | None = option(
        None,
        "Token budget: upper bound of the dense batch of one iteration; chosen for goal, model, memory and device if "
        "not given",
        read=read_count,
    )
    max_num_seqs: int | None = option(None, "Most requests running at once; chosen in the same way if not given")
    page_size: int = option(16, "Tokens a KV page")
    kv_cache_dtype: KvCacheDType = option(
        "auto",
        "Type of keys and values in the KV cache; auto: that of activations; fp8_e4m3, or fp8: 8 bits, half the memory",
        read=read_value_of("kv_cache_dtype"),
    )
    kv_cache_gib: float | None = option(
        None,
        "Memory for KV pages in GiB; if not given, what the requests can use, and on a CPU at most 1 GiB, or what one "
        "request of full length needs",
    )
    gpu_memory_utilization: float = option(0.9, "Part of the GPU's memory to use for weights, KV pages and all else")
    num_pages: int | None = option(None, "Number of KV pages, instead of a size in GiB")
    max_logprobs: int = option(
        DEFAULT_MAX_LOGPROBS,
        "Most tokens a place whose log probabilities a request may ask for; -1: the whole vocabulary, which takes time "
        "and memory",
    )
    enable_prefix_caching: bool = option(
        True, "Keep pages of the KV cache after their request, and use them for prompts that begin with the same tokens"
    )
    max_sessions: int = option(
        1024, "Most conversations (session_id) whose pages can be asked for by name; 2 bytes a token", read=read_count
    )
    kv_events_config: str | None = option(
        None,
        "Publish which pages the prefix cache has, for routers such as llm-d and AIBrix: vLLM's JSON, as "
        '{"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}; nothing is published if not given',
        read=kv_events_in_full,
    )
    kv_host_gib: float | None = option(
        None, "GiB of host memory for KV pages, for later rounds and after preemptions; 1 with kv_dir, else 0"
    )
    kv_dir: str | None = option(None, "Folder for KV pages that host memory has no room for; they outlive the server")
    kv_disk_gib: float = option(16.0, "Most GiB of files in kv_dir")
    async_scheduling: bool = option(True, "Form the next batch while the current one runs")
    speculative: str | None = option(
        None,
        "Speculative decoding, ngram:TOKENS[:LONGEST[:SHORTEST]]: guess up to TOKENS tokens of a request by looking up "
        "its last LONGEST (4) to SHORTEST (2) tokens in its prompt and output, as ngram:4; answers stay the same",
        read=in_full,
    )
    cuda_graphs: bool = option(True, "On a GPU, launch a forward pass as one CUDA graph")
    plan: str | None = option(None, "Pipeline plan or plan book (JSON) to execute; sequential if not given")
    num_threads: int | None = option(None, "CPU threads of torch; its own choice if not given")
    chat_template: str | None = option(
        None,
        "Chat template: a file with Jinja, Jinja itself, or the name of one of the tokenizer's templates; its own, or "
        "its 'default', if not given",
    )
    chat_template_timeout_s: float = option(
        5.0, "Longest time in seconds that a chat template may take before it is stopped"
    )
    chat_template_max_chars: int = option(
        16 * 2**20, "Longest text in characters that a chat template may write, as 4M", read=read_count
    )

    def __post_init__(self) -> None:
        sizes = ("max_batch_tokens", "max_num_seqs", "page_size", "num_pages", "kv_cache_gib")
        templates = ("chat_template_timeout_s", "chat_template_max_chars")
        for name in (*sizes, "max_model_len", "max_itl_ms", "max_ttft_ms", "num_threads", *templates):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("async_scheduling", "cuda_graphs", "enable_prefix_caching", "skip_tokenizer_init"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        check_sessions(self.max_sessions)
        check_kv_events(self.kv_events_config, has_prefix_cache=self.enable_prefix_caching)
        check_tiers(self.kv_host_gib, self.kv_dir, self.kv_disk_gib, has_prefix_cache=self.enable_prefix_caching)
        check_speculation(self.speculative)
        if self.max_logprobs < -1:
            raise ConfigError(
                f"max_logprobs must be at least 0, or -1 for the whole vocabulary, got {self.max_logprobs}"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        for name, choices in _CHOICES.items():
            _require_choice(name, getattr(self, name), get_args(choices))
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ResponseOptions):
    """How the HTTP server listens.

    Base classes: `response_options.py`, `chat_options.py`, `access.py`, `batch_options.py` and `bounds.py`.
    """

    host: str = option("127.0.0.1", "Address to bind; the default answers to this machine only")
    port: int = option(8000, "Port to bind; 0 takes a free one and prints it")
    served_model_name: str | Sequence[str] | None = option(
        None, "Name in the API, may be given several times: the first is in answers; the model argument if not given"
    )
    api_servers: int | None = option(
        None,
        "Processes that answer HTTP at the port, for one engine; chosen from the cores and the goal if not given",
    )
    stream_interval_ms: float = option(
        20.0,
        "Longest time in milliseconds that tokens of a stream wait to be sent together, where many streams take the "
        "server's time; 0 never waits",
    )
    metrics_prefix: str = option("nanoflow", "Prefix of the metric names; 'vllm' fits dashboards made for it")
    otlp_traces_endpoint: str | None = option(
        None,
        "Collector that is sent a span of each request (OpenTelemetry, OTLP), such as http://127.0.0.1:4318; needs "
        "nanoflow-engine[otel]",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least severe messages to log")
    disable_page: bool = option(False, "Do not answer browsers at / with the page of the server")
    enable_tokenizer_info_endpoint: bool = option(
        False, "Answer GET /tokenizer_info with the tokenizer's configuration"
    )
    return_tokens_as_token_ids: bool = option(
        False, "Name tokens in log probabilities by their id, as token_id:5, unless a request says otherwise"
    )
    trust_request_chat_template: bool = option(
        False, "Let requests bring chat templates of their own; time and memory that these take are bounded"
    )
    heartbeat_timeout_s: float = option(60.0, "/health fails when the engine loop has been silent for so long")
    shutdown_timeout: float = option(
        20.0,
        "Seconds that running and waiting requests have to end after the first SIGTERM or Ctrl-C, while new ones are "
        "refused with 503; a second signal cuts them at once, and so does 0",
    )
    restart_engine: int = option(
        0,
        "How often an engine that has died is started again, in the life of the server; when it dies once more the "
        "server ends with status 1",
    )
    log_stats: bool = option(
        True, "Log a line of statistics every ten seconds in which there was work, and nothing while there is none"
    )

    def __post_init__(self) -> None:
        self.check_inherited()
        if not all(self.model_names) or len(set(self.model_names)) < len(self.model_names):
            raise ConfigError(f"served_model_name must be different names, got {list(self.model_names)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}")
        if self.api_servers is not None:
            require_positive("api_servers", self.api_servers)
        if not 0 <= self.stream_interval_ms <= 1000:
            raise ConfigError(f"stream_interval_ms must be in 0..1000, got {self.stream_interval_ms}")
        _check_endpoint("otlp_traces_endpoint", self.otlp_traces_endpoint)
        _require_choice("log_level", self.log_level, ("debug", "info", "warning", "error"))
        require_positive("heartbeat_timeout_s", self.heartbeat_timeout_s)
        if not 0 <= self.shutdown_timeout < math.inf:
            raise ConfigError(f"shutdown_timeout must be 0 or more seconds, got {self.shutdown_timeout}")
        if isinstance(self.restart_engine, bool) or not isinstance(self.restart_engine, int) or self.restart_engine < 0:
            raise ConfigError(f"restart_engine must be a whole number from 0, got {self.restart_engine!r}")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the model in the API; answers use the first."""
        names = self.served_model_name
        return (names,) if isinstance(names, str) else tuple(names or (DEFAULT_MODEL,))


def _check_endpoint(name: str, url: str | None) -> None:
    if url is None:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name} must be an address such as http://127.0.0.1:4318, got {url!r}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
