"""What a user gets back: completions with text, token ids, log probabilities and the reason they ended.

Names follow vLLM's outputs. This file only defines data; `engine/output.py` fills it in.
"""

from __future__ import annotations

import enum
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from nanoflow.logprob_rows import Logprob as Logprob
from nanoflow.logprob_rows import LogprobRows as LogprobRows
from nanoflow.logprob_rows import PositionLogprobs as PositionLogprobs
from nanoflow.logprob_rows import PromptLogprobRows as PromptLogprobRows
from nanoflow.logprob_rows import TokenText as TokenText
from nanoflow.logprob_rows import position_logprobs as position_logprobs


class FinishReason(enum.StrEnum):
    """Why a completion ended, as OpenAI's API names it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a completion ended.

    Attributes:
        reason: Why it ended.
        stop_token_id: The entry of `stop_token_ids` that ended it; None otherwise (also for the end of sequence).
        error: Error message for people; None without an error.
    """

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None


class GrowingText:
    """Descriptor of a string attribute that grows without being copied at each addition.

    The owner's `__dict__` has a string at first, and a buffer, positioned at its end, after the first addition.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> str:
        if instance is None:
            return ""  # the default of the dataclass field
        held = instance.__dict__[self._name]
        text: str = held if isinstance(held, str) else held.getvalue()
        return text

    def __set__(self, instance: object, value: str) -> None:
        instance.__dict__[self._name] = value


@dataclass(kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: Which of the `n` completions.
        text: Decoded text so far. While it grows, each read copies it; use `text_since` to read a stream.
        token_ids: Generated token ids, the end-of-sequence or stop token included.
        cumulative_logprob: Sum of the chosen tokens' log probabilities; None unless logprobs were asked for.
        logprobs: One mapping {token id: Logprob} for each generated token; None unless asked for.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: The stop string or stop token id that ended it; None if something else did.
    """

    index: int
    text: GrowingText = GrowingText()
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Sequence[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def is_finished(self) -> bool:
        """True once a finish reason is known."""
        return self.finish_reason is not None

    def finished(self) -> bool:
        """vLLM's name for `is_finished`."""
        return self.is_finished

    @property
    def num_chars(self) -> int:
        """Length of the text in characters; takes constant time."""
        held = self.__dict__["text"]
        return len(held) if isinstance(held, str) else held.tell()

    def append_text(self, piece: str) -> None:
        """Append to the text; takes time in proportion to the piece."""
        held = self.__dict__["text"]
        if not held:
            self.text = piece
        elif piece:
            if isinstance(held, str):
                buffer = self.__dict__["text"] = io.StringIO()
                buffer.write(held)
                held = buffer
            held.write(piece)

    def text_since(self, num_chars: int) -> str:
        """The text after its first `num_chars` characters; takes time in proportion to the result."""
        held = self.__dict__["text"]
        if isinstance(held, str):
            return held[num_chars:]
        held.seek(num_chars)
        piece: str = held.read()
        held.seek(0, io.SEEK_END)
        return piece


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Times of events of a request, in seconds of the monotonic clock; None if it has not happened.

    With `n > 1` each time is that of the first completion to reach the event, but `finished_s` is that of the last.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    num_generation_tokens: int = 0
    """Generated tokens of all completions whose text has been made."""

    @property
    def arrival_time(self) -> float:
        """vLLM's name for `arrival_s`, in seconds since 1970."""
        return _wall_s(self.arrival_s)

    @property
    def queued_ts(self) -> float:
        """vLLM's name for `arrival_s`: a request is queued when it arrives."""
        return self.arrival_s

    @property
    def scheduled_ts(self) -> float:
        """vLLM's name for `first_scheduled_s`; 0 if it has not happened."""
        return self.first_scheduled_s or 0.0

    @property
    def first_token_ts(self) -> float:
        """vLLM's name for `first_token_s`; 0 if it has not happened."""
        return self.first_token_s or 0.0

    @property
    def last_token_ts(self) -> float:
        """vLLM's name for `last_token_s`; 0 if it has not happened."""
        return self.last_token_s or 0.0

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token; 0 if there is none."""
        return 0.0 if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def is_corrupted(self) -> bool:
        """False: a request with logits that are not finite ends with an error."""
        return False

    @property
    def first_scheduled_time(self) -> float | None:
        """`first_scheduled_s` in seconds since 1970, as older versions of vLLM have it."""
        return _wall_s(self.first_scheduled_s)

    @property
    def first_token_time(self) -> float | None:
        """`first_token_s` in seconds since 1970, as older versions of vLLM have it."""
        return _wall_s(self.first_token_s)

    @property
    def last_token_time(self) -> float | None:
        """`last_token_s` in seconds since 1970, as older versions of vLLM have it."""
        return _wall_s(self.last_token_s)

    @property
    def finished_time(self) -> float | None:
        """`finished_s` in seconds since 1970, as older versions of vLLM have it."""
        return _wall_s(self.finished_s)

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first iteration, as older versions of vLLM have it."""
        return None if self.first_scheduled_s is None else self.first_scheduled_s - self.arrival_s


@overload
def _wall_s(monotonic_s: float) -> float: ...
@overload
def _wall_s(monotonic_s: None) -> None: ...
def _wall_s(monotonic_s: float | None) -> float | None:
    """A time of the monotonic clock in seconds since 1970, by the present difference of the two clocks."""
    return None if monotonic_s is None else monotonic_s + time.time() - time.monotonic()


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All completions of one prompt.

    Attributes:
        request_id: The label the caller gave, or one we made.
        prompt: The prompt's text; None if it came as token ids.
        prompt_token_ids: The prompt's tokens.
        prompt_logprobs: One entry for each prompt token, None for the first; None unless asked for.
        outputs: One `CompletionOutput` for each of the `n`.
        finished: True once every completion has ended.
        error: What went wrong with this request alone, if its finish reason is "error".
        embedding: The prompt's vector, if `SamplingParams.pooling` asked for it.
        num_cached_tokens: Tokens of the prompt that were in the KV cache already. With `n > 1` those that the first
            completion to begin found there; the others have the prompt from it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None
    finished: bool = False
    metrics: RequestMetrics | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    embedding: list[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """A vector, as a list of H floats."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """H."""
        return len(self.embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequestOutput:
    """The vector of one prompt.

    Attributes:
        request_id: The label of the request.
        prompt: The prompt's text; None if it came as token ids.
        prompt_token_ids: The prompt's tokens.
        outputs: The vector; empty if the request failed.
        num_cached_tokens: Tokens of the prompt that were in the KV cache already.
        error: What went wrong with this request alone.
        finished: True.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0
    error: str | None = None
    finished: bool = True
