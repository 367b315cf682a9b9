"""Fields of a request body about the model's reasoning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from nanoflow.parameters import RequestError
from nanoflow.server.body import RequestBody
from nanoflow.server.parameter import Parameter

_BUDGET = "thinking_token_budget"


class ReasoningFields(RequestBody):
    """Whether the answer has the reasoning, and how long it may be."""

    include_reasoning: bool | None = Field(None, description="False leaves reasoning out of the answer")
    thinking_token_budget: Annotated[int | None, Parameter.of(_BUDGET)] = Field(
        None, description="Most tokens of reasoning; it is closed then, and the answer follows. -1: no bound"
    )
    thinking_budget: Annotated[int | None, Parameter.of("thinking_budget", _BUDGET)] = Field(
        None, description="Other name of thinking_token_budget"
    )

    @property
    def given_budget(self) -> int | None:
        """The bound on reasoning under either name."""
        return self.thinking_budget if self.thinking_token_budget is None else self.thinking_token_budget

    @property
    def budget_field(self) -> str:
        """The name under which it was given."""
        return _BUDGET if self.thinking_budget is None else "thinking_budget"

    @model_validator(mode="after")
    def _check_budget(self) -> ReasoningFields:
        if self.thinking_budget is not None and self.thinking_token_budget is not None:
            message = f"thinking_budget is another name of {_BUDGET}: give one"
            raise RequestError(message, param="thinking_budget")
        return self
