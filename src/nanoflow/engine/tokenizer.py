"""Text to token ids and back.

`Tokenizer` encodes and decodes with the tokens of tokenizer.json; how files are read says `tokenizer_files.py`. Text of
tokens that come one by one is made in `detokenize.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.engine.token_bytes import TokenBytes, byte_reader, byte_rule, character_offsets, is_text
from nanoflow.engine.tokenizer_files import MissingTokenizerError, TokenizerError, read_tokenizer, refusal
from nanoflow.engine.tokenizer_files import one_line as _one_line
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_name
from nanoflow.request import RequestError

__all__ = ["REPLACEMENT", "ChatMessage", "MissingTokenizerError", "Tokenizer", "TokenizerError", "load_tokenizer"]

ChatMessage = Mapping[str, Any]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A model's tokenizer. Methods may be called from several threads.

    Args:
        fast: A `transformers` tokenizer: names of special tokens, chat template, and tokens if there is no `backend`.
        chat_template: Jinja text that replaces the tokenizer's own template.
        backend: The `tokenizers.Tokenizer` whose tokens count.

    Raises:
        TokenizerError: There is no backend.

    Attributes:
        byte_rule: How its tokens stand for bytes; None if its decoder does more than put bytes together.
    """

    def __init__(self, fast: Any, chat_template: str | None = None, *, backend: Any = None) -> None:
        if backend is None and not fast.is_fast:
            raise TokenizerError(f"{type(fast).__name__} has no fast version, and only fast tokenizers are supported")
        self._fast = fast
        self._chat_template = chat_template or fast.chat_template
        # The backend is used directly: its methods keep no state between calls, so that threads do not meet in them.
        self._backend = fast.backend_tokenizer if backend is None else backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_texts: dict[int, str] = {}
        self.byte_rule = byte_rule(self._backend.decoder)
        self._byte_reader = byte_reader(self._backend.decoder)
        self._token_bytes = {skips: TokenBytes(partial(self._read_token_bytes, skips)) for skips in (False, True)}

    @classmethod
    def load(cls, config: EngineConfig) -> Tokenizer:
        """The tokenizer that a config names, or its model's own.

        Raises:
            ModelError: The model is not to be found.
            MissingTokenizerError: Its folder has no tokenizer.
            TokenizerError: The tokenizer or the chat template cannot be read.
        """
        files = read_tokenizer(_source(config))
        return cls(files.names, _read_template(config.chat_template), backend=files.backend)

    @property
    def vocab_size(self) -> int:
        """Number of token ids with a text, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end of sequence; empty if it has none."""
        name = self._fast.eos_token
        token_id = None if name is None else self._backend.token_to_id(str(name))
        return () if token_id is None else (int(token_id),)

    @property
    def has_chat_template(self) -> bool:
        """True if conversations can be encoded."""
        return self._chat_template is not None

    @cached_property
    def special_names(self) -> Mapping[str, int]:
        """Ids of the special tokens by name: as the vocabulary writes it, and as a text shows it."""
        names = ((name, i) for i in sorted(self._special_ids) for name in (self._name(i), self.token_text(i)))
        return {name: token_id for name, token_id in names if name}

    @property
    def splits_characters(self) -> bool:
        """True if a token may be a part of a character; then `token_bytes` knows all tokens."""
        return self._byte_reader is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: The text has lone surrogates, which are no characters, or the tokenizer fails at it.
        """
        return list(self._encoding(text, add_special_tokens).ids)

    def text_offsets(self, text: str) -> list[int]:
        """Where each token that `encode` gives begins in the text; where a token adds no text, that of the next.

        Parts of a character begin where it begins. Raises as `encode`.
        """
        encoding = self._encoding(text, True)
        if self.byte_rule is not None:
            added = encoding.special_tokens_mask
            parts = [b"" if is_added else self.bytes_of(i) for i, is_added in zip(encoding.ids, added, strict=True)]
            if b"".join(parts).removeprefix(b" ") == text.encode().removeprefix(b" "):
                return character_offsets(parts, num_left_out=sum(map(len, parts)) - len(text.encode()))
        # The tokenizer changes texts. It says what its tokens are of, without the spaces around them.
        offsets, end = [], 0
        for token_start, token_end in encoding.offsets:
            offsets.append(end if token_start == token_end else min(token_start, end))
            end = max(end, token_end)
        return offsets

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids without a token give no text, bytes that are no character give U+FFFD.

        Raises:
            ValueError: The tokenizer fails at them.
        """
        try:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise refusal(error, "the tokenizer cannot decode these tokens") from error

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a text: with its leading space, special tokens by name.

        What is not a whole character shows as U+FFFD, so that several tokens may have the same text: see `bytes_of`.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._read_token_text(token_id)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, a part of a character too; special tokens are spelled out."""
        if self.byte_rule is not None:
            return self.token_bytes(skip_special_tokens=False)[token_id]
        if self.splits_characters:
            data = self.token_bytes(skip_special_tokens=False)[token_id]
            if not is_text(data):
                return data
        return self.token_text(token_id).encode()

    def token_bytes(self, *, skip_special_tokens: bool) -> TokenBytes:
        """Bytes of each token id before the decoder does whatever it does beside; none for tokens that never show.

        Raises:
            ValueError: Tokens do not stand for bytes (when a token is looked up).
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

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None
        except BaseException as error:
            raise refusal(error, "the tokenizer cannot encode this text") from error

    def _read_token_bytes(self, skip_special_tokens: bool, token_id: int) -> bytes:
        if self._byte_reader is None:
            raise ValueError("the tokens of this tokenizer do not stand for bytes")
        if self.is_silent(token_id, skip_special_tokens=skip_special_tokens):
            return b""
        return self._byte_reader(self._name(token_id))

    def _name(self, token_id: int) -> str:
        """A token as the vocabulary writes it; empty if there is none."""
        return str(self._backend.id_to_token(token_id) or "")

    def _read_token_text(self, token_id: int) -> str:
        # Some decoders drop the leading space of a text, so the second of two is the one to look at.
        try:
            alone, twice = self.decode([token_id], False), self.decode([token_id, token_id], False)
        # It has a name even if it has no text.
        except ValueError:
            return self._name(token_id)
        return (twice[len(alone) :] if twice.startswith(alone) else "") or alone


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


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the chat template {file} cannot be read: {_one_line(error)}") from error
