"""Options of the responses that the server keeps, so that others can go on from them; `server/response_store.py`."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.chat_options import ChatOptions
from nanoflow.option import ConfigError, option, read_count, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions(ChatOptions):
    """Which responses of /v1/responses are kept, and where."""

    response_dir: str | None = option(
        None,
        "Folder that responses of /v1/responses are kept in; a temporary one that goes with the server if not given",
    )
    max_kept_responses: int = option(
        10_000,
        "Most responses that are kept; those of the conversation that has been silent longest go first. 0 keeps none",
        read=read_count,
    )
    max_kept_response_bytes: int = option(
        256 * 2**20,
        "Most bytes of kept responses with their inputs; beyond that they go in the same order",
        read=read_count,
    )

    def check_inherited(self) -> None:
        """Check the options of this class and of its base classes.

        Raises:
            ConfigError: One is invalid.
        """
        ChatOptions.check_inherited(self)
        kept = self.max_kept_responses
        if isinstance(kept, bool) or not isinstance(kept, int) or kept < 0:
            raise ConfigError(f"max_kept_responses must be a whole number from 0, got {kept!r}")
        require_positive("max_kept_response_bytes", self.max_kept_response_bytes)
