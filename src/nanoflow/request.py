"""What a user asks for: sampling parameters, and the request that has them.

Results are in `outputs.py`, options of the engine in `config.py`. Names and defaults of fields are vLLM's, so that code
written for vLLM works after changing an import.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from nanoflow.compat.entries import Alias, Foreign, read_text
from nanoflow.compat.sampling_options import SAMPLING
from nanoflow.parameters import (
    INT32_MAX,
    INT64_MAX,
    INT64_MIN,
    UINT64_MAX,
    Biases,
    Flag,
    Kind,
    Number,
    OneOf,
    RequestError,
    Texts,
    TokenIds,
    Whole,
    did_you_mean,
)
from nanoflow.priorities import Priority, is_background, rank_of
from nanoflow.structured import Structured, StructuredKind
from nanoflow.thinking import ThinkingLimit

__all__ = ["KINDS", "MAX_CHOICES", "Pooling", "Request", "RequestError", "RequestOutputKind", "SamplingParams"]

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 16

_NUM_LOGPROBS = Whole(low=-1, high=INT32_MAX)
_NUM_KEPT = Whole(low=-1, high=INT32_MAX)


def _parameter(default: Any, kind: Kind) -> Any:
    return field(default=default, metadata={"kind": kind})


class Pooling(enum.Enum):
    """How the hidden states of a prompt become one vector."""

    LAST = "last"
    MEAN = "mean"


class RequestOutputKind(enum.Enum):
    """What `AsyncLLM` yields at each step: everything so far, only what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    The object may be changed until it is used. Each request keeps a checked copy (`snapshot`), so later changes affect
    only later requests. Other parameters of vLLM are accepted if their value changes nothing
    (`compat/sampling_options.py`). Positional arguments are in vLLM's order.

    None means the default unless None is a value of its own. Numbers and booleans may be numpy's.

    Attributes:
        n: Number of completions of the prompt. Completion i samples with `seed + i`.
        temperature: 0 is greedy; larger is more random.
        top_p: Keep the smallest set of tokens whose probability reaches this, 0 to 1; 0 keeps the most probable one.
        top_k: Keep the k most probable tokens; 0 or -1 keeps all.
        min_p: Keep tokens at least this fraction as probable as the most probable one, 0 <= min_p <= 1.
        seed: Same seed, same tokens, whatever else is in the batch. None draws one.
        repetition_penalty: Divide (multiply, if negative) the logits of all tokens seen; 1 is off, 0.01 to 100.
        presence_penalty: Subtract from the logits of tokens generated at least once, -2 to 2.
        frequency_penalty: Subtract once per time the token was generated, -2 to 2.
        logit_bias: Token id to a number added to its logit, -100 to 100.
        allowed_token_ids: Only these tokens may be generated; None allows all.
        bad_words: Strings that may not be generated, at the beginning of a word or within one. The last token of each
            is not chosen if the tokens before it have just been generated.
        stop: Strings that end the completion; not part of the text unless `include_stop_str_in_output`.
        stop_token_ids: Token ids that end the completion, beside the model's end of sequence.
        ignore_eos: Go on past the model's end of sequence (for benchmarks).
        max_tokens: Most tokens to generate; None means up to the model's context length.
        min_tokens: Fewest tokens before an end of sequence or a stop token may be chosen. A stop string that is
            complete within them does not end the completion.
        logprobs: Return this many of the most probable tokens (0: only the chosen one, -1: all) at each step, with
            natural log probabilities of the model's own distribution (before temperature and penalties). At most the
            engine's `max_logprobs`.
        prompt_logprobs: The same for each prompt token.
        detokenize: Produce text; False returns token ids only.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string in the text.
        pooling: Return a vector of the prompt too (`RequestOutput.embedding`): the hidden state of its last token, or
            the mean of those of all its tokens, behind the model's last norm. `LLM.embed` sets it.
        output_kind: What `AsyncLLM` and `LLMEngine` yield at each step. `LLM` and `AsyncEngine` ignore it.
        truncate_prompt_tokens: Use only this many last tokens of the prompt; -1 uses as many as the context has room
            for beside `max_tokens`.
        thinking_token_budget: Most tokens that the model may reason before it answers: its reasoning is closed then,
            and the completion goes on. None and -1 set no bound.
        structured_outputs: The shape that the completion must have: a mapping with one of `json` (a schema), `regex`,
            `choice` (a list of texts), `grammar` (in Lark's format) and `json_object` (true). It ends where the shape
            is complete.

    Raises:
        RequestError: A value is of the wrong kind or out of its range; the message names the field, the valid values
            and the value given. It is a ValueError.
        TypeError: The parameter does not exist; the message names the nearest one.
    """

    n: int = _parameter(1, Whole(low=1, high=MAX_CHOICES))
    presence_penalty: float = _parameter(0.0, Number(low=-2.0, high=2.0))
    frequency_penalty: float = _parameter(0.0, Number(low=-2.0, high=2.0))
    repetition_penalty: float = _parameter(1.0, Number(low=0.01, high=100.0))
    temperature: float = _parameter(1.0, Number(low=0.0, high=100.0))
    top_p: float = _parameter(1.0, Number(low=0.0, high=1.0))
    top_k: int = _parameter(0, Whole(low=-1, high=INT64_MAX))
    min_p: float = _parameter(0.0, Number(low=0.0, high=1.0))
    seed: int | None = _parameter(None, Whole(low=INT64_MIN, high=UINT64_MAX))
    stop: str | Sequence[str] | None = _parameter(None, Texts(max_items=MAX_STOP_STRINGS, takes_one=True))
    stop_token_ids: Sequence[int] | None = _parameter(None, TokenIds(max_items=MAX_STOP_TOKEN_IDS))
    ignore_eos: bool = _parameter(False, Flag())
    max_tokens: int | None = _parameter(16, Whole(low=1, high=INT32_MAX))
    min_tokens: int = _parameter(0, Whole(low=0, high=INT32_MAX))
    logprobs: int | None = _parameter(None, _NUM_LOGPROBS)
    prompt_logprobs: int | None = _parameter(None, _NUM_LOGPROBS)
    _: KW_ONLY
    logit_bias: Mapping[int, float] | None = _parameter(
        None, Biases(bias=Number(low=-100.0, high=100.0), max_items=MAX_LOGIT_BIAS)
    )
    allowed_token_ids: Sequence[int] | None = _parameter(None, TokenIds())
    bad_words: Sequence[str] | None = _parameter(None, Texts(max_items=MAX_BAD_WORDS))
    detokenize: bool = _parameter(True, Flag())
    skip_special_tokens: bool = _parameter(True, Flag())
    include_stop_str_in_output: bool = _parameter(False, Flag())
    output_kind: RequestOutputKind = _parameter(RequestOutputKind.CUMULATIVE, OneOf(members=RequestOutputKind))
    truncate_prompt_tokens: int | None = _parameter(None, _NUM_KEPT)
    pooling: Pooling | None = _parameter(None, OneOf(members=Pooling))
    thinking_token_budget: int | None = _parameter(None, Whole(low=-1, high=INT32_MAX))
    structured_outputs: Structured | None = field(default=None, metadata={"kind": StructuredKind(), "read": read_text})

    if not TYPE_CHECKING:

        def __init__(self, *positional: Any, **given: Any) -> None:
            """Read the parameters. An unknown one is refused with a suggestion."""
            given = _by_name(positional, given)
            for name, default in _DEFAULTS.items():
                object.__setattr__(self, name, given.get(name, default))
            self.__post_init__()

        def __setattr__(self, name: str, value: Any) -> None:
            """Set a parameter; its value is checked when the object is used."""
            if name not in KINDS:
                raise AttributeError(f"SamplingParams has no parameter {name!r}{_hint(name)}")
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value, default = getattr(self, name), _DEFAULTS[name]
            if value is None:
                value = _MEANING_OF_NONE.get(name, default)
            elif value is not default:
                value = kind.read(name, value)
            # Stored as lists, because users append to them.
            object.__setattr__(self, name, list(value) if isinstance(value, tuple) else value)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if self.thinking_token_budget == -1:
            object.__setattr__(self, "thinking_token_budget", None)
        self._check_together()

    @classmethod
    def from_optional(cls, **given: Any) -> SamplingParams:
        """The same as the constructor; None means the default there too."""
        return cls(**given)

    def clone(self) -> SamplingParams:
        """A deep copy."""
        return copy.deepcopy(self)

    def snapshot(self) -> SamplingParams:
        """A checked copy for a request.

        Raises:
            RequestError: A parameter was set to an invalid value.
        """
        return dataclasses.replace(self)

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is always chosen."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """True if the choice of a token depends on earlier tokens."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
            )
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must be at least 1, or -1 for as many as there is room for",
                param="truncate_prompt_tokens",
            )
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True", param="stop")
        if self.structured_outputs is not None and self.ignore_eos:
            raise RequestError(
                "structured outputs end with an end of sequence: not with ignore_eos", param="ignore_eos"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids must not be empty: no token could be chosen", param="allowed_token_ids"
            )


