"""Structured output on the device: masks at a real vocabulary, whole runs, and no iteration left out for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.common.vocabulary import write_vocabulary
from benchmarks.robustness import schemas

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.kernels import sample
from tests import sample_cases
from tests.templates import CALLING

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nanoflow.kernels import triton_sample

pytestmark = pytest.mark.gpu
VOCAB_SIZE, DEVICE = 128256, torch.device("cuda")


@pytest.mark.parametrize("columns", [{"scale": 0.0}, {}, {"top_p": 0.9}, {"top_k": 20}, {"log_min_p": -4.0}], ids=str)
@pytest.mark.parametrize("num_allowed", [1, 2, 1000])
def test_masked_rows(columns: dict[str, Any], num_allowed: int) -> None:
    """Of 64 rows every second has a mask; the others draw as without any."""
    generator = torch.Generator().manual_seed(num_allowed)
    allowed = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:num_allowed] for _ in range(32)])
    bits = torch.zeros(32, VOCAB_SIZE, dtype=torch.uint8).scatter_(1, allowed, 1).numpy()
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    tables = sample_cases.tables(1, VOCAB_SIZE)
    tables = sample.SampleTables(
        seen=tables.seen, edit_ids=tables.edit_ids, edit_values=tables.edit_values, masks=torch.from_numpy(words)
    )
    rows = np.arange(64)
    mask = np.where(rows % 2, 0, rows // 2 + 1)
    logits = 2 * torch.randn(64, VOCAB_SIZE, generator=generator).to(DEVICE, torch.bfloat16)
    one, other = (sample_cases.to(tables, DEVICE) for _ in range(2))
    token_ids, best = triton_sample.choose(logits, sample_cases.numbers(64, **columns, mask=mask).to(DEVICE), one)
    expected, expected_best = sample.choose(logits, sample_cases.numbers(64, **columns, mask=mask).to(DEVICE), other)
    free, _ = triton_sample.choose(logits, sample_cases.numbers(64, **columns).to(DEVICE), one)
    assert torch.equal(best, expected_best)
    assert int((token_ids != expected).sum()) <= 1  # where rounding decides
    assert torch.equal(token_ids[1::2], free[1::2])
    assert all(bits[place // 2, token_id] for place, token_id in list(enumerate(token_ids.tolist()))[::2])


def completed(llm: LLM, structured: list[Any], max_tokens: int) -> list[RequestOutput]:
    params = [
        SamplingParams(max_tokens=max_tokens, seed=seed, structured_outputs=one) for seed, one in enumerate(structured)
    ]
    return llm.generate(["A record as JSON: "] * len(params), params, use_tqdm=False)


@pytest.mark.parametrize("is_captured", [True, False])
def test_what_has_ended_validates(is_captured: bool) -> None:
    made = [schemas.made_schema(1, number) for number in range(60)]
    with LLM(max_num_seqs=32, max_model_len=512, cuda_graphs=is_captured) as llm:
        found = schemas.judged(made, completed(llm, [{"json": schema} for schema in made], 200))
    assert found["findings"] == [] and found["num_of"]["stop"] > 30, found


def test_other_requests_are_not_affected() -> None:
    with LLM(max_num_seqs=32, max_model_len=512, dtype="float32") as llm:
        free = completed(llm, [None] * 16, 60)
        among = completed(llm, [{"regex": "[a-z ]{90,}"} if seed % 2 else None for seed in range(16)], 60)
    for place in range(0, 16, 2):
        assert free[place].outputs[0].token_ids == among[place].outputs[0].token_ids


def test_a_large_vocabulary(tmp_path: Path) -> None:
    """Tokens of a model with random weights are anything, so all that is right is the mask's doing."""
    write_vocabulary(tmp_path, VOCAB_SIZE)
    options: dict[str, Any] = {"model": "preset:llama-3.2-1b", "tokenizer": str(tmp_path), "max_model_len": 512}
    with LLM(max_num_seqs=64, **options) as llm:
        outputs = completed(llm, [{"regex": "[a-z ]{20}[0-9]{5}"}, {"choice": ["red", "green"]}] * 16, 60)
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop", output
    assert all(len(output.outputs[0].text) == 25 for output in outputs[::2])
    assert all(output.outputs[0].text in ("red", "green") for output in outputs[1::2])


def test_forced_tokens_come_together_and_change_nothing() -> None:
    """With drafts a long forced text takes few iterations; every forced token counts."""
    shape = {"regex": "[xy] is the beginning of a long text that is forced, [0-9]{3}"}
    options: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 256, "dtype": "float32"}
    with LLM(**options) as plain, LLM(**options, speculative="ngram:8") as drafting:
        one, other = (completed(llm, [shape, None, shape], 60) for llm in (plain, drafting))
        counts = drafting._engine.stats()
    assert [each.outputs[0].token_ids for each in one] == [each.outputs[0].token_ids for each in other]
    assert counts.num_accepted_tokens > len(one[0].outputs[0].token_ids) * 0.6, counts


@pytest.mark.parametrize("speculative", [None, "ngram:4"])
def test_reasoning_is_closed_at_its_bound(speculative: str | None) -> None:
    messages = [{"role": "user", "content": "def f(a, b):"}]
    budgets = (0, 5, 17)
    params = [SamplingParams(max_tokens=40, thinking_token_budget=each, seed=each, ignore_eos=True) for each in budgets]
    with LLM(chat_template=CALLING, max_num_seqs=8, max_model_len=256, speculative=speculative) as llm:
        closing = llm.tokenizer.encode("</think>", add_special_tokens=False)
        outputs = llm.chat([messages] * 3, params, chat_template_kwargs={"opens": True}, use_tqdm=False)
    for output, budget in zip(outputs, budgets, strict=True):
        assert output.outputs[0].token_ids[budget:][: len(closing)] == closing
