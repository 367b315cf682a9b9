"""Names of special tokens and chat templates from a tokenizer's files, without `transformers`, which takes seconds and
80 MB to import.

If the class of `transformers` would add something to the files (default names of the class, or names that only some
models have), `read_names` returns None, and `tokenizer_files.py` uses `transformers`. The tokens themselves come from
the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The names that every class has. For the first four, some classes have default values.
_OFTEN_IMPLIED = ("bos_token", "eos_token", "unk_token", "pad_token")
_NAMES = (*_OFTEN_IMPLIED, "sep_token", "cls_token", "mask_token")
# Classes without default names.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerNames:
    """What `Tokenizer` needs beside tokens, with the attributes of a `transformers` tokenizer.

    Attributes:
        tokenizer_class: The class that its files name.
        special_tokens_map: Name to text, as {"eos_token": "</s>"}.
        chat_template: One template, or several by name.
        init_kwargs: The content of tokenizer_config.json.
    """

    tokenizer_class: str
    special_tokens_map: Mapping[str, str]
    chat_template: str | dict[str, str] | None
    init_kwargs: Mapping[str, Any]

    @property
    def eos_token(self) -> str | None:
        """The end of sequence."""
        return self.special_tokens_map.get("eos_token")


def read_names(folder: Path) -> TokenizerNames | None:
    """The names in a folder's files; None if only `transformers` has them all, or the files are malformed.

    Raises:
        OSError, ValueError: A file cannot be read.
    """
    file = folder / "tokenizer_config.json"
    config = _object(file) if file.is_file() else None
    if config is None or (folder / "additional_chat_templates").exists():
        return None
    said = dict(config)
    if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").is_file():
        # An older file, used if the newer one does not list the tokens.
        said |= _object(folder / "special_tokens_map.json") or {}
    if not _says_all(said):
        return None
    texts = {name: _text_of(said[name]) for name in _NAMES if said.get(name) is not None}
    template, is_template = _template(folder, config.get("chat_template"))
    if not is_template or any(text is None for text in texts.values()):
        return None
    return TokenizerNames(
        tokenizer_class=config["tokenizer_class"],
        special_tokens_map={name: text for name, text in texts.items() if text is not None},
        chat_template=template,
        init_kwargs={name: value for name, value in config.items() if name != "tokenizer_class"},
    )


def _object(file: Path) -> dict[str, Any] | None:
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else None


def _says_all(said: Mapping[str, Any]) -> bool:
    """True if a class would add nothing."""
    kind = said.get("tokenizer_class")
    is_own = any(name.endswith("_token") and name not in _NAMES and not isinstance(said[name], bool) for name in said)
    if not isinstance(kind, str) or is_own or isinstance(said.get("extra_special_tokens"), dict):
        return False
    return kind in _PLAIN_CLASSES or all(name in said for name in _OFTEN_IMPLIED)


def _text_of(token: Any) -> str | None:
    """The text of a token, which is written as a string or as an object with options."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template(folder: Path, said: Any) -> tuple[str | dict[str, str] | None, bool]:
    """The template or templates, from a file rather than from the config; and whether they are valid."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8"), True
    if said is None or isinstance(said, str):
        return said, True
    try:
        named = {entry["name"]: entry["template"] for entry in said}
    except (LookupError, TypeError):
        return None, False
    is_named = all(isinstance(part, str) for entry in named.items() for part in entry)
    return (named, True) if is_named else (None, False)
