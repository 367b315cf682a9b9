"""Vectors of prompts: which request asks the engine for one, and what is made of its answer.

The request generates one token, which nobody sees, so that it takes the same path as every other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from nanoflow.parameters import shown
from nanoflow.request import Pooling, RequestError, SamplingParams


def embedding_params(pooling: str = "last", truncate_prompt_tokens: int | None = None) -> SamplingParams:
    """Parameters of a request for the vector of its prompt.

    Raises:
        RequestError: There is no such pooling, or the number of tokens is not one.
    """
    kinds = [kind.value for kind in Pooling]
    if pooling not in kinds:
        raise RequestError(f"pooling must be {' or '.join(kinds)}, got {shown(pooling)}", param="pooling")
    return SamplingParams(
        pooling=Pooling(pooling),
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        truncate_prompt_tokens=truncate_prompt_tokens,
    )


def numbers_of(vector: bytes) -> list[float]:
    """A vector as the engine sends it (`StepOutput.pooled`), as numbers."""
    numbers: list[float] = np.frombuffer(vector, np.float32).tolist()
    return numbers


def finished_vector(vector: Sequence[float], *, dimensions: int | None = None, normalize: bool = True) -> list[float]:
    """The first `dimensions` numbers of a vector, with length 1 if wanted.

    Raises:
        RequestError: It has fewer.
    """
    if dimensions is not None and not 1 <= dimensions <= len(vector):
        raise RequestError(f"dimensions must be from 1 to {len(vector)}, got {dimensions}", param="dimensions")
    numbers = np.array(vector[:dimensions], np.float32)
    length = float(np.linalg.norm(numbers)) if normalize else 1.0
    shown_numbers: list[float] = (numbers / max(length, 1e-12)).tolist()
    return shown_numbers


def as_embedding(
    output: RequestOutput, *, dimensions: int | None = None, normalize: bool = True
) -> EmbeddingRequestOutput:
    """The output of a request for a vector, as `LLM.embed` returns it."""
    vector = [] if output.embedding is None else output.embedding
    is_there = output.error is None and bool(vector)
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        prompt=output.prompt,
        prompt_token_ids=output.prompt_token_ids,
        outputs=EmbeddingOutput(
            embedding=finished_vector(vector, dimensions=dimensions, normalize=normalize) if is_there else []
        ),
        num_cached_tokens=output.num_cached_tokens,
        error=output.error,
    )
