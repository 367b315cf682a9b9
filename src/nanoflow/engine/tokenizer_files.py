"""From a model folder or a Hub name to what `Tokenizer` is made of: a backend, and names and templates.

The tokens are those of tokenizer.json, as the `tokenizers` library reads it. `transformers` has a class for each
architecture, and some classes build tokens of their own from the vocabulary alone, each version others: a byte-level
vocabulary under a Llama class loses its spaces. So its objects give the names of special tokens and the chat template
and nothing else, and only where the files do not say these themselves (`tokenizer_names.py`). What
tokenizer_config.json says of tokens (`add_bos_token`, `add_prefix_space`, `legacy`, `added_tokens_decoder`) changes
nothing. Only a folder without tokenizer.json gets its tokens from `transformers`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.engine.tokenizer_names import read_names
from nanoflow.errors import one_line
from nanoflow.request import RequestError

logger = logging.getLogger(__name__)

_MAX_NAMED = 5  # in a message
# Any of these may hold a vocabulary or say where it is.
_VOCABULARIES = ("token*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_HOW_TO_CONVERT = (
    "make one where transformers, sentencepiece and tiktoken are installed: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
# Ends of the program. Whatever else a tokenizer raises is about what it was given: a panic of the library in Rust is a
# BaseException that has no name in Python.
_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded; one line that says why."""


class MissingTokenizerError(TokenizerError):
    """The model folder has no tokenizer at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What a tokenizer's files say.

    Attributes:
        names: Names of special tokens and the chat template: `TokenizerNames`, or a `transformers` tokenizer.
        backend: The `tokenizers.Tokenizer` that encodes and decodes.
    """

    names: Any
    backend: Any


def read_tokenizer(source: str | Path) -> TokenizerFiles:
    """Read a tokenizer; no Python of a model folder is ever run.

    Args:
        source: Folder, or Hub name: then its files are fetched, without the weights that lie beside them.

    Raises:
        MissingTokenizerError: The folder has no tokenizer.
        TokenizerError: Its files cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise MissingTokenizerError(f"{folder} has no tokenizer (tokenizer.json); name one with tokenizer")
    try:
        file = _file(source, "tokenizer.json")
        return _converted(source) if file is None else _read_file(source, file)
    except TokenizerError:
        raise
    # Broken files surface as almost any exception; for the user all mean the same.
    except BaseException as error:
        raise refusal(error, f"the tokenizer of {source} cannot be loaded", TokenizerError) from None


def refusal(error: BaseException, what: str, kind: type[ValueError] = RequestError) -> BaseException:
    """What to raise for an exception from a tokenizer: an error of one line, unless the program is to end."""
    return error if isinstance(error, _ENDS) else kind(f"{what}: {one_line(error)}")


def _file(source: str | Path, name: str) -> str | None:
    """The path of a file; None if there is none."""
    if Path(source).is_dir():
        file = Path(source) / name
        return str(file) if file.is_file() else None
    from transformers.utils import cached_file

    path: str | None = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    return path


def _read_file(source: str | Path, file: str) -> TokenizerFiles:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(file)
    names = _names(source)
    _warn_of_other_tokens(_file(source, "tokenizer_config.json"), backend)
    return TokenizerFiles(names=names, backend=backend)


def _warn_of_other_tokens(config_file: str | None, backend: Any) -> None:
    """Say which tokens the config names that are not in the vocabulary: a chat template may count on them."""
    config = {} if config_file is None else json.loads(Path(config_file).read_text(encoding="utf-8"))
    tokens = (config.get("added_tokens_decoder") or {}).values()
    named = [str(token["content"] if isinstance(token, dict) else token) for token in tokens]
    missing = [name for name in named if backend.token_to_id(name) is None]
    if missing:
        names = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
        logger.warning("tokenizer_config.json names tokens that tokenizer.json lacks, which are not used: %s", names)


def _names(source: str | Path) -> Any:
    return (read_names(Path(source)) if Path(source).is_dir() else None) or _names_by_class(source)


def _names_by_class(source: str | Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    try:
        names = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    # The class is unknown here or cannot take this vocabulary.
    except Exception:
        names = None
    # Where a file that it asks for is missing, some classes give back no tokenizer and no error.
    if isinstance(names, PreTrainedTokenizerBase):
        return names
    # Any class gives names; this one takes all vocabularies.
    return PreTrainedTokenizerFast.from_pretrained(str(source))


def _converted(source: str | Path) -> TokenizerFiles:
    """Files of older kinds, which `transformers` knows how to read."""
    from transformers import AutoTokenizer

    try:
        names = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:
        problem = f"{source} has no tokenizer.json, and its other files cannot be converted ({one_line(error)})"
        raise TokenizerError(f"{problem}; {_HOW_TO_CONVERT}") from None
    if not getattr(names, "is_fast", False):
        raise TokenizerError(f"{source} has no tokenizer.json and no class that could convert it; {_HOW_TO_CONVERT}")
    return TokenizerFiles(names=names, backend=names.backend_tokenizer)
