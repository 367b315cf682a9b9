"""The model's tokenizer from `transformers`, for users who want its methods.

The engine does not use it: requests are read with `tokenizer.py`.
"""

from __future__ import annotations

from typing import Any

from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer, source_of
from nanoflow.errors import one_line
from nanoflow.request import RequestError


def transformers_tokenizer(config: EngineConfig, own: Tokenizer | None = None) -> Any:
    """Load the model's tokenizer with `transformers`, which is imported here since that takes seconds.

    Args:
        config: The engine's configuration.
        own: The engine's tokenizer. Some classes build their own tokens; those are replaced by the engine's, so that
            token ids mean the same in both.

    Raises:
        RequestError: `transformers` cannot load it, or the model has none.
    """
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(source_of(config)), trust_remote_code=False)
    # Broken files can raise almost any exception.
    except Exception as error:
        raise RequestError(f"transformers cannot load this model's tokenizer: {one_line(error)}") from None
    if own is not None:
        own.put_into(found)
    return found
