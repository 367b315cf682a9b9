"""Options of conversations of several rounds, as commands take them. `conversations.py` draws what they ask for.

Nothing heavy is imported here: `--help` shows these options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanoflow.config import ConfigError, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationConfig:
    """Which conversations there are, and when their rounds are asked."""

    num_conversations: int = option(32, "Conversations in one repeat")
    rounds: int = option(5, "Rounds of a conversation: each adds new tokens of the user and gets a completion")
    think_time: float = option(
        0.0, "Mean seconds between a completion and the next round's request, exponentially distributed; 0 is none"
    )
    system_tokens: int = option(256, "Tokens of each common system prompt")
    system_prompts: int = option(4, "Number of common system prompts")
    shared_system: float = option(0.0, "Part of the conversations that begin with a common system prompt, 0 to 1")
    agent_share: float = option(
        0.0,
        "Part of the conversations that are agent loops, 0 to 1: all completions but the last are tool calls of 16 to "
        "64 tokens, at most those of the workload, and results of tools are appended without think time",
    )
    conversation_rate: float = option(math.inf, "Conversations/s that begin, Poisson arrivals; inf begins all at once")
    max_concurrency: int | None = option(
        None, "Most conversations under way, those in think time included; unlimited if not given"
    )

    def __post_init__(self) -> None:
        for name in ("num_conversations", "rounds", "system_prompts", "system_tokens", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("shared_system", "agent_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a part from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.think_time < math.inf:
            raise ConfigError(f"think_time must be 0 or more seconds, got {self.think_time}")
        if not self.conversation_rate > 0:
            raise ConfigError(f"conversation_rate must be positive, got {self.conversation_rate}")
