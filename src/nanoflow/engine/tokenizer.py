"""Text to token ids and back.

`Tokenizer` is a fast Hugging Face tokenizer; no Python of a model folder is ever run. Text of tokens that come one by
one is made in `detokenize.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.engine.token_bytes import TokenBytes, byte_rule
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_name
from nanoflow.request import RequestError

ChatMessage = Mapping[str, Any]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded; one line that says why."""


class MissingTokenizerError(TokenizerError):
    """The model folder has no tokenizer at all."""


class Tokenizer:
    """A model's tokenizer. Methods may be called from several threads.

    Args:
        fast: A `transformers` fast tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own template.

    Raises:
        TokenizerError: It is not a fast tokenizer.

    Attributes:
        byte_rule: How its tokens stand for bytes; None if they do not.
    """

    def __init__(self, fast: Any, chat_template: str | None = None) -> None:
        if not fast.is_fast:
            raise TokenizerError(f"{type(fast).__name__} has no fast version, and only fast tokenizers are supported")
        self._fast = fast
        self._chat_template = chat_template or fast.chat_template
        # The backend is used directly: its methods keep no state between calls, so that threads do not meet in them.
        self._backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_texts: dict[int, str] = {}
        self.byte_rule = byte_rule(self._backend.decoder)
        self._token_bytes = {skips: TokenBytes(partial(self._read_token_bytes, skips)) for skips in (False, True)}

    @classmethod
    def load(cls, config: EngineConfig) -> Tokenizer:
        """The tokenizer that a config names, or its model's own.

        Raises:
            ModelError: The model is not to be found.
            MissingTokenizerError: Its folder has no tokenizer.
            TokenizerError: The tokenizer or the chat template cannot be read.
        """
        return cls(_load_fast(_source(config)), _read_template(config.chat_template))

    @property
    def vocab_size(self) -> int:
        """Number of token ids with a text, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end of sequence; empty if it has none."""
        eos_token_id = self._fast.eos_token_id
        return () if eos_token_id is None else (int(eos_token_id),)

    @property
    def has_chat_template(self) -> bool:
        """True if conversations can be encoded."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: The text has lone surrogates, which are no characters.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids without a token give no text, bytes that are no character give U+FFFD."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a text: with its leading space, special tokens by name."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._read_token_text(token_id)
        return text

    def token_bytes(self, *, skip_special_tokens: bool) -> TokenBytes:
        """Bytes of each token id by `byte_rule`; none for tokens that never show in a text.

        Raises:
            ValueError: There is no such rule (when a token is looked up).
        """
        return self._token_bytes[skip_special_tokens]

    def is_silent(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """True if a token never shows in a text: it is special and these are left out, or there is no such token."""
        if token_id in self._special_ids:
            return skip_special_tokens
        return self._backend.id_to_token(token_id) is None

    def apply_chat_template(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: Each with "role" and "content".
            add_generation_prompt: End with what opens the assistant's answer.
            continue_final_message: Leave the last message open, to be continued; not with `add_generation_prompt`.

        Raises:
            RequestError: There is no chat template, or it refuses the messages; the message says why.
        """
        if not self.has_chat_template:
            raise RequestError("this model has no chat template; give one (chat_template), or complete a plain prompt")
        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        # Templates are programs of the model's maker: whatever they raise is about these messages.
        except Exception as error:
            raise RequestError(f"the chat template refuses the messages: {_one_line(error)}") from error
        return self.encode(text, add_special_tokens=False)

    def _read_token_bytes(self, skip_special_tokens: bool, token_id: int) -> bytes:
        if self.byte_rule is None:
            raise ValueError("the tokens of this tokenizer do not stand for bytes")
        if self.is_silent(token_id, skip_special_tokens=skip_special_tokens):
            return b""
        return self.byte_rule.read(self._backend.id_to_token(token_id))

    def _read_token_text(self, token_id: int) -> str:
        # Some decoders drop the leading space of a text, so the second of two is the one to look at.
        alone, twice = self.decode([token_id], False), self.decode([token_id, token_id], False)
        return twice[len(alone) :] if twice.startswith(alone) else alone


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of a config; None if there is none and weights are random, as in a benchmark of an architecture.

    A preset has none of its own, and what else it lacks is for those to say who load the model.

    Raises:
        ModelError, TokenizerError: It cannot be loaded.
    """
    if config.tokenizer is None and preset_name(config.model) is not None:
        return None
    try:
        return Tokenizer.load(config)
    except MissingTokenizerError:
        if config.load_format == "random":
            return None
        raise


def _source(config: EngineConfig) -> str | Path:
    """Folder or Hub name. A Hub tokenizer is fetched by `transformers`: without the weights that lie beside it."""
    if config.tokenizer is None:
        return locate_model(config.model, config.revision)
    if config.tokenizer == DEFAULT_MODEL:
        return locate_model(config.tokenizer)
    return config.tokenizer


def _load_fast(source: str | Path) -> Any:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("token*")) and not (folder / "vocab.json").is_file():
        raise MissingTokenizerError(f"{folder} has no tokenizer (tokenizer.json); name one with tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    # Broken files surface as almost any exception; for the user all mean the same.
    except Exception as error:
        raise TokenizerError(f"the tokenizer of {source} cannot be loaded: {_one_line(error)}") from error


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the chat template {file} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
