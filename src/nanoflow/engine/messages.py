"""The messages between the engine's process and its front ends, and the data in them.

Several front ends may use one engine. The front end that starts the engine sends `Load` first. Every front end may
then send `Add`, `Abort`, `ResetPrefixCache` and `Prefetch`; a further one begins with `Join`. The engine answers with
`Ready` or `Failed` once, and with `Prefetched` to each `Prefetch`. After that it sends one `StepOutput` an iteration,
with the tokens of all requests of that front end but without text: the front end detokenizes. A front end that has no
tokens in an iteration gets a `Heartbeat` now and then. While the engine loads, it sends its log messages as `Told` to
the front end that started it.

A message is a tagged `msgspec.Struct`, encoded as an array: its tag, then its fields in order (`wire.py`). Data that
users see as well, such as `EngineStats`, are dataclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from nanoflow.config import DEFAULT_MAX_LOGPROBS, EngineConfig
from nanoflow.engine.book_facts import BookFacts
from nanoflow.engine.limits import EngineLimits
from nanoflow.kvcache.sizes import PoolSize
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.models.generation import SamplingDefaults
from nanoflow.outputs import Finished
from nanoflow.request import Request


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages; the tag is the name of the class."""


class Load(Message, frozen=True, kw_only=True):
    """Load this model. The first message of the front end that started the engine."""

    config: EngineConfig


class Join(Message, frozen=True, kw_only=True):
    """A further front end has started and waits for `Ready`."""


class Leave(Message, frozen=True, kw_only=True):
    """A front end has ended: drop its requests. Sent by the front end that started the engine."""

    front_end: int


class Add(Message, frozen=True, kw_only=True):
    """Take these requests, which have one prompt: it is sent once, and the requests have none of their own.

    Attributes:
        requests: The requests without prompt and keys.
        prompt_token_ids, page_keys: Those of every request; see `Request`.
    """

    requests: list[Request]
    prompt_token_ids: list[int]
    page_keys: bytes = b""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Add:
        """The message of requests that have the same prompt and keys."""
        first = requests[0]
        return cls(
            requests=[replace(request, prompt_token_ids=[], page_keys=b"") for request in requests],
            prompt_token_ids=first.prompt_token_ids,
            page_keys=first.page_keys,
        )

    def whole(self) -> list[Request]:
        """The requests with their prompt and keys."""
        return [
            replace(request, prompt_token_ids=self.prompt_token_ids, page_keys=self.page_keys)
            for request in self.requests
        ]


class Abort(Message, frozen=True, kw_only=True):
    """Drop these requests and free what they hold; unknown ids are ignored."""

    request_ids: list[int]


class ResetPrefixCache(Message, frozen=True, kw_only=True):
    """Forget what the KV cache has of requests so far: later ones find nothing of it."""


class Prefetch(Message, frozen=True, kw_only=True):
    """A request will come soon: what is there of its prefix? The engine answers this front end with `Prefetched`.

    Attributes:
        number: Comes back with the answer.
        page_keys: As of `Request`: of the prompt; empty if a session is named.
        num_tokens: Tokens of the prompt.
        session: The session whose last request is the prefix; None if a prompt is given.
    """

    number: int
    page_keys: bytes = b""
    num_tokens: int = 0
    session: str | None = None


