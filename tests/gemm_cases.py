"""Launches of products with weights on random inputs, and their expected results, summed in float32."""

from __future__ import annotations

from dataclasses import replace

import torch

from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import LinearDims, Operation, OpKind, Resource
from nanoflow.kernels import reference
from nanoflow.kernels.launch import Launch
from tests.graphs import batch_of


def linear_case(
    num_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, has_bias: bool = False
) -> Launch:
    """A product with a weight [N, K] = `shape` and outputs of about 1; the output tensor is NaN.

    Memory after the rows of the input is NaN too.
    """
    num_columns, num_features = shape

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    op = Operation(
        name="linear",
        kind=OpKind.LINEAR,
        resource=Resource.COMPUTE,
        reads=("x",),
        writes=("out",),
        dims=LinearDims(in_features=num_features, out_features=num_columns),
    )
    buffer = torch.full((num_tokens + 8, num_features), torch.nan, dtype=dtype, device=device)
    x = buffer[:num_tokens]
    x.copy_(random(num_tokens, num_features))
    weight = random(num_columns, num_features).mul_(num_features**-0.5)
    return Launch(
        op=op,
        layer=0,
        tokens=TokenRange(start=0, stop=num_tokens),
        reads=(x,),
        writes=(torch.full((num_tokens, num_columns), torch.nan, dtype=dtype, device=device),),
        weights=(weight, random(num_columns)) if has_bias else (weight,),
        inputs=InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=1, device=device).build(batch_of([(0, 1)], 1, 8, 0)),
        cache=None,
    )


def linear_swiglu_case(num_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Launch:
    """A product with a weight [2 I, K] = `shape` and SwiGLU; gates are far from 0 on both sides."""
    launch = linear_case(num_tokens, shape, dtype, device)
    half = shape[0] // 2
    launch.weights[0][:half:7] *= 20.0
    return replace(launch, writes=(launch.writes[0][:, :half].contiguous(),))


def linear_add_case(
    num_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, has_bias: bool = False
) -> tuple[Launch, torch.Tensor]:
    """A product that is added to rows between rows of NaN, and the expected rows."""
    launch = linear_case(num_tokens, shape, dtype, device, has_bias=has_bias)
    hidden = torch.full((num_tokens + 2, shape[0]), torch.nan, dtype=dtype, device=device)[1:-1]
    hidden.normal_()
    exact, x = hidden.float(), launch.reads[0]
    weights = tuple(weight.float() for weight in launch.weights)
    reference.linear_add(replace(launch, reads=(x.float(), exact), writes=(exact,), weights=weights))
    return replace(launch, reads=(x, hidden), writes=(hidden,)), exact.to(dtype)


def assert_surroundings_untouched(rows: torch.Tensor) -> None:
    """The rows before and after those of `linear_add_case` are still NaN."""
    stream = rows._base
    assert stream is not None and stream[0].isnan().all() and stream[-1].isnan().all()


def exact_linear(launch: Launch) -> torch.Tensor:
    """`reference.linear` in float32, rounded once."""
    x, out = launch.reads[0], launch.writes[0]
    exact = x.new_empty((len(x), len(launch.weights[0])), dtype=torch.float32)
    weights = tuple(weight.float() for weight in launch.weights)
    reference.linear(replace(launch, reads=(x.float(),), writes=(exact,), weights=weights))
    return exact.to(out.dtype)


def exact_linear_swiglu(launch: Launch) -> torch.Tensor:
    """`exact_linear`, then `reference.swiglu` in the dtype of the tensors."""
    gate_up = exact_linear(launch)
    out = torch.empty_like(launch.writes[0])
    reference.swiglu(replace(launch, reads=(gate_up,), writes=(out,), weights=()))
    return out


def assert_linear(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one step of the dtype; sums near 0 up to the error of adding thousands of float32 terms."""
    step = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=step, atol=5e-4)
    _assert_few_moved(out, expected)


def assert_linear_swiglu(out: torch.Tensor, expected: torch.Tensor) -> None:
    """As `assert_linear`; but one step of a gate far below 0 changes its silu, which is small, by |gate| steps."""
    step = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=4 * step, atol=2 * step)
    _assert_few_moved(out, expected)


def _assert_few_moved(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums with different last digits may be rounded to different sides, more often the finer the dtype.

    Rounding at another place, or truncating, would change about half of all elements.
    """
    most = 0.1 if out.dtype == torch.bfloat16 else 0.3
    assert (out != expected).float().mean() < most
