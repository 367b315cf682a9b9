"""Fields of a request body about the tokens of its prompt: how they are made, which are kept, which are shown."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from nanoflow.request import RequestError
from nanoflow.server.body import WholeNumber

INT32_MAX = 2**31 - 1


class PromptFields(BaseModel):
    """How a prompt becomes tokens, and which of them are shown."""

    add_special_tokens: bool | None = Field(
        None, description="Add the model's, such as a beginning of sequence; true for prompts, false for conversations"
    )
    truncate_prompt_tokens: WholeNumber | None = Field(
        None,
        ge=-1,
        le=INT32_MAX,
        description="Keep so many tokens of a prompt; -1: as many as the context has room for",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Which end of a prompt is cut off; left if not given"
    )
    return_token_ids: bool | None = Field(None, description="Send the token ids of prompt and completion too")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Name tokens in logprobs by their id, as token_id:5"
    )

    @property
    def changes_tokens(self) -> bool:
        """True if a prompt's tokens are not simply those of its text."""
        return self.truncate_prompt_tokens is not None or self.add_special_tokens is False

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, value: int | None) -> int | None:
        if value == 0:
            raise RequestError("a prompt has at least 1 token; -1 keeps as many as the context has room for")
        return value

    def truncated(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The tokens of a prompt that are kept.

        Args:
            token_ids: All tokens of the prompt.
            max_tokens: How many there is room for.

        Raises:
            RequestError: More are to be kept than there is room for.
        """
        wanted = self.truncate_prompt_tokens
        if wanted is None:
            return token_ids
        if wanted > max_tokens:
            message = f"truncate_prompt_tokens is {wanted}, and there is room for {max_tokens} tokens"
            raise RequestError(message, param="truncate_prompt_tokens")
        num_kept = max_tokens if wanted == -1 else wanted
        return token_ids[:num_kept] if self.truncation_side == "right" else token_ids[-num_kept:]