class Shutdown(Message, frozen=True, kw_only=True):
    """Stop at once, for all front ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a front end must know of a loaded engine.

    Attributes:
        model_type: Architecture and size, to be shown.
        vocab_size: Width of the logits; a token id must be below it.
        hidden_size: Numbers of a hidden state, and so of the vector of a prompt.
        max_model_len: Longest prompt plus completion, already cut to what the KV pages can hold.
        eos_token_ids: The model's end of sequence (config.json and generation_config.json).
        num_pages, page_size: The KV cache: pages of its largest pool, and tokens a page.
        max_batch_tokens, max_num_seqs: Limits of a batch.
        device, dtype: The device, and the type that it computes in.
        kv_cache_dtype: Type of keys and values in the KV cache, as the option has it.
        plan: The pipeline plan or plan book in use, to be shown.
        book: The plans of the book; None for an engine without plans.
        sampling: Sampling parameters of requests that do not give them.
        limits: The engine's limits, with the goal and the origin of each; None if unknown.
        load_s, warm_up_s: Seconds to load weights and set up, and to compile kernels and capture graphs after that.
        max_logprobs: Most tokens a place whose log probabilities a request may ask for.
        has_prefix_cache: Pages of computed prompts are used again.
        group_pools: The pool of KV pages of each group of layers; empty stands for one of `num_pages`.
        page_bytes: Bytes of a page in each of these; empty if unknown.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_pages: int
    page_size: int
    max_batch_tokens: int
    max_num_seqs: int
    device: str
    dtype: str
    plan: str
    load_s: float
    warm_up_s: float
    book: BookFacts | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    limits: EngineLimits | None = None
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    has_prefix_cache: bool = False
    group_pools: tuple[PoolSize, ...] = ()
    page_bytes: tuple[int, ...] = ()
    kv_cache_dtype: str = "auto"


class Ready(Message, frozen=True, kw_only=True):
    """The engine is loaded."""

    facts: EngineFacts


class Failed(Message, frozen=True, kw_only=True):
    """The engine cannot start, or has died; `message` is one line that says why."""

    message: str


class Told(Message, frozen=True, kw_only=True):
    """A log message of the engine's process while it loads; `level` as in `logging`."""

    level: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchCounts:
    """What is there of the prefix of a request that will come.

    Attributes:
        num_tokens: Its tokens.
        num_cached_tokens: Those in full pages that the device has.
        num_prefetched_tokens: Those behind them in pages that were asked for from lower tiers.
    """

    num_tokens: int
    num_cached_tokens: int
    num_prefetched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCounts:
    """Requests of one of the `PRIORITY_CLASSES`.

    Attributes:
        num_running, num_waiting: That hold pages, and that wait for admission.
        num_tokens: Tokens of prompts and completions computed for them since the start, also those computed again.
        num_preemptions: Since the start.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """State of the engine after an iteration.

    Attributes:
        num_running, num_waiting: Requests that hold pages, and requests that wait for admission.
        pages_in_use, num_pages: KV pages of the pool that is fullest.
        num_preemptions: Since the start.
        classes: The same of interactive and of background requests, by the names in `PRIORITY_CLASSES`.
        num_drafts, num_draft_tokens, num_accepted_tokens: Drafts that were verified, their tokens, and how many of
            these were accepted; since the start.
        num_undrafted_requests: Requests since the start for which drafts are not possible; see docs/speculative.md.
        prefix_cache_queries, prefix_cache_hits: Tokens of requests that looked for cached pages, and those whose pages
            were found; since the start.
        tiers: What each tier of the KV cache that there is has done; see `TIERS`.
        num_prepared: Batches since the start that took longer because their CUDA graph was captured first.
        iteration: Iterations since the start.
        iterations_s: Seconds that these took together. One counts from its launch, or from the end of the one before
            if that was later.
        latest_plan: Digest of the plan of the last iteration, also in a heartbeat; None before the first one.
        iteration_tokens: Tokens of the dense batch just finished; 0 in a heartbeat.
        prefill_tokens: How many of them were neither decodes nor drafted.
        prefill_ends: Requests whose last chunk of prompt was computed, so that they got a token: `iteration_tokens` +
            `prefill_ends` - `rejected_tokens` is the number of prompt tokens computed and tokens generated.
        rejected_tokens: Drafted tokens of the dense batch that were rejected.
        plan_digest: Digest of the plan that ran the batch; None in a heartbeat.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_in_use: int = 0
    num_pages: int = 0
    num_preemptions: int = 0
    classes: dict[str, ClassCounts] = field(default_factory=dict)
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_undrafted_requests: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    tiers: dict[str, TierCounts] = field(default_factory=dict)
    num_prepared: int = 0
    iteration: int = 0
    iterations_s: float = 0.0
    latest_plan: str | None = None
    iteration_tokens: int = 0
    prefill_tokens: int = 0
    prefill_ends: int = 0
    rejected_tokens: int = 0
    plan_digest: str | None = None


class PlaceLogprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Log probabilities at consecutive places of one sequence.

    Each inner list begins with the token at that place; the most probable tokens follow.

    Attributes:
        first_position: Place in the prompt of the first row; meaningless for a generated token.
        token_ids, logprobs: One list for each place.
        ranks: Rank (from 1) of the token at each place.
    """

    first_position: int
    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]


class StepOutput(Message, frozen=True, kw_only=True):
    """The output of one iteration.

    Attributes:
        request_ids, token_ids: One entry for each new token; several tokens of a request are in order.
        finished: Requests that ended with this iteration; some may have no token in it (aborts, errors).
        logprobs: Log probabilities of the new tokens, for requests that asked.
        prompt_logprobs: Log probabilities of the parts of prompts computed in this iteration. After a preemption a part
            may come again, with the same positions.
        pooled: Vectors of prompts, for requests that asked: float32 in the machine's byte order.
        scheduled: Requests that were admitted for the first time since the last output, and how many tokens of each
            were found in the KV cache.
        preempted: Requests that were preempted since the last output.
        stats: State after the iteration.
    """

    request_ids: list[int] = msgspec.field(default_factory=list)
    token_ids: list[int] = msgspec.field(default_factory=list)
    finished: dict[int, Finished] = msgspec.field(default_factory=dict)
    logprobs: dict[int, PlaceLogprobs] = msgspec.field(default_factory=dict)
    prompt_logprobs: dict[int, PlaceLogprobs] = msgspec.field(default_factory=dict)
    pooled: dict[int, bytes] = msgspec.field(default_factory=dict)
    scheduled: dict[int, int] = msgspec.field(default_factory=dict)
    preempted: list[int] = msgspec.field(default_factory=list)
    stats: EngineStats = msgspec.field(default_factory=EngineStats)


class Prefetched(Message, frozen=True, kw_only=True):
    """The answer to a `Prefetch`; `found` is None if the session is not remembered."""

    number: int
    found: PrefetchCounts | None


class Heartbeat(Message, frozen=True, kw_only=True):
    """The engine is alive, and has no tokens for this front end."""

    stats: EngineStats


ToEngine = Load | Join | Add | Abort | ResetPrefixCache | Prefetch | Leave | Shutdown
FromEngine = Ready | Failed | StepOutput | Heartbeat | Prefetched | Told
