"""Fields of bodies that say who goes first: vLLM's `priority`, and OpenAI's `service_tier`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from starlette.types import Scope

from nanoflow.parameters import RequestError
from nanoflow.priorities import BATCH, PRIORITY, Priority
from nanoflow.server.body import RequestBody
from nanoflow.server.parameter import Parameter

# Of these, flex alone changes something.
ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]
_FLEX = "flex"
DEFAULT_PRIORITY = "nanoflow.priority"
"""Key of the ASGI scope under which a call of the server's own has the priority of bodies that name none."""


class PriorityFields(RequestBody):
    """The priority of a call."""

    priority: Annotated[Priority | None, Parameter("priority", PRIORITY)] = Field(
        None, description='Lower ones go first, as 0 before 1; "batch" gets what all others leave; 0 if not given'
    )
    service_tier: ServiceTier | None = Field(None, description='flex is priority "batch"; others have no effect')

    def priority_in(self, scope: Scope) -> Priority:
        """The priority that the fields ask for; else that of the place where the call comes from."""
        if self.service_tier == _FLEX:
            return BATCH
        default: Priority = scope.get(DEFAULT_PRIORITY, 0)
        return default if self.priority is None else self.priority

    @model_validator(mode="after")
    def _check_priority(self) -> PriorityFields:
        if self.service_tier == _FLEX and self.priority not in (None, BATCH):
            raise RequestError(
                f"service_tier flex means priority {BATCH!r}: leave out priority {self.priority}", param="priority"
            )
        return self
