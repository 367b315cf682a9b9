"""Conversations of several rounds as a workload: which new tokens each round brings, and when.

The prompt of a round is all that came before it, completions included, plus the round's new tokens. It is known only
when the rounds before have ended, so who asks puts it together: `bench/rounds.py` with an engine, `simulate/talking.py`
on a simulated clock. Lengths come from `workload.py`; everything is drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from nanoflow.config import ConfigError
from nanoflow.conversation_options import ConversationConfig
from nanoflow.workload import Lengths, draw_arrivals, draw_lengths

# Tokens of a tool call: a name and a few arguments as JSON.
MIN_CALL_TOKENS, MAX_CALL_TOKENS = 16, 64

# Independent random streams of one seed, beside those of workload.py.
_KINDS, _CALLS, _THINKING, _SYSTEMS, _TOKENS = range(4, 9)


class Workload(Protocol):
    """Options that say which lengths are drawn; those of a benchmark are."""

    @property
    def workload(self) -> str:
        """IN/OUT tokens of every round, a mix of several, or trace:FILE.csv."""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One round: what is new in its prompt.

    Attributes:
        new_token_ids: Tokens of the user, or of a tool's result.
        num_output_tokens: Tokens of the completion.
        think_s: Seconds between the completion before and this round's request; 0 for the first round.
    """

    new_token_ids: list[int]
    num_output_tokens: int
    think_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens by which the conversation grows."""
        return len(self.new_token_ids) + self.num_output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation as it is drawn.

    Attributes:
        start_s: Seconds from the start of the run.
        is_agent: It is an agent loop: completions but the last are tool calls, and nobody thinks between rounds.
        system_token_ids: The common system prompt that it begins with; empty without one.
        turns: Its rounds.
    """

    start_s: float
    is_agent: bool
    system_token_ids: list[int]
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens at its end, prompt and all completions."""
        return len(self.system_token_ids) + sum(turn.num_tokens for turn in self.turns)


def draw_conversations(
    config: Workload, talk: ConversationConfig, *, vocab_size: int, repeat: int = 0
) -> list[Conversation]:
    """The conversations of one repeat.

    Repeats differ only in the tokens, so that no prefix cache makes a later one faster. The numbers of agent loops and
    of conversations with a common system prompt are the stated parts, rounded.

    Raises:
        ConfigError: The workload cannot be read; see `workload.draw_lengths`.
    """
    count, seed = talk.num_conversations, config.seed
    lengths = draw_lengths(config.workload, count * talk.rounds, seed)
    starts_s = draw_arrivals(count, talk.conversation_rate, seed)
    kinds = np.random.default_rng((_KINDS, seed))
    agents, shared = _chosen(kinds, count, talk.agent_share), _chosen(kinds, count, talk.shared_system)
    which = kinds.integers(talk.system_prompts, size=count)
    systems = np.random.default_rng((_SYSTEMS, seed, repeat)).integers(
        vocab_size, size=(talk.system_prompts, talk.system_tokens)
    )
    return [
        Conversation(
            start_s=starts_s[place],
            is_agent=place in agents,
            system_token_ids=systems[which[place]].tolist() if place in shared else [],
            turns=tuple(
                _turns(
                    lengths[place * talk.rounds : (place + 1) * talk.rounds],
                    is_agent=place in agents,
                    think_time=talk.think_time,
                    vocab_size=vocab_size,
                    key=(seed, place, repeat),
                )
            ),
        )
        for place in range(count)
    ]


def _chosen(rng: np.random.Generator, count: int, part: float) -> frozenset[int]:
    """The places of a random part of `count` conversations."""
    return frozenset(rng.permutation(count)[: round(part * count)].tolist())


def _turns(
    lengths: Sequence[Lengths], *, is_agent: bool, think_time: float, vocab_size: int, key: tuple[int, int, int]
) -> Iterator[Turn]:
    """The rounds of one conversation; `key` has the seed, its number and the repeat, of which only tokens depend."""
    seed, place, repeat = key
    tokens = np.random.default_rng((_TOKENS, seed, repeat, place))
    calls = np.random.default_rng((_CALLS, seed, place)).integers(
        MIN_CALL_TOKENS, MAX_CALL_TOKENS, size=len(lengths), endpoint=True
    )
    thinking_s = np.random.default_rng((_THINKING, seed, place)).exponential(1.0, len(lengths)) * think_time
    for number, length in enumerate(lengths):
        is_call = is_agent and number < len(lengths) - 1
        yield Turn(
            new_token_ids=tokens.integers(vocab_size, size=length.num_prompt_tokens).tolist(),
            num_output_tokens=min(length.num_output_tokens, int(calls[number]))
            if is_call
            else length.num_output_tokens,
            think_s=float(thinking_s[number]) if number and not is_agent else 0.0,
        )


def fitted(conversations: Sequence[Conversation], max_model_len: int | None) -> list[Conversation]:
    """The conversations without the rounds at whose end they would be longer than the model allows.

    Args:
        conversations: As drawn.
        max_model_len: Longest prompt plus completion in tokens; None if it is not known, and then nothing is left out.

    Raises:
        ConfigError: Not one conversation has a first round that is short enough.
    """
    if max_model_len is None:
        return list(conversations)
    kept = [replace(each, turns=_fitting(each, max_model_len)) for each in conversations]
    if not any(each.turns for each in kept):
        raise ConfigError(
            f"the first round of every conversation is longer than the model's {max_model_len:,} tokens: ask for a "
            "shorter workload or fewer system_tokens"
        )
    return kept


def _fitting(conversation: Conversation, max_model_len: int) -> tuple[Turn, ...]:
    ends = np.cumsum([len(conversation.system_token_ids), *(turn.num_tokens for turn in conversation.turns)])[1:]
    return conversation.turns[: int((ends <= max_model_len).sum())]


def num_rounds(conversations: Sequence[Conversation]) -> int:
    """Rounds of all conversations."""
    return sum(len(each.turns) for each in conversations)
