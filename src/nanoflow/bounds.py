"""Bounds of the server, as options: what a call may cost, how many calls wait, and what connections may do.

Every bound is checked before the work that it limits begins. It applies to a call as a whole: sums over its prompts,
messages and completions count. Bounds are enforced in `server/connections.py` (bytes and time on the wire),
`server/body_bounds.py` (bodies), `server/call_bounds.py` (what a call asks for) and `server/admission.py` (the queue).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nanoflow.option import ConfigError, option, read_count, require_positive

# Bounds that `SamplingParams` has too: the server's may be lower.
_AT_MOST = {"max_stop_strings": 16, "max_stop_token_ids": 128, "max_bad_words": 128, "max_logit_bias": 300}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerBounds:
    """Bounds of the HTTP server; sizes may be written as 8M (times 1,024 twice) or 1m (a million)."""

    max_body_bytes: int = option(
        8 * 2**20,
        "Longest body of a request in bytes, chunked ones too; a longer one is refused (413)",
        read=read_count,
    )
    max_bodies_bytes: int = option(
        256 * 2**20,
        "Most bytes of request bodies in memory at once, of all calls of a process; more are refused (503)",
        read=read_count,
    )
    max_header_bytes: int = option(
        32 * 2**10,
        "Longest head of a request, its line and headers, in bytes; a longer one is refused (431)",
        read=read_count,
    )
    max_headers: int = option(100, "Most headers of a request; more are refused (431)")
    max_json_depth: int = option(64, "Deepest nesting of lists and objects in a body (400)")
    max_json_items: int | None = option(
        None,
        "Most values in the lists and objects of a body (413): token ids count, lists and objects count as eight, "
        "names in objects as four. 512K, or twice the context length if that is more, if not given",
        read=read_count,
    )
    max_prompts: int = option(1024, "Most prompts of a call (400)")
    max_call_choices: int = option(1024, "Most completions of a call: its prompts times n (400)")
    max_call_chars: int | None = option(
        None,
        "Most characters of all prompts or messages of a call, looked at before they become tokens (413); 1M, or 8 "
        "times the context length if that is more, if not given. A prompt alone is bounded by the context length and "
        "the longest token, too",
        read=read_count,
    )
    max_call_scores: int = option(
        2**22, "Most log probabilities that a call may ask for, of all its tokens (400)", read=read_count
    )
    max_messages: int = option(4096, "Most messages of a conversation, and most parts of them (400)")
    max_stop_strings: int = option(_AT_MOST["max_stop_strings"], "Most stop strings of a call; at most 16 (400)")
    max_stop_chars: int = option(
        2**14, "Most characters of all stop strings and bad_words of a call (400)", read=read_count
    )
    max_stop_token_ids: int = option(_AT_MOST["max_stop_token_ids"], "Most stop_token_ids of a call; at most 128 (400)")
    max_bad_words: int = option(_AT_MOST["max_bad_words"], "Most bad_words of a call; at most 128 (400)")
    max_logit_bias: int = option(_AT_MOST["max_logit_bias"], "Most entries of logit_bias; at most 300 (400)")
    max_allowed_token_ids: int | None = option(
        None, "Most allowed_token_ids of a call; the size of the vocabulary if not given (400)"
    )
    max_queued_requests: int = option(
        4096,
        "Most completions that wait beside those that run, of all calls and processes; what would be more is refused "
        "(429) before the engine hears of it",
        read=read_count,
    )
    max_queued_tokens: int = option(
        2**23,
        "Most prompt tokens in the server, of waiting and running requests; a prompt counts once a completion (429)",
        read=read_count,
    )
    max_connections: int | None = option(
        None,
        "Most connections of a process; what its limit of open files leaves, at most 8192, if not given. At the bound "
        "the connection that has been idle longest is closed; where all are busy a new one is refused (503)",
    )
    header_timeout_s: float = option(
        10.0, "Longest time in seconds from the first byte of a request to the end of its head (408)"
    )
    body_timeout_s: float = option(60.0, "Longest time in seconds from there to the end of its body (408)")
    idle_timeout_s: float = option(60.0, "Seconds after which a connection without a request is closed")
    write_timeout_s: float = option(
        60.0, "Seconds after which a client that reads nothing of its answer is disconnected"
    )
    request_timeout_s: float | None = option(
        None, "Longest time in seconds that a call may take, generating included (504, or an error in its stream)"
    )

    def check_bounds(self) -> None:
        """Check that every bound is possible.

        Raises:
            ConfigError: A bound is not positive, or is above what the engine accepts.
        """
        for one in fields(ServerBounds):
            value = getattr(self, one.name)
            if value is not None and one.name != "max_queued_requests":
                require_positive(one.name, value)
        if self.max_queued_requests < 0:
            raise ConfigError(f"max_queued_requests must not be negative, got {self.max_queued_requests}")
        for name, most in _AT_MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} may be at most {most}, got {getattr(self, name)}")
