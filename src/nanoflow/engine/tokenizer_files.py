"""Read the parts of a `Tokenizer` from a model folder or a Hub name: a backend, names of special tokens, templates.

The tokens are those of tokenizer.json, as the `tokenizers` library reads it. `transformers` has a class for each
architecture, and some of these build their own tokens from the vocabulary alone, differently in each version: a
byte-level vocabulary with a Llama class loses its spaces. So `transformers` is used only for names of special tokens
and chat templates that the files do not give (`tokenizer_names.py`). Options about tokens in tokenizer_config.json
(`add_bos_token`, `add_prefix_space`, `legacy`, `added_tokens_decoder`) have no effect. Only a folder without
tokenizer.json gets its tokens from `transformers`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.engine.tokenizer_names import read_names
from nanoflow.errors import one_line
from nanoflow.models.gguf_file import is_gguf
from nanoflow.request import RequestError

logger = logging.getLogger(__name__)

_MAX_NAMED = 5  # in a message
# Files that may contain a vocabulary, or name the file that does.
_VOCABULARIES = ("token*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_HOW_TO_CONVERT = (
    "make one where transformers, sentencepiece and tiktoken are installed: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
# Exceptions that end the program. All others are taken for errors of the tokenizer: a panic in its Rust library is a
# BaseException whose class cannot be imported.
_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded; the message is one line that says why."""


class MissingTokenizerError(TokenizerError):
    """The model folder has no tokenizer at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What was read from a tokenizer's files.

    Attributes:
        names: Has names of special tokens and the chat template: `TokenizerNames`, or a `transformers` tokenizer.
        backend: The `tokenizers.Tokenizer` that encodes and decodes.
    """

    names: Any
    backend: Any


def read_tokenizer(source: str | Path) -> TokenizerFiles:
    """Read a tokenizer; no Python of a model folder is ever run.

    Args:
        source: Folder, GGUF file, or Hub name. From the Hub, files are fetched without the model's weights.

    Raises:
        MissingTokenizerError: The folder has no tokenizer.
        TokenizerError: Its files cannot be read.
    """
    folder = Path(source)
    if is_gguf(folder):
        return _of_gguf(folder)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise MissingTokenizerError(f"{folder} has no tokenizer (tokenizer.json); name one with tokenizer")
    try:
        file = _file(source, "tokenizer.json")
        return _converted(source) if file is None else _read_file(source, file)
    except TokenizerError:
        raise
    # Broken files can raise almost any exception; all mean the same for the user.
    except BaseException as error:
        raise refusal(error, f"the tokenizer of {source} cannot be loaded", TokenizerError) from None


def _of_gguf(path: Path) -> TokenizerFiles:
    from nanoflow.engine.gguf_tokenizer import read_gguf_tokenizer

    try:
        names, backend = read_gguf_tokenizer(path)
    except BaseException as error:
        raise refusal(error, "the tokenizer cannot be loaded", TokenizerError) from None
    return TokenizerFiles(names=names, backend=backend)


def refusal(error: BaseException, what: str, kind: type[ValueError] = RequestError) -> BaseException:
    """The exception to raise for one from a tokenizer: an error of one line, unless it ends the program."""
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
    """Warn of tokens that the config names but the vocabulary lacks, since a chat template may use them."""
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
    # The class is unknown to this version, or cannot read this vocabulary.
    except Exception:
        names = None
    # If a file is missing, some classes return something else than a tokenizer.
    if isinstance(names, PreTrainedTokenizerBase):
        return names
    # Only names are needed, so any class will do; this one reads all vocabularies.
    return PreTrainedTokenizerFast.from_pretrained(str(source))


def _converted(source: str | Path) -> TokenizerFiles:
    """Convert files of older formats with `transformers`."""
    from transformers import AutoTokenizer

    try:
        names = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:
        problem = f"{source} has no tokenizer.json, and its other files cannot be converted ({one_line(error)})"
        raise TokenizerError(f"{problem}; {_HOW_TO_CONVERT}") from None
    if not getattr(names, "is_fast", False):
        raise TokenizerError(f"{source} has no tokenizer.json and no class that could convert it; {_HOW_TO_CONVERT}")
    return TokenizerFiles(names=names, backend=names.backend_tokenizer)
