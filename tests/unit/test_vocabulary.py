"""The made-up vocabulary: every token of it has text, and texts come back as they were."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.vocabulary import main

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer


def test_every_token_has_text_and_texts_come_back(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--size", "2000"]) == 0
    tokenizer = Tokenizer.load(EngineConfig(tokenizer=str(tmp_path)))
    assert tokenizer.vocab_size == 2000
    assert all(tokenizer.decode([token_id]) for token_id in range(2000))
    for text in ("hi you", "漢字 👍🏽"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
