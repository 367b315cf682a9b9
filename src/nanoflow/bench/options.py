"""Options of benchmarks, declared like the engine's in `nanoflow/config.py`.

`BenchConfig` has those of every benchmark. `ThroughputConfig` adds those of a run in process, `LoadConfig` those of
load on a server; those of conversations of several rounds are in `nanoflow/conversations.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanoflow.config import ConfigError, option
from nanoflow.request import SamplingParams

# Options of a benchmark that `SamplingParams` and the HTTP API have under the same names.
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logprobs", "min_tokens"),
)

Api = Literal["completions", "chat"]
Prompts = Literal["ids", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What requests ask for, and how often a run is repeated."""

    workload: str = option(
        "128/128",
        "IN/OUT tokens of every request, a mix of several with shares (8000/100x1,200/1000x12), or trace:FILE.csv",
    )
    num_requests: int = option(100, "Requests in one repeat")
    seed: int = option(0, "Seed of lengths, prompts and arrivals; repeat i draws other prompts of the same lengths")
    num_warmup: int = option(4, "Requests to run before the clock starts")
    repeats: int = option(1, "How often to measure")
    goodput: Sequence[str] = dataclasses.field(
        default=(),
        metadata={
            "help": "Limits that a good request meets, as ttft_ms:200 tpot_ms:50; also latency_ms, "
            "normalized_latency_ms and itl_ms (the longest gap)",
            "nargs": "+",
        },
    )
    json: str | None = option(None, "File to write the run's record to")
    allow_dirty: bool = option(
        False, "Write a record under benchmarks/results even if the sources have changes without a commit"
    )
    temperature: float = option(0.0, "0 takes the most probable token; larger is more random")
    top_p: float = option(1.0, "Keep the smallest set of tokens whose probability reaches this")
    top_k: int = option(0, "Keep the k most probable tokens; 0 keeps all")
    min_p: float = option(0.0, "Keep tokens at least this fraction as probable as the most probable one")
    repetition_penalty: float = option(1.0, "Divides the logits of all tokens seen; 1 is off")
    presence_penalty: float = option(0.0, "Subtracted from the logits of tokens generated at least once")
    frequency_penalty: float = option(0.0, "Subtracted once for each time that a token was generated")
    logprobs: int | None = option(None, "Ask for the log probabilities of this number of tokens at each position")
    min_tokens: int = option(
        0, "Fewest tokens before an end of sequence may be chosen, which is then not ignored; of short completions, all"
    )

    def __post_init__(self) -> None:
        _require_at_least("num_requests", self.num_requests, 1)
        _require_at_least("num_warmup", self.num_warmup, 0)
        _require_at_least("repeats", self.repeats, 1)
        _require_at_least("seed", self.seed, 0)
        try:
            SamplingParams(**self.sampling, max_tokens=None)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `SamplingParams` that differ from its defaults, and always the temperature."""
        values = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in values.items() if name == "temperature" or value != _UNSET[name]}


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputConfig(BenchConfig):
    """Options of a benchmark with an engine in this process."""

    text: bool = option(False, "Also turn tokens into text, as a user of LLM.generate has it")

    random_weights: bool = option(
        False, "Draw the weights at random instead of loading them, as --load-format random; a preset always does"
    )
    bounds: bool = option(
        True,
        "Also measure what was possible: sum of parts alone (serial bound) and optimal throughput (on a GPU some ten "
        "seconds more)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Which server gets the requests, and when."""

    url: str = option("http://127.0.0.1:8000/v1", "Base address of an OpenAI-compatible server")
    model: str | None = option(None, "Model name to ask for; the server's first one if not given")
    api_key: str | None = option(None, "Key that the server asks for")
    request_rate: float = option(math.inf, "Requests/s, Poisson arrivals; inf sends all at once")
    max_concurrency: int | None = option(None, "Most requests in flight; unlimited if not given")
    vocab_size: int = option(1000, "Prompt token ids are drawn below this")
    timeout_s: float = option(600.0, "A request that sends nothing for so long has failed")
    num_processes: int = option(1, "Client processes that share the requests; one is too slow for a fast server")
    api: Api = option("completions", "completions, or chat, whose prompts are text")
    prompts: Prompts = option("ids", "ids: random token ids; text: as many short words, for servers that take no ids")
    stream: bool = option(True, "Ask for tokens as they come; without, there is no time of the first token")
    ignore_eos: bool = option(True, "Send ignore_eos, which vLLM and nanoflow know; without, completions may be short")

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError(f"request_rate must be positive, got {self.request_rate}")
        _require_at_least("max_concurrency", self.max_concurrency, 1)
        _require_at_least("vocab_size", self.vocab_size, 1)
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be positive, got {self.timeout_s}")
        _require_at_least("num_processes", self.num_processes, 1)
        if self.api == "chat" and self.prompts == "ids":
            raise ConfigError("the chat API takes no token ids: ask for --prompts text")


_UNSET = {name: SamplingParams.__dataclass_fields__[name].default for name in SAMPLING}


def _require_at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")
