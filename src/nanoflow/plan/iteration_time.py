"""What an iteration takes, from a few coefficients: the engine's own estimate, fitted to iterations that were measured.

The scheduler bounds prompts by it (`scheduler/pace.py`), so it must be quick, and may never fall when a batch grows. It
is coarser than the cost model of the laboratory, which predicts plans from profiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.graph.operation import BatchShape

# Breakpoints of `floor_tokens` that a fit tries.
_MAX_BREAKPOINTS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTime:
    """Coefficients, none of them negative.

        time = fixed_s + token_s * max(tokens, floor_tokens) + sampled_s * rows with logits
               + key_s * keys that decodes attend to + pair_s * pairs of a prompt's token and a key it attends to

    Attributes:
        fixed_s: Of any iteration.
        token_s: Of a token in the products with weights.
        floor_tokens: Fewer tokens take as long as so many: the weights must be read.
        sampled_s: Of a row with logits.
        key_s: Of a key, for each decode that attends to it.
        pair_s: Of a key, for each token of a prompt that attends to it.

    Raises:
        ValueError: A coefficient is negative.
    """

    fixed_s: float = 0.0
    token_s: float = 0.0
    floor_tokens: int = 0
    sampled_s: float = 0.0
    key_s: float = 0.0
    pair_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def predict_s(self, shape: BatchShape) -> float:
        """Seconds that an iteration of this shape takes; never less for a shape that is larger in any number."""
        return (
            self.fixed_s
            + self.token_s * max(shape.num_tokens, self.floor_tokens)
            + self.sampled_s * shape.num_sampled
            + self.key_s * shape.decode_context
            + self.pair_s * shape.prefill_context
        )


def fit_iteration_time(samples: Sequence[tuple[BatchShape, float]]) -> IterationTime:
    """The coefficients whose predictions are off by the least squared part of the measured times.

    For a given `floor_tokens` that is a linear problem with coefficients of at least 0; the sizes of the measured
    batches are tried, and the best is kept. What the samples do not tell apart goes to any of the coefficients in
    question: to predict long contexts some samples must have them.

    Args:
        samples: Shapes and seconds. A fit of use has a dozen: few and many decodes, short and long contexts, chunks of
            prompts from few tokens to the whole budget, early and late in a prompt (`engine/warmup.py`).

    Raises:
        ValueError: There is no sample, or a time is not positive.
    """
    if not samples:
        raise ValueError("there must be a measured iteration to fit to")
    times_s = np.array([time_s for _, time_s in samples])
    if not (times_s > 0).all():
        raise ValueError(f"times must be positive, got {times_s.min()}")
    tokens = np.array([shape.num_tokens for shape, _ in samples], dtype=np.float64)
    columns = np.array(
        [(1, 0, shape.num_sampled, shape.decode_context, shape.prefill_context) for shape, _ in samples],
        dtype=np.float64,
    )
    # Without a floor first: one is taken only if it explains the samples better.
    found: tuple[float, int, NDArray[np.float64]] | None = None
    for floor in _breakpoints(tokens):
        columns[:, 1] = np.maximum(tokens, floor)
        coefficients, error = _least_squares(columns / times_s[:, None])
        if found is None or error < found[0] * (1 - 1e-6):
            found = error, floor, coefficients
    assert found is not None
    _, floor, (fixed_s, token_s, sampled_s, key_s, pair_s) = found
    return IterationTime(
        fixed_s=float(fixed_s),
        token_s=float(token_s),
        floor_tokens=floor,
        sampled_s=float(sampled_s),
        key_s=float(key_s),
        pair_s=float(pair_s),
    )


def _breakpoints(tokens: NDArray[np.float64]) -> Iterator[int]:
    """0, then sizes of batches, evenly among them if they are many."""
    sizes = np.unique(tokens.astype(np.int64))
    places = np.linspace(0, len(sizes) - 1, min(len(sizes), _MAX_BREAKPOINTS)).astype(np.int64)
    yield from (0, *sizes[places].tolist())


def _least_squares(relative: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """x >= 0 with the least |relative x - 1|, and that; columns are scaled first, as they differ by many decades."""
    # Takes a third of a second to import, which only a fit should cost.
    from scipy.optimize import nnls

    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1
    scaled, error = nnls(relative / scale, np.ones(len(relative)))
    return scaled / scale, float(error)
