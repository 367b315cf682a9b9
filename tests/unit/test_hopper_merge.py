"""Parts of decode attention that several programs worked on, merged: run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)
from nanoflow.kernels.hopper.attention_programs import MAX_GROUP
from nanoflow.kernels.hopper.merge import merge_program

GROUP, KV_HEADS, HEAD_DIM, BLOCK = 3, 2, 16, 4


def attended(values: torch.Tensor, scores: torch.Tensor, begin: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of values [K, D] under scores [G, K] of these keys, and log2 of the sum of their weights."""
    powers = scores[:, begin:stop].double().exp2()
    return (powers @ values[begin:stop].double() / powers.sum(1, keepdim=True)).float(), powers.sum(1).log2().float()


@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 16, 50])
@pytest.mark.parametrize(
    "contexts", [[40, 3, 0, 17, 4, 0], [5], [0, 0, 200, 0], [4] * 9, [1, 64, 1, 64]], ids=lambda lengths: str(lengths)
)
def test_heads_are_merged_and_the_others_left_alone(contexts: list[int], num_programs: int) -> None:
    torch.manual_seed(0)
    first_row, num_rows = 2, len(contexts)
    blocks = torch.tensor([-(-context // BLOCK) for context in contexts])
    key_blocks = torch.cat([torch.tensor([0, 3, 5]), 5 + blocks.cumsum(0)]).int()
    total = int(blocks.sum()) * KV_HEADS
    per_program = -(-total // num_programs)
    values = [[torch.randn(max(context, 1), HEAD_DIM) for _ in range(KV_HEADS)] for context in contexts]
    scores = [[3 * torch.randn(GROUP, max(context, 1)) for _ in range(KV_HEADS)] for context in contexts]
    out = torch.full((num_rows, KV_HEADS, GROUP, HEAD_DIM), torch.nan)
    parts = torch.full((2 * num_programs, MAX_GROUP, HEAD_DIM), torch.nan)
    log_sums = torch.full((2 * num_programs, MAX_GROUP), torch.nan)
    expected = out.clone()
    place = 0
    for row, context in enumerate(contexts):
        for head in range(KV_HEADS):
            begin, place = place, place + int(blocks[row])
            if not context:
                continue
            first, last = begin // per_program, (place - 1) // per_program
            if first < last:
                expected[row, head] = attended(values[row][head], scores[row][head], 0, context)[0]
            for program in range(first, last + 1 if first < last else first):
                from_key = max(program * per_program - begin, 0) * BLOCK
                to_key = min((program + 1) * per_program - begin, int(blocks[row])) * BLOCK
                slot = 2 * program + (program == first)
                mean, log_sum = attended(values[row][head], scores[row][head], from_key, min(to_key, context))
                parts[slot, :GROUP], log_sums[slot, :GROUP] = mean, log_sum
    merge_program[(num_programs,)](
        out, parts, log_sums, None, key_blocks, first_row, num_rows, GROUP, KV_HEADS, HEAD_DIM, MAX_GROUP, 2
    )
    torch.testing.assert_close(out, expected, equal_nan=True)
