"""Every option, once: a dataclass field is the Python argument, the command-line flag and its documentation.

`option(default, help)` declares one. `cli/options.py` turns these classes into flags, `LLM(...)` into arguments;
`from_kwargs` refuses an unknown name and says which known one is nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

DEFAULT_MODEL = "default"
DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["safetensors", "random"]
DEFAULT_MAX_LOGPROBS = 20
Goal = Literal["throughput", "balanced", "latency"]

# `LLM`, `nanoflow generate` and `nanoflow bench throughput` return when all is done: nobody watches the tokens come, so
# gaps between them do not matter there. Their defaults differ from those of `EngineConfig` in this.
UNWATCHED_DEFAULTS: Mapping[str, Any] = {"goal": "throughput"}


class ConfigError(ValueError):
    """An option has a value it cannot have, or does not exist; the message says which and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another name of an option: what other engines call it.

    Attributes:
        name: As a keyword argument.
        convert: From a value under this name to one of the option, where the two differ; ValueError if it cannot be.
        note: How the two differ, in a few words for the help.
    """

    name: str
    convert: Callable[[Any], Any] | None = None
    note: str = ""


def option(
    default: Any, text: str, *, aliases: tuple[Alias, ...] = (), read: Callable[[str], Any] | None = None
) -> Any:
    """Declare an option.

    Args:
        default: Its value if it is not given.
        text: One line of help.
        aliases: Its other names.
        read: From what a user wrote to a value, where that is more than its type; ValueError if it is none.
    """
    return dataclasses.field(default=default, metadata={"help": text, "aliases": aliases, "read": read})


def read_count(text: str) -> int:
    """A number of tokens: 4096, 4k (thousands: 4,000), 4K (times 1,024: 4,096), and so with m, M, g, G.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise ValueError(f"{text!r} is no whole number, as 4096, 4k (4,000) or 4K (4,096)")
    base = 1024 if match[2].isupper() else 1000
    return int(float(match[1]) * base ** " kmg".index(match[2].lower() or " "))


def _read_length(text: str) -> int | None:
    return None if text in ("auto", "-1") else read_count(text)


def _read_dtype(text: str) -> str:
    name = text.removeprefix("torch.")
    return {"half": "float16", "float": "float32"}.get(name, name)


def _read_load_format(text: str) -> str:
    return {"dummy": "random", "auto": "safetensors"}.get(text, text)


def _read_mode(text: str) -> str:
    return {"interactivity": "latency"}.get(text, text)


