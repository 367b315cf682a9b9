"""Facts of an engine without a model, for benchmarks and tests of the front end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanoflow.engine.messages import EngineFacts

_ROOMY = EngineFacts(
    model_type="stub",
    vocab_size=1 << 30,
    hidden_size=64,
    max_model_len=1 << 20,
    eos_token_ids=(),
    num_pages=1 << 20,
    page_size=16,
    max_batch_tokens=8192,
    max_num_seqs=8192,
    device="cpu",
    dtype="float32",
    plan="none",
    load_s=0.0,
    warm_up_s=0.0,
)


def stub_facts(**facts: Any) -> EngineFacts:
    """Room for whatever comes, unless the arguments say less."""
    return replace(_ROOMY, **facts)
