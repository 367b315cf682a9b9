"""Every option, once: a dataclass field is the Python argument, the command-line flag and its documentation.

`option(default, help)` declares one. `cli/options.py` turns these classes into flags, `LLM(...)` into arguments;
`from_kwargs` refuses an unknown name and says which known one is nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

DEFAULT_MODEL = "default"
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["safetensors", "random"]
Goal = Literal["throughput", "balanced", "latency"]


class ConfigError(ValueError):
    """An option has a value it cannot have, or does not exist; the message says which and what would do."""


def option(default: Any, text: str) -> Any:
    """Declare an option: its default and one line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine loads a model and forms batches."""

    model: str = option(
        DEFAULT_MODEL,
        "Model folder, Hugging Face Hub name, 'default' for the small embedded model, or preset:NAME for a published "
        "architecture with random weights",
    )
    tokenizer: str | None = option(None, "Tokenizer folder or Hub name; the model's own if not given")
    revision: str | None = option(None, "Branch, tag or commit on the Hub")
    dtype: DType = option("auto", "Type of weights and activations; auto: the model's on GPU, float32 on CPU")
    device: str = option("auto", "auto, cpu or cuda")
    load_format: LoadFormat = option("safetensors", "safetensors, or random: weights drawn at random, for benchmarks")
    seed: int = option(0, "Seed from which requests without one of their own draw theirs")
    max_model_len: int | None = option(
        None, "Longest prompt plus completion in tokens; the model's own limit if not given"
    )
    goal: Goal = option(
        "balanced",
        "What limits that are not given are chosen for: throughput (most tokens a second), latency (short gaps between "
        "tokens), or balanced",
    )
    max_itl_ms: float | None = option(
        None,
        "Longest gap between the tokens of a running request that a chunk of a prompt may cause, in milliseconds, by a "
        "prediction of the iteration's time; chosen by the goal if not given",
    )
    max_batch_tokens: int = option(2048, "Token budget: upper bound of the dense batch of one iteration")
    max_num_seqs: int = option(256, "Most requests running at once")
    page_size: int = option(16, "Tokens a KV page")
    kv_cache_gib: float | None = option(None, "Memory for KV pages; what the requests can use if not given")
    gpu_memory_utilization: float = option(0.9, "Part of the GPU's memory to use for weights, KV pages and all else")
    num_pages: int | None = option(None, "Number of KV pages, instead of a size in GiB")
    async_scheduling: bool = option(True, "Form the next batch while the current one runs")
    cuda_graphs: bool = option(True, "On a GPU, launch a forward pass as one CUDA graph")
    plan: str | None = option(None, "Pipeline plan or plan book (JSON) to execute; sequential if not given")
    num_threads: int | None = option(None, "CPU threads of torch; its own choice if not given")
    chat_template: str | None = option(None, "File with a Jinja chat template; the tokenizer's own if not given")

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_num_seqs", "page_size"):
            _require_positive(name, getattr(self, name))
        for name in ("max_model_len", "max_itl_ms", "kv_cache_gib", "num_pages", "num_threads"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        _require_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _require_choice("goal", self.goal, ("throughput", "balanced", "latency"))
        _require_choice("load_format", self.load_format, ("safetensors", "random"))
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the HTTP server listens."""

    host: str = option("127.0.0.1", "Address to bind; the default answers to this machine only")
    port: int = option(8000, "Port to bind; 0 takes a free one and prints it")
    served_model_name: str | None = option(None, "Name in the API; the model argument if not given")
    api_servers: int | None = option(
        None, "Processes that answer HTTP at the port, for one engine; chosen from the cores and the goal if not given"
    )
    stream_interval_ms: float = option(
        20.0,
        "Longest time in milliseconds that tokens of a stream wait to be sent together, while the server is busy with "
        "sending; 0 never waits",
    )
    metrics_prefix: str = option("nanoflow", "Prefix of the metric names; 'vllm' fits dashboards made for it")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least severe messages to log")
    heartbeat_timeout_s: float = option(60.0, "/health fails when the engine loop has been silent for so long")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}")
        if self.api_servers is not None:
            _require_positive("api_servers", self.api_servers)
        if not 0 <= self.stream_interval_ms <= 1000:
            raise ConfigError(f"stream_interval_ms must be in 0..1000, got {self.stream_interval_ms}")
        _require_choice("log_level", self.log_level, ("debug", "info", "warning", "error"))
        _require_positive("heartbeat_timeout_s", self.heartbeat_timeout_s)


ConfigT = TypeVar("ConfigT")


def from_kwargs(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a config from keyword arguments.

    Raises:
        ConfigError: An unknown name; the message names the nearest valid one.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ConfigError(unknown_option(name, names))
    return kind(**values)


def unknown_option(name: str, known: list[str]) -> str:
    """One line that says an option does not exist and which one was probably meant."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
    return f"unknown option {name!r}{hint}"


def _require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} must be positive, got {value}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
