"""The model's tokenizer as `transformers` has it, for users who want its methods; the engine does without.

`tokenizer.py` has the one that requests are read with.
"""

from __future__ import annotations

from typing import Any

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer, source_of
from nanoflow.errors import one_line
from nanoflow.request import RequestError


def transformers_tokenizer(config: EngineConfig, own: Tokenizer | None = None) -> Any:
    """Load it. It is imported here, as it takes seconds.

    Args:
        config: What the engine was started with.
        own: The engine's. Where its tokens differ, which happens with classes that build tokens of their own, those of
            the engine are put in their place: what is encoded here means the same there.

    Raises:
        RequestError: `transformers` cannot load it, or the model has none.
    """
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(source_of(config)), trust_remote_code=False)
    # Broken files surface as almost any exception.
    except Exception as error:
        raise RequestError(f"transformers cannot load this model's tokenizer: {one_line(error)}") from None
    if own is not None:
        own.put_into(found)
    return found
