"""Launches of the row-wise kernels at any size on random inputs, and a comparison of two kernels on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import AttentionDims, Dims, NormDims, Operation, OpKind, Resource, RowDims
from nanoflow.kernels.launch import BatchInputs, Kernel, Launch, LayerCache, Rotation
from tests.graphs import batch_of

VOCAB_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Makes launches of `num_tokens` tokens, of which those from `start` on are computed.

    Index tensors are for all tokens; output tensors are NaN.
    """

    num_tokens: int
    dtype: torch.dtype
    device: torch.device
    start: int = 0
    seed: int = 0

    def embed(self, width: int) -> Launch:
        """An embedding of random ids."""
        return self._launch(OpKind.EMBED, RowDims(width=width), (), (width,), ((VOCAB_SIZE, width),))

    def gather_rows(self, width: int) -> Launch:
        """A gather of random rows."""
        launch = self._launch(OpKind.GATHER_ROWS, RowDims(width=width), (), (width,), ())
        return replace(launch, reads=(self._random(VOCAB_SIZE, width),))

    def rms_norm(self, width: int) -> Launch:
        """RMSNorm of rows with deviation 1."""
        return self._launch(OpKind.RMS_NORM, NormDims(width=width, eps=1e-5), (width,), (width,), ((width,),))

    def rms_norm_add(self, width: int) -> Launch:
        """RMSNorm of rows with deviation 1, added to other rows; the weight is float32."""
        launch = self._launch(OpKind.RMS_NORM_ADD, NormDims(width=width, eps=1e-5), (width, width), (), ((width,),))
        x, hidden = launch.reads
        return replace(launch, reads=(x, hidden), writes=(hidden,), weights=(launch.weights[0].float(),))

    def geglu(self, width: int) -> Launch:
        """SwiGLU of gate and up, with some values far from 0 on both sides."""
        launch = self._launch(OpKind.GEGLU, RowDims(width=width), (2 * width,), (width,), ())
        launch.reads[0][:, ::7] *= 50.0
        return launch

    def scaled_embed(self, width: int) -> Launch:
        """An embedding with a factor that no 16-bit dtype can represent."""
        return self._launch(OpKind.EMBED, RowDims(width=width, scale=width**0.5), (), (width,), ((VOCAB_SIZE, width),))

    def with_exact_weights(self, launch: Launch) -> Launch:
        """RMSNorm with a float32 weight."""
        return replace(launch, weights=tuple(weight.float() for weight in launch.weights))

    def swiglu(self, width: int) -> Launch:
        """GeGLU of gate and up, with some values far from 0 on both sides."""
        launch = self._launch(OpKind.SWIGLU, RowDims(width=width), (2 * width,), (width,), ())
        launch.reads[0][:, ::7] *= 50.0
        return launch

    def rope_append(self, dims: AttentionDims, page_size: int) -> Launch:
        """Rotation and cache append; every token has its own slot in a cache of NaN."""
        d, width = dims.head_dim, dims.q_width + 2 * dims.kv_width
        weights = () if dims.norm_eps is None else ((d,), (d,))
        launch = self._launch(OpKind.ROPE_APPEND, dims, (width,), (dims.q_width,), weights)
        num_pages = -(-self.num_tokens // page_size) + 3
        shape = (num_pages, dims.num_kv_heads, page_size, d)
        angles = torch.rand(self.num_tokens, (dims.rotary_dim or d) // 2, generator=self._generator(8)) * 6.3
        slots = torch.randperm(num_pages * page_size, generator=self._generator(9))[: self.num_tokens]
        pages = replace(launch.inputs.pages[0], slots=slots.to(self.device))
        rotation = Rotation(cos=angles.cos().to(self.device), sin=angles.sin().to(self.device))
        cache = LayerCache(keys=self._poison(*shape), values=self._poison(*shape))
        return replace(launch, inputs=replace(launch.inputs, pages=(pages,)), cache=cache, rotation=rotation)

    def _launch(
        self,
        kind: OpKind,
        dims: Dims,
        read_widths: tuple[int, ...],
        written_widths: tuple[int, ...],
        weight_shapes: tuple[tuple[int, ...], ...],
    ) -> Launch:
        num_rows = self.num_tokens - self.start
        op = Operation(name=kind, kind=kind, resource=Resource.MEMORY, reads=(), writes=(), dims=dims)
        return Launch(
            op=op,
            layer=0,
            tokens=TokenRange(start=self.start, stop=self.num_tokens),
            reads=tuple(self._random(num_rows, width, seed=2 + place) for place, width in enumerate(read_widths)),
            writes=tuple(self._poison(num_rows, width) for width in written_widths),
            weights=tuple(self._random(*shape, seed=5 + place) for place, shape in enumerate(weight_shapes)),
            inputs=self._inputs(),
            cache=None,
        )

    def _inputs(self) -> BatchInputs:
        """Index tensors of decodes; the rows with logits, and what only `rope_append` reads, are replaced."""
        requests = [(0, 1)] * self.num_tokens
        batch = batch_of(requests, self.num_tokens, VOCAB_SIZE, seed=self.seed)
        inputs = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=self.num_tokens, device=self.device).build(batch)
        rows = torch.randint(VOCAB_SIZE, (self.num_tokens,), generator=self._generator(7))
        return replace(inputs, logit_tokens=rows.to(self.device))

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * self.seed + seed)

    def _random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=self._generator(seed)).to(self.device, self.dtype)

    def _poison(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)


def results_of(kernel: Kernel, launch: Launch) -> tuple[Tensor, ...]:
    """What a kernel writes to its tensors and its cache; it runs on copies."""
    copies = {id(tensor): tensor.clone() for tensor in (*launch.reads, *launch.writes)}
    cache = launch.cache and LayerCache(keys=launch.cache.keys.clone(), values=launch.cache.values.clone())
    mine = replace(
        launch,
        reads=tuple(copies[id(tensor)] for tensor in launch.reads),
        writes=tuple(copies[id(tensor)] for tensor in launch.writes),
        cache=cache,
    )
    kernel(mine)
    return (*mine.writes, *((cache.keys, cache.values) if cache else ()))


def assert_twins(fast: Kernel, slow: Kernel, launch: Launch, *, truncates: bool = False) -> None:
    """Check that both kernels write the same up to the last digit, and mostly exactly the same.

    They round at the same places. So in a 16-bit dtype results differ only if float32 values that differ in their last
    digits fall on different sides of a rounding border, which is one element in thousands. Rounding once more or less
    would change a tenth of all elements or more. Where a rounded value is multiplied, one step becomes up to two.

    Args:
        fast, slow: The kernels.
        launch: Their argument.
        truncates: The fast kernel truncates instead of rounding; then a few steps of the dtype are allowed.
    """
    dtype = launch.writes[0].dtype
    step = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    rtol = 8 * step if truncates else 2 * step
    for ours, expected in zip(results_of(fast, launch), results_of(slow, launch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=rtol, equal_nan=True)
        if dtype != torch.float32 and not truncates:
            is_moved = (ours != expected) & ~expected.isnan()
            assert is_moved.float().mean() < 0.01
