"""Products on a CPU: in few shapes whatever the batch, and the same as those of the reference."""

from __future__ import annotations

import pytest
import torch

from nanoflow.kernels.cpu import MAX_ROWS, _products, row_blocks


def test_parts_are_all_rows_once_and_few_shapes_serve_all() -> None:
    sizes = set()
    for num_rows in range(1, 2 * MAX_ROWS + 50):
        blocks = row_blocks(num_rows)
        assert [row for rows, _ in blocks for row in range(num_rows)[rows]] == list(range(num_rows))
        for rows, padded in blocks:
            count = rows.stop - rows.start
            assert count <= padded <= MAX_ROWS and padded <= count * 1.125
            sizes.add(padded)
    assert len(sizes) == 48 and set(range(1, 17)) <= sizes
    assert row_blocks(0) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 17, 100, MAX_ROWS, MAX_ROWS + 1, 3 * MAX_ROWS - 7])
def test_padding_changes_no_product(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((num_rows, 48), (80, 48), (80,)))
    expected = x.float() @ weight.float().t() + bias.float()
    found = torch.full((num_rows, 80), torch.nan, dtype=dtype)
    for rows, product in _products(x, weight, [bias]):
        found[slice(None) if rows is None else rows] = product
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_shapes_of_many_batches_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN is asked for, not what is computed: as many shapes as there are, it keeps code for."""
    shapes = set()
    real = torch.ops.mkldnn._linear_pointwise

    def noted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        result: torch.Tensor = real(x, *rest)
        return result

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    weight = torch.randn(8, 4)
    for num_rows in range(1, 700, 3):
        list(_products(torch.randn(num_rows, 4), weight, []))
    assert len(shapes) <= 48
