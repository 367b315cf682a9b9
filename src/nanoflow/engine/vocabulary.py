"""The vocabulary of a model for grammars, which the engine's process needs though it makes no text."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import load_tokenizer
from nanoflow.grammars.compiled import vocabulary
from nanoflow.grammars.text import GrammarError


def vocabulary_of(config: EngineConfig, eos_token_ids: Sequence[int], vocab_size: int) -> LLTokenizer:
    """The bytes of the model's tokens, and what ends a completion: the model's end of sequence, and the tokenizer's.

    Raises:
        GrammarError: There is no tokenizer, or it is of a kind that has no bytes.
    """
    tokenizer = load_tokenizer(config)
    if tokenizer is None:
        raise GrammarError("this model has no tokenizer")
    tokenizer_json = tokenizer.as_json()
    tokenizer.close()
    # A model may name tokens that its tokenizer does not have; no grammar ends with these.
    known = (token_id for token_id in (*eos_token_ids, *tokenizer.eos_token_ids) if token_id < tokenizer.vocab_size)
    ends = tuple(dict.fromkeys(known))
    return vocabulary(tokenizer_json, vocab_size=vocab_size, eos_token_ids=ends)