def _gib(num_bytes: Any) -> float:
    return read_count(str(num_bytes)) / 2**30


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
    dtype: DType = option(
        "auto", "Type of weights and activations; auto: the model's on GPU, float32 on CPU", read=_read_dtype
    )
    device: str = option("auto", "auto, cpu or cuda")
    generation_config: str = option(
        "auto",
        "Where requests that do not say how to sample take it from: auto is the model's generation_config.json, vllm "
        "is no file, else a folder with such a file",
    )
    load_format: LoadFormat = option(
        "safetensors", "safetensors, or random: weights drawn at random, for benchmarks", read=_read_load_format
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
        aliases=(Alias(name="performance_mode", note="where interactivity is latency"),),
        read=_read_mode,
    )
    max_itl_ms: float | None = option(
        None,
        "Longest gap between the tokens of a running request that a chunk of a prompt may cause, in milliseconds, by a "
        "prediction of the iteration's time; chosen by the goal if not given",
    )
    max_batch_tokens: int | None = option(
        None,
        "Token budget: upper bound of the dense batch of one iteration; chosen for goal, model, memory and device if "
        "not given",
        aliases=(Alias(name="max_num_batched_tokens"),),
        read=read_count,
    )
    max_num_seqs: int | None = option(None, "Most requests running at once; chosen likewise if not given")
    page_size: int = option(16, "Tokens a KV page", aliases=(Alias(name="block_size"),))
    kv_cache_gib: float | None = option(
        None,
        "Memory for KV pages in GiB; what the requests can use if not given",
        aliases=(Alias(name="kv_cache_memory_bytes", convert=_gib, note="in bytes"),),
    )
    gpu_memory_utilization: float = option(0.9, "Part of the GPU's memory to use for weights, KV pages and all else")
    num_pages: int | None = option(
        None, "Number of KV pages, instead of a size in GiB", aliases=(Alias(name="num_gpu_blocks_override"),)
    )
    max_logprobs: int = option(
        DEFAULT_MAX_LOGPROBS,
        "Most tokens a place whose log probabilities a request may ask for; -1: the whole vocabulary, which takes time "
        "and memory",
    )
    async_scheduling: bool = option(True, "Form the next batch while the current one runs")
    cuda_graphs: bool = option(
        True,
        "On a GPU, launch a forward pass as one CUDA graph",
        aliases=(Alias(name="enforce_eager", convert=operator.not_, note="turns it off"),),
    )
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
        for name in (*sizes, "max_model_len", "max_itl_ms", "num_threads", *templates):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.max_logprobs < -1:
            raise ConfigError(
                f"max_logprobs must be at least 0, or -1 for the whole vocabulary, got {self.max_logprobs}"
            )
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
        None,
        "Processes that answer HTTP at the port, for one engine; chosen from the cores and the goal if not given",
        aliases=(Alias(name="api_server_count"),),
    )
    stream_interval_ms: float = option(
        20.0,
        "Longest time in milliseconds that tokens of a stream wait to be sent together, where many streams take the "
        "server's time; 0 never waits",
    )
    metrics_prefix: str = option("nanoflow", "Prefix of the metric names; 'vllm' fits dashboards made for it")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "Least severe messages to log", aliases=(Alias(name="uvicorn_log_level"),)
    )
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
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}")
        if self.api_servers is not None:
            _require_positive("api_servers", self.api_servers)
        if not 0 <= self.stream_interval_ms <= 1000:
            raise ConfigError(f"stream_interval_ms must be in 0..1000, got {self.stream_interval_ms}")
        _require_choice("log_level", self.log_level, ("debug", "info", "warning", "error"))
        _require_positive("heartbeat_timeout_s", self.heartbeat_timeout_s)
        if not 0 <= self.shutdown_timeout < math.inf:
            raise ConfigError(f"shutdown_timeout must be 0 or more seconds, got {self.shutdown_timeout}")
        if isinstance(self.restart_engine, bool) or not isinstance(self.restart_engine, int) or self.restart_engine < 0:
            raise ConfigError(f"restart_engine must be a whole number from 0, got {self.restart_engine!r}")


ConfigT = TypeVar("ConfigT")


def from_kwargs(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a config from keyword arguments, whose names may be aliases.

    Raises:
        ConfigError: An unknown name (the message names the nearest valid one), a value that cannot be read, or two
            names of one option with different values.
    """
    return kind(**by_own_names(kind, values))


def by_own_names(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a config under its own names, with the values that it has them in.

    Raises:
        ConfigError: As `from_kwargs`.
    """
    names = names_of(kind)
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in values.items():
        if name not in names:
            raise ConfigError(unknown_option(name, list(names)))
        field, alias = names[name]
        read = _read(field, alias, name, value)
        if field.name in found and found[field.name] != read:
            other = given_as[field.name]
            raise ConfigError(
                f"{other} ({values[other]}) and {name} ({value}) are two names of one option: give one of them"
            )
        found[field.name], given_as[field.name] = read, name
    return found


def names_of(kind: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Alias | None]]:
    """Every name of every option: its own first, then its aliases."""
    return {
        name: (field, alias)
        for field in dataclasses.fields(kind)
        for name, alias in ((field.name, None), *((alias.name, alias) for alias in field.metadata.get("aliases", ())))
    }


def _read(field: dataclasses.Field[Any], alias: Alias | None, name: str, value: Any) -> Any:
    """A value as the config has it."""
    read = field.metadata.get("read")
    try:
        if alias is not None and alias.convert is not None:
            return alias.convert(value)
        return value if read is None or value is None else read(str(value))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def unknown_option(name: str, known: list[str]) -> str:
    """One line that says an option does not exist and which one was probably meant."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
    return f"unknown option {name!r}{hint}"


def _require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
