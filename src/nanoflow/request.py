"""What a user asks for: sampling parameters and the request that carries them.

This file knows nothing of tensors, pages or batches. Answers live in `outputs.py`, options of the engine
in `config.py`. Field names and defaults follow the field's habit (vLLM), so that code moves by changing an import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 300


class RequestError(ValueError):
    """What is wrong with a request, in one line for whoever sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        n: Number of completions of the prompt. Completion i samples with `seed + i`.
        temperature: 0 is greedy; larger is more random.
        top_p: Keep the smallest set of tokens whose probability reaches this, 0 to 1; 0 keeps the most probable one.
        top_k: Keep the k most probable tokens; 0 (or less) keeps all.
        min_p: Keep tokens at least this fraction as probable as the most probable one, 0 <= min_p <= 1.
        seed: Same seed, same tokens, whatever else is in the batch. None draws one.
        repetition_penalty: Divide (multiply, if negative) the logits of all tokens seen; 1 is off, 0.01 to 100.
        presence_penalty: Subtract from the logits of tokens generated at least once, -2 to 2.
        frequency_penalty: Subtract once per time the token was generated, -2 to 2.
        logit_bias: Token id to a number added to its logit, -100 to 100.
        stop: Strings that end the completion; not part of the text unless `include_stop_str_in_output`.
        stop_token_ids: Token ids that end the completion, beside the model's end of sequence.
        ignore_eos: Go on past the model's end of sequence (for benchmarks).
        max_tokens: Most tokens to generate; None means up to the model's context length.
        min_tokens: Fewest tokens before an end of sequence or a stop token may be chosen.
        logprobs: Return this many of the most probable tokens (0: only the chosen one, -1: all there are) at each step,
            with natural log probabilities of the model's own distribution (before temperature and penalties). The
            engine's `max_logprobs` is the most.
        prompt_logprobs: The same for each prompt token.
        detokenize: Produce text; False returns token ids only.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string in the text.

    Raises:
        ValueError: A value is out of its range; the message names the field, the range and the value.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        normalize = object.__setattr__
        normalize(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        normalize(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        normalize(self, "top_k", max(self.top_k, 0))
        self._check_ranges()
        self._check_lists()

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is always taken."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """True if the choice depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_ranges(self) -> None:
        _require_range("n", self.n, 1, MAX_CHOICES)
        _require_range("temperature", self.temperature, 0.0, 100.0)
        _require_range("top_p", self.top_p, 0.0, 1.0)
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_range("max_tokens", self.max_tokens, 1, math.inf)
        _require_range("min_tokens", self.min_tokens, 0, math.inf)
        _require_range("logprobs", self.logprobs, -1, math.inf)
        _require_range("prompt_logprobs", self.prompt_logprobs, -1, math.inf)
        _require_range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")

    def _check_lists(self) -> None:
        stop = self.stop or ()
        if len(stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop may hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}")
        if any(not isinstance(text, str) or not text for text in stop):
            raise ValueError("stop must hold non-empty strings")
        if stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias may hold at most {MAX_LOGIT_BIAS} entries, got {len(bias)}")
        for token_id, value in bias.items():
            _require_range(f"logit_bias[{token_id}]", value, -100.0, 100.0)


def _require_range(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse a number outside [low, high]; None and in-range numbers pass."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value < low or value > high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to compute: prompt tokens and how to continue them. `n > 1` is n of these.

    Attributes:
        request_id: Chosen by the front end, unique among the living.
        prompt_token_ids: At least one id.
        params: Shared by the completions of one prompt; `n` is not looked at here.
        seed: The seed that this sequence samples with; always set, so that a recompute draws the same tokens.
        max_tokens: Most tokens to generate; no more than the context has room for.
        eos_token_ids: End of sequence of the model; empty with `ignore_eos`.
        arrival_s: Seconds on the monotonic clock of the machine.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    arrival_s: float = field(default=0.0)
