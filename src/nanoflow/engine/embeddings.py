"""Vectors of prompts: which request asks the engine for one, and what is made of its answer.

The request generates one token, which nobody sees, so that it takes the same path as every other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanoflow.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from nanoflow.parameters import Whole, shown
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


def read_dimensions(value: object, hidden_size: int) -> int | None:
    """How many first numbers of a vector are kept, before anything is computed; None keeps all.

    Args:
        value: What is asked for.
        hidden_size: Numbers of the whole vector.

    Raises:
        RequestError: It is no integer, or the vector has fewer numbers.
    """
    if value is None:
        return None
    try:
        return Whole(low=1, high=hidden_size).read("dimensions", value)
    except RequestError as problem:
        raise RequestError(str(problem), param="dimensions") from None


def numbers_of(vector: bytes) -> list[float]:
    """A vector as the engine sends it (`StepOutput.pooled`), as numbers."""
    numbers: list[float] = np.frombuffer(vector, np.float32).tolist()
    return numbers


def finished_vector(vector: Sequence[float], *, dimensions: int | None = None, normalize: bool = True) -> list[float]:
    """The first `dimensions` numbers of a vector, with length 1 if wanted."""
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