KINDS: dict[str, Kind] = {one.name: one.metadata["kind"] for one in dataclasses.fields(SamplingParams)}
"""The kind of each parameter, used wherever parameters are read: Python, HTTP and the OpenAPI document."""

_POSITIONAL = tuple(one.name for one in dataclasses.fields(SamplingParams) if not one.kw_only)
_DEFAULTS = {one.name: one.default for one in dataclasses.fields(SamplingParams)}
# Parameters for which None does not mean the default.
_MEANING_OF_NONE: dict[str, Any] = {"max_tokens": None, "stop": (), "stop_token_ids": (), "bad_words": ()}


def _by_name(positional: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SamplingParams` by name, without those of vLLM that change nothing.

    Raises:
        RequestError: A parameter that nanoflow lacks has a value that would change something.
        TypeError: A parameter does not exist or is given twice.
    """
    if len(positional) > len(_POSITIONAL):
        raise TypeError(f"SamplingParams takes {len(_POSITIONAL)} arguments without a name, got {len(positional)}")
    named = dict(zip(_POSITIONAL, positional, strict=False))
    for name, value in given.items():
        if name in named:
            raise TypeError(f"SamplingParams got {name!r} twice: in its place and by name")
        if name in KINDS:
            named[name] = value
            continue
        entry = SAMPLING.entries.get(name)
        if isinstance(entry, Alias):
            if value is not None:
                named[entry.to] = value
            continue
        if not isinstance(entry, Foreign):
            raise TypeError(f"SamplingParams has no parameter {name!r}{_hint(name)}")
        if not entry.changes_nothing(value, {**_DEFAULTS, **named, **given}):
            raise RequestError(entry.refusal(value))
    return named


def _hint(name: str) -> str:
    """The end of a message about a parameter that does not exist."""
    entry = SAMPLING.entries.get(name)
    if isinstance(entry, Foreign):
        return f": {entry.reason}"
    return did_you_mean(name, KINDS) or f"; there are {', '.join(KINDS)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to compute: prompt tokens, and how to continue them. A call with `n > 1` makes n of these.

    Attributes:
        request_id: Chosen by the front end, unique among unfinished requests.
        prompt_token_ids: At least one id.
        params: Shared by the completions of one prompt; `n` is ignored here.
        seed: Random seed of this sequence; always set, so that a recompute draws the same tokens.
        max_tokens: Most tokens to generate; at most what the context has room for.
        eos_token_ids: End-of-sequence tokens of the model; empty with `ignore_eos`.
        bad_word_ids: The token sequences that `bad_words` forbids: the last token of each is not chosen if those before
            it have just been generated.
        arrival_s: Seconds on the monotonic clock of the machine.
        page_keys: The root of its pages' keys, then the keys of those that the prompt fills (`kvcache/keys.py`); empty
            if it neither takes pages of others nor leaves any to them. One that `computes_whole_prompt` takes none.
        session: Name of the conversation that it is a turn of, unique among all users; None if it has none.
        thinking: The bound on its reasoning, with the marks of the model's format; None for none.
        priority: Who goes first; see `priorities.py`.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    arrival_s: float = field(default=0.0)
    page_keys: bytes = b""
    session: str | None = None
    thinking: ThinkingLimit | None = None
    priority: Priority = 0

    @property
    def rank(self) -> int:
        """Requests of lower rank go first."""
        return rank_of(self.priority)

    @property
    def is_background(self) -> bool:
        """Whether it gets what interactive requests leave."""
        return is_background(self.priority)

    @property
    def pooled_from(self) -> int:
        """The first token of the prompt whose hidden state counts for its vector; its length if none is asked for."""
        size = len(self.prompt_token_ids)
        return {None: size, Pooling.LAST: size - 1, Pooling.MEAN: 0}[self.params.pooling]

    @property
    def computes_whole_prompt(self) -> bool:
        """Whether every token of the prompt must be computed, so that cached pages do not help."""
        return self.params.prompt_logprobs is not None or self.params.pooling is Pooling.MEAN

    @property
    def structured(self) -> Structured | None:
        """The shape that the completion must have; None for any."""
        return self.params.structured_outputs
