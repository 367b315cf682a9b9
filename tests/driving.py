"""Runs an engine on token ids, and the same prompts with transformers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoflow.batch import Int64
from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.progress import Progress

Prompt = list[int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens of each prompt, the most probable tokens at each position (if asked for), and number of preemptions."""

    tokens: list[list[int]]
    top_tokens: list[list[list[int]]]
    num_preemptions: int


def random_prompts(count: int, vocab_size: int, *, longest: int, seed: int = 0) -> list[Prompt]:
    """Prompts of mixed lengths, without special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(4, vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Greedy sampling of a fixed number of tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def expect_less(engine: Engine, part: int) -> None:
    """Divide the scheduler's estimate of remaining tokens by `part`.

    It then admits too many requests and has to preempt.
    """
    lengths = engine._scheduler._lengths
    counted, held = lengths.counted_remaining, lengths.held_remaining

    def less(remaining: Callable[[Progress], Int64], progress: Progress) -> Int64:
        return np.maximum(remaining(progress) // part, 1)

    lengths.counted_remaining = partial(less, counted)  # type: ignore[method-assign]
    lengths.held_remaining = partial(less, held)  # type: ignore[method-assign]


def run_engine(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, *, seed: int = 0) -> Run:
    """Run all prompts together to their end, and check that all resources are free afterwards."""
    assert params.max_tokens is not None
    eos_token_ids = () if params.ignore_eos else engine.facts.eos_token_ids
    for place, prompt in enumerate(prompts):
        engine.add(
            Request(
                request_id=place,
                prompt_token_ids=prompt,
                params=params,
                seed=seed + place,
                max_tokens=params.max_tokens,
                eos_token_ids=eos_token_ids,
            )
        )
    tokens: list[list[int]] = [[] for _ in prompts]
    top_tokens: list[list[list[int]]] = [[] for _ in prompts]
    while engine.has_work:
        output = engine.step()
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            tokens[request_id].append(token_id)
        for request_id, places in output.logprobs.items():
            top_tokens[request_id] += [ids[1:] for ids in places.token_ids]
        assert not any(end.error for end in output.finished.values())
    engine.check_integrity()
    assert engine.stats().pages_in_use == 0
    return Run(tokens=tokens, top_tokens=top_tokens, num_preemptions=engine.stats().num_preemptions)


def run_model(folder: Path, prompts: Sequence[Prompt], params: SamplingParams, **options: Any) -> Run:
    """Load a model, run the prompts, close it."""
    engine = build_engine(EngineConfig(model=str(folder), **{"max_num_seqs": 64, "dtype": "float32", **options}))
    try:
        return run_engine(engine, prompts, params)
    finally:
        engine.close()


class HuggingFace:
    """The same model in transformers, as an independent reference."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        # Lengths are fixed: generation must not end at the model's end of sequence.
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[list[int]]:
        """Greedy tokens of each prompt, all in one left-padded batch."""
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens = self.model.generate(
            padded, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        generated: list[list[int]] = tokens[:, longest:].tolist()
        return generated

    @torch.inference_mode()
    def logits(self, token_ids: Prompt) -> torch.Tensor:
        """float32 [tokens, vocab]."""
        logits: torch.Tensor = self.model(torch.tensor([token_ids])).logits[0].float()
        return logits
