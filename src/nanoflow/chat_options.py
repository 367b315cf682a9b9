"""Options of how the server reads calls and reasoning in the model's messages; `chat_formats/` has the formats."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.access import AccessOptions
from nanoflow.chat_formats.names import AUTO, CALL_NAMES, NONE, REASONING_NAMES
from nanoflow.option import ConfigError, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(AccessOptions):
    """How messages of the model are read."""

    tool_call_parser: str = option(
        AUTO,
        "Format in which the model writes calls of tools: " + ", ".join(CALL_NAMES) + "; auto finds it in the chat "
        "template, none leaves calls in the text",
    )
    reasoning_parser: str = option(
        AUTO,
        "Format in which the model writes its reasoning: " + ", ".join(REASONING_NAMES) + "; auto finds it in the chat "
        "template, none leaves it in the text",
    )

    def check_inherited(self) -> None:
        """Check the options of this class and of its base classes.

        Raises:
            ConfigError: One is invalid.
        """
        self.check_bounds()
        self.check_access()
        for name, known in (("tool_call_parser", CALL_NAMES), ("reasoning_parser", REASONING_NAMES)):
            if getattr(self, name) not in (AUTO, NONE, *known):
                names = ", ".join((AUTO, NONE, *known))
                raise ConfigError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
