"""Text to token ids and back.

`Tokenizer` encodes and decodes with the tokens of tokenizer.json; how files are read says `tokenizer_files.py`. Text of
tokens that come one by one is made in `detokenize.py`, the text of a conversation in `chat_template.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.engine.conversation import Conversation
from nanoflow.engine.template_choice import ChatTemplates, TemplateFileError, read_given
from nanoflow.engine.token_bytes import TokenBytes, byte_reader, byte_rule, character_offsets, is_text
from nanoflow.engine.tokenizer_files import MissingTokenizerError, TokenizerError, read_tokenizer, refusal
from nanoflow.models.config_json import refuse_unknown
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_name
from nanoflow.request import RequestError

__all__ = ["REPLACEMENT", "MissingTokenizerError", "Tokenizer", "TokenizerError", "load_tokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# By how much a normalizer may shorten a text: composed characters are made of four at most.
_SHRINKAGE = {"NoneType": 1, "NFC": 4}


class Tokenizer:
    """A model's tokenizer. Methods may be called from several threads.

    Args:
        fast: Names of special tokens and chat template: `TokenizerNames`, or a `transformers` tokenizer, which has the
            tokens too if there is no `backend`.
        chat_template: Replaces the tokenizer's own template: Jinja text, or the name of one of the tokenizer's own.
        backend: The `tokenizers.Tokenizer` whose tokens count.
        config: How long chat templates may take, and how much they may write.

    Raises:
        TokenizerError: There is no backend.

    Attributes:
        chat_templates: What makes a text of a conversation.
        byte_rule: How its tokens stand for bytes; None if its decoder does more than put bytes together.
    """

    def __init__(
        self,
        fast: Any,
        chat_template: str | None = None,
        *,
        backend: Any = None,
        config: EngineConfig | None = None,
    ) -> None:
        if backend is None and not fast.is_fast:
            raise TokenizerError(f"{type(fast).__name__} has no fast version, and only fast tokenizers are supported")
        self._fast = fast
        self.chat_templates = ChatTemplates(fast, chat_template, config or EngineConfig())
        # The backend is used directly: its methods keep no state between calls, so that threads do not meet in them.
        self._backend = fast.backend_tokenizer if backend is None else backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._class_name = str(getattr(fast, "tokenizer_class", None) or type(fast).__name__)
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
        source = source_of(config)
        files = read_tokenizer(source)
        try:
            given = read_given(config.chat_template, files.names.chat_template, Path(source))
        except TemplateFileError as error:
            raise TokenizerError(str(error)) from error
        return cls(files.names, given, backend=files.backend, config=config)

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
        return self.chat_templates.usual is not None

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
        # A batch of one, as `encode` of the backend would keep other threads waiting.
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; other threads run meanwhile. Raises as `encode`."""
        encode = partial(self._backend.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in _encoded(encode)]

    @cached_property
    def longest_token_chars(self) -> int | None:
        """Most characters of a text that one token stands for; None where there is no such bound.

        A tokenizer that drops characters, or has one token for whatever it does not know, has none.
        """
        factor = _SHRINKAGE.get(type(self._backend.normalizer).__name__)
        if self.byte_rule is None or factor is None:
            return None
        return factor * max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

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
            # A batch of one, as `decode` would keep other threads waiting.
            return str(self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0])
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

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary has them, where a space may be written "Ġ" or "▁"; no text for unknown ids."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def description(self) -> dict[str, Any]:
        """Its configuration in JSON values, as tokenizer_config.json has it, with the class and the chat template."""
        found = {name: value for name, value in self._fast.init_kwargs.items() if not name.endswith("_file")}
        usual = self.chat_templates.usual
        template = None if usual is None else usual.text
        return {**_json_values(found), "tokenizer_class": self._class_name, "chat_template": template}

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
        messages: Conversation,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        check_text: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: Each with "role" and "content": a text, or a list of parts {"type": "text", "text": ...}.
            add_generation_prompt: End with what opens the assistant's answer.
            continue_final_message: Leave the last message open, to be continued; not with `add_generation_prompt`.
            add_special_tokens: Add those that a plain text gets, although templates write them themselves.
            chat_template: Jinja text, or the name of one of the tokenizer's own templates, instead of the usual one.
            chat_template_kwargs: Further variables of the template, such as `enable_thinking`; JSON values.
            check_text: Called with what the template wrote, before that becomes tokens; may raise.

        Raises:
            RequestError: There is no chat template, or it refuses the messages; the message says why.
            EngineDeadError: The tokenizer was closed.
        """
        text = self.chat_templates.get(chat_template).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=chat_template_kwargs,
        )
        if check_text is not None:
            check_text(text)
        return self.encode(text, add_special_tokens=add_special_tokens)

    def put_into(self, fast: Any) -> None:
        """Give a tokenizer of `transformers` these tokens and this chat template, where it can have them."""
        if getattr(fast, "is_fast", False):
            fast._tokenizer = copy.deepcopy(self._backend)
        usual = self.chat_templates.usual
        if usual is not None:
            fast.chat_template = usual.text

    def close(self) -> None:
        """End what renders chat templates, even at work; texts are encoded and decoded still."""
        self.chat_templates.close()

    def _encoding(self, text: str, add_special_tokens: bool) -> Any:
        return _encoded(partial(self._backend.encode_batch, [text], add_special_tokens=add_special_tokens))[0]

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


def _encoded(encode: Callable[[], list[Any]]) -> list[Any]:
    """What a backend makes of texts, with its errors in words for who wrote them."""
    try:
        return encode()
    except TypeError:
        raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None
    except BaseException as error:
        raise refusal(error, "the tokenizer cannot encode this text") from error


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of a config; None if there is none and weights are random, as in a benchmark of an architecture.

    None too where none is wanted (`skip_tokenizer_init`). A preset has none of its own, and what else it lacks is for
    those to say who load the model.

    Raises:
        ModelError, TokenizerError: It cannot be loaded.
    """
    if config.skip_tokenizer_init:
        return None
    if config.tokenizer is None and preset_name(config.model) is not None:
        return None
    if preset_name(config.model) is None:
        # That the model cannot be served is said before what its tokenizer lacks.
        refuse_unknown(locate_model(config.model, config.revision))
    try:
        return Tokenizer.load(config)
    except MissingTokenizerError:
        if config.load_format == "random":
            return None
        raise


def source_of(config: EngineConfig) -> str | Path:
    """Folder or Hub name. A Hub tokenizer is fetched by `transformers`: without the weights that lie beside it."""
    if config.tokenizer is None:
        return locate_model(config.model, config.revision)
    if config.tokenizer == DEFAULT_MODEL:
        return locate_model(config.tokenizer)
    return config.tokenizer


def _json_values(value: Any) -> Any:
    """The same in JSON values: added tokens as their text, numbers that JSON has not as null."""
    if isinstance(value, Mapping):
        return {str(name): _json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    if isinstance(value, int | float | bool | None):
        return value if value is None or math.isfinite(value) else None
    return str(value)
