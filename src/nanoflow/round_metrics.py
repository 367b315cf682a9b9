"""Metrics of conversations: how much of the prompts was computed, and how soon each round began to answer.

Asked are all tokens of all prompts; computed are those that were not in the KV cache when their request began. Repeated
are those that came before in the same conversation: no cache can find more of them. `bench/rounds.py` and
`simulate/talking.py` take the times; `run_metrics.py` has the metrics of single requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nanoflow.run_metrics import Distribution, RequestRecord, RunMetrics, distribution, measure, tpot_s, ttft_s

# For each tier of the KV cache: counters and gauges by name.
Tiers = Mapping[str, Mapping[str, float]]

# What a tier has now; everything else that it tells counts from its start.
_GAUGES = frozenset({"used_bytes", "capacity_bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRound:
    """One round as it went.

    Attributes:
        conversation, round: Which conversation, from 0, and which of its rounds, from 1.
        record: Its request.
        num_cached_tokens: Tokens of its prompt that were in the KV cache; None if unknown.
        num_repeated_tokens: Tokens of the conversation before: its last prompt and completion.
    """

    conversation: int
    round: int
    record: RequestRecord
    num_cached_tokens: int | None
    num_repeated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """Tokens of the prompts of completed requests.

    Attributes:
        num_asked: All of them.
        num_repeated: Those that came before in the same conversation.
        num_cached, num_computed: Found in the KV cache, and not; None if unknown.
        hit_rate: Cached / asked; None if unknown.
    """

    num_asked: int
    num_repeated: int
    num_cached: int | None
    num_computed: int | None
    hit_rate: float | None

    @property
    def asked_over_computed(self) -> float | None:
        """How many tokens were asked for each that was computed; None if unknown, or if all were found."""
        return self.num_asked / self.num_computed if self.num_computed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMetrics:
    """One round of all conversations.

    Attributes:
        round: Its number, from 1.
        num_requests, num_completed: Numbers of requests.
        prompt: Tokens of its prompts.
        num_output_tokens: Tokens of its completions.
        ttft_s, tpot_s: None where nothing was measured.
    """

    round: int
    num_requests: int
    num_completed: int
    prompt: PromptTokens
    num_output_tokens: int
    ttft_s: Distribution | None
    tpot_s: Distribution | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationMetrics(RunMetrics):
    """Metrics of one repeat; those of its base class are over all requests.

    `total_tokens_per_s` counts every prompt in full, whether or not it had to be computed.

    Attributes:
        num_conversations: Conversations with at least one round.
        num_left_out: Rounds that would have made a conversation longer than the model allows, so nobody asked them.
        prompt: Tokens of all prompts.
        asked_over_computed: Of how many prompt tokens one was computed; None if unknown.
        by_round: First round first.
        tiers: What each tier of the KV cache did in the run, by name; empty if nothing is known.
        completions: A digest of the completions of each conversation: equal ones got the same tokens.
    """

    num_conversations: int
    num_left_out: int
    prompt: PromptTokens
    asked_over_computed: float | None
    by_round: Sequence[RoundMetrics]
    tiers: Tiers
    completions: Sequence[str]


def measure_conversations(
    asked: Sequence[AskedRound],
    duration_s: float,
    limits_ms: Mapping[str, float],
    *,
    num_left_out: int,
    tiers: Tiers,
    completions: Sequence[str],
) -> ConversationMetrics:
    """The metrics of one repeat that took `duration_s` seconds."""
    run = measure([each.record for each in asked], duration_s, limits_ms)
    prompt = prompt_tokens(asked)
    numbers = sorted({each.round for each in asked})
    return ConversationMetrics(
        **{field.name: getattr(run, field.name) for field in dataclasses.fields(run)},
        num_conversations=len({each.conversation for each in asked}),
        num_left_out=num_left_out,
        prompt=prompt,
        asked_over_computed=prompt.asked_over_computed,
        by_round=tuple(_of_round(number, [each for each in asked if each.round == number]) for number in numbers),
        tiers=tiers,
        completions=completions,
    )


def prompt_tokens(asked: Sequence[AskedRound]) -> PromptTokens:
    """Tokens of the prompts of the requests that completed."""
    done = [each for each in asked if each.record.error is None]
    cached = [each.num_cached_tokens for each in done if each.num_cached_tokens is not None]
    num_asked = sum(each.record.num_prompt_tokens for each in done)
    is_known = bool(done) and len(cached) == len(done)
    return PromptTokens(
        num_asked=num_asked,
        num_repeated=sum(each.num_repeated_tokens for each in done),
        num_cached=sum(cached) if is_known else None,
        num_computed=num_asked - sum(cached) if is_known else None,
        hit_rate=sum(cached) / num_asked if is_known else None,
    )


def _of_round(number: int, asked: Sequence[AskedRound]) -> RoundMetrics:
    done = [each.record for each in asked if each.record.error is None]
    return RoundMetrics(
        round=number,
        num_requests=len(asked),
        num_completed=len(done),
        prompt=prompt_tokens(asked),
        num_output_tokens=sum(record.num_output_tokens for record in done),
        ttft_s=distribution(map(ttft_s, done)),
        tpot_s=distribution(map(tpot_s, done)),
    )


def in_between(before: Tiers, after: Tiers) -> dict[str, dict[str, float]]:
    """What each tier did between two readings; sizes as they are at the end."""
    return {
        tier: {
            name: value if name in _GAUGES else value - before.get(tier, {}).get(name, 0.0)
            for name, value in counts.items()
        }
        for tier, counts in after.items()
    }


def format_rounds(repeats: Sequence[ConversationMetrics]) -> str:
    """A table of the prompts, by round, of the median repeat by total tokens/s, and of the tiers of its KV cache."""
    run = sorted(repeats, key=lambda run: run.total_tokens_per_s)[len(repeats) // 2]
    return "\n".join([*_round_lines(run), *_tier_lines(run.tiers), *_remarks(run)])


def _round_lines(run: ConversationMetrics) -> Iterator[str]:
    yield (
        f"{'round':<8}{'requests':>10}{'asked':>12}{'repeated':>12}{'computed':>12}{'hit rate':>10}"
        f"{'TTFT p50':>12}{'p99 (ms)':>12}{'TPOT p50':>12}{'p99 (ms)':>12}"
    )
    for each in run.by_round:
        yield _line(str(each.round), each.num_requests, each.prompt, each.ttft_s, each.tpot_s)
    yield _line("all", run.num_requests, run.prompt, run.ttft_s, run.tpot_s)


def _line(
    label: str, num_requests: int, prompt: PromptTokens, ttft: Distribution | None, tpot: Distribution | None
) -> str:
    computed = "" if prompt.num_computed is None else f"{prompt.num_computed:,}"
    rate = "" if prompt.hit_rate is None else f"{prompt.hit_rate:.1%}"
    times = "".join(
        f"{'' if spread is None else f'{value * 1e3:,.2f}':>12}"
        for spread in (ttft, tpot)
        for value in ((0.0, 0.0) if spread is None else (spread.p50, spread.p99))
    )
    return (
        f"{label:<8}{num_requests:>10,}{prompt.num_asked:>12,}{prompt.num_repeated:>12,}{computed:>12}{rate:>10}{times}"
    ).rstrip()


def _tier_lines(tiers: Tiers) -> Iterator[str]:
    """One line for each tier, of whatever it tells."""
    for tier, counts in tiers.items():
        yield f"tier {tier}: " + ", ".join(_shown(name, value) for name, value in counts.items())


def _shown(name: str, value: float) -> str:
    words = name.replace("_", " ")
    if name.endswith("_bytes"):
        return f"{words.removesuffix(' bytes')} {value / 2**20:,.1f} MiB"
    if name.endswith("_seconds"):
        return f"{words.removesuffix(' seconds')} {value:,.3f} s"
    return f"{words} {value:,.0f}"


def _remarks(run: ConversationMetrics) -> Iterator[str]:
    if run.asked_over_computed is not None:
        yield f"prompt tokens computed: 1 of {run.asked_over_computed:.2f}"
    elif run.prompt.num_computed is None:
        yield "prompt tokens computed: unknown, as no answer says how many were cached"
    if run.num_left_out:
        yield f"{run.num_left_out} rounds were left out, as their conversations would be longer than the model allows"
