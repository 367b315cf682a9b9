"""The body of POST /v1/embeddings, as OpenAI has it; further fields are vLLM's."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from nanoflow.parameters import INT32_MAX
from nanoflow.server.body import Text, WholeNumber
from nanoflow.server.foreign import OF_TOKENS, ForeignFields
from nanoflow.server.priority_fields import PriorityFields
from nanoflow.server.prompt_fields import PromptFields
from nanoflow.server.protocol import PromptField, listed


class EmbeddingRequest(PromptFields, PriorityFields):
    """Body of POST /v1/embeddings."""

    foreign: ClassVar[ForeignFields] = OF_TOKENS

    model: Text | None = Field(None, description="Name of the served model; may be left out")
    input: PromptField = Field(description="A text, a list of texts, token ids, or a list of token id lists")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the float32 numbers, little-endian; float if not given"
    )
    dimensions: WholeNumber | None = Field(
        None, ge=1, le=INT32_MAX, description="Keep so many first numbers, for models that were trained for that"
    )
    pooling: Literal["last", "mean"] | None = Field(
        None, description="The hidden state of the last token, or the mean of all; last if not given"
    )
    normalize: bool | None = Field(None, description="Divide each vector by its length; true if not given")
    cache_salt: Text | None = Field(
        None, min_length=1, description="Cached pages are shared only between requests that have the same one, or none"
    )

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs as a list, in order."""
        return listed(self.input)
