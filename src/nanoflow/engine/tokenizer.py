"""Text to token ids and back.

`Tokenizer` encodes and decodes with the tokens of tokenizer.json; `tokenizer_files.py` reads the files. `detokenize.py`
makes text of tokens that arrive one by one, `chat_template.py` makes text of a conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.engine.conversation import Conversation
from nanoflow.engine.json_values import json_values
from nanoflow.engine.template_choice import ChatTemplates, TemplateFileError, read_given
from nanoflow.engine.token_bytes import TokenBytes, byte_reader, byte_rule, character_offsets, is_text
from nanoflow.engine.tokenizer_files import MissingTokenizerError, TokenizerError, read_tokenizer, refusal
from nanoflow.models.config_json import refuse_unknown
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_name
from nanoflow.request import RequestError

__all__ = ["REPLACEMENT", "MissingTokenizerError", "Tokenizer", "TokenizerError", "load_tokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The factor by which a normalizer may shorten a text: NFC composes at most four characters into one.
_SHRINKAGE = {"NoneType": 1, "NFC": 4}


class Tokenizer:
    """A model's tokenizer. Methods may be called from several threads.

    Args:
        fast: Has the names of special tokens and the chat template: `TokenizerNames`, or a `transformers` tokenizer.
            Without a `backend`, its tokens are used.
        chat_template: Replaces the tokenizer's own template: Jinja text, or the name of one of the tokenizer's own.
        backend: The `tokenizers.Tokenizer` whose tokens are used.
        config: How long chat templates may take, and how much they may write.

    Raises:
        TokenizerError: There is no backend.

    Attributes:
        chat_templates: The templates that render conversations.
        byte_rule: How its decoder turns tokens into bytes; None if it does more than concatenate bytes.
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
        # The backend is used directly, since its methods keep no state and so may be called from several threads.
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
            ModelError: The model is not found.
            MissingTokenizerError: Its folder has no tokenizer.
            TokenizerError: The tokenizer or the chat template cannot be read.
        """
        source = source_of(config)
        files = read_tokenizer(source)
        try:
            given = read_given(config.chat_template, files.names.chat_template, Path(source))
        except TemplateFileError as error:
            raise TokenizerError(str(error)) from None
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

    @cached_property
    def mark_names(self) -> Mapping[str, int]:
        """`special_names`, and added tokens such as "<think>": grammars take these tokens by their ids, not as text."""
        added = self._backend.get_added_tokens_decoder().items()
        marks = {token.content: i for i, token in added if token.content[:1] + token.content[-1:] == "<>"}
        return {**marks, **self.special_names}

    @property
    def splits_characters(self) -> bool:
        """True if a token may be a part of a character; then `token_bytes` has the bytes of all tokens."""
        return self._byte_reader is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: The text has lone surrogates, which are no characters, or the tokenizer fails.
        """
        # A batch of one, as `encode` of the backend would keep other threads waiting.
        return self.encode_all([text], add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; other threads run meanwhile. Raises what `encode` raises."""
        encode = partial(self._backend.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in _encoded(encode)]

    @cached_property
    def longest_token_chars(self) -> int | None:
        """Most characters of a text that one token represents; None if there is no bound.

        There is none if the tokenizer drops characters, or has one token for everything that it does not know.
        """
        factor = _SHRINKAGE.get(type(self._backend.normalizer).__name__)
        if self.byte_rule is None or factor is None:
            return None
        return factor * max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def text_offsets(self, text: str) -> list[int]:
        """The character at which each token of `encode` begins; a token without text has that of the next token.

        Parts of a character begin where the character begins. Raises what `encode` raises.
        """
        encoding = self._encoding(text, True)
        if self.byte_rule is not None:
            added = encoding.special_tokens_mask
            parts = [b"" if is_added else self.bytes_of(i) for i, is_added in zip(encoding.ids, added, strict=True)]
            if b"".join(parts).removeprefix(b" ") == text.encode().removeprefix(b" "):
                return character_offsets(parts, num_left_out=sum(map(len, parts)) - len(text.encode()))
        # The tokenizer changes texts, so its own offsets are used. They leave out spaces around tokens.
        offsets, end = [], 0
        for token_start, token_end in encoding.offsets:
            offsets.append(end if token_start == token_end else min(token_start, end))
            end = max(end, token_end)
        return offsets

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. An id without a token gives no text; invalid bytes give U+FFFD.

        Raises:
            ValueError: The tokenizer fails.
        """
        try:
            # A batch of one, as `decode` would keep other threads waiting.
            return str(self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0])
        except BaseException as error:
            raise refusal(error, "the tokenizer cannot decode these tokens") from None

    def token_text(self, token_id: int) -> str:
        """Text of one token as inside a text: with its leading space, and the name of a special token.

        A part of a character shows as U+FFFD, so several tokens may have the same text; `bytes_of` tells them apart.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._read_token_text(token_id)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, maybe a part of a character; a special token adds its name."""
        if self.byte_rule is not None:
            return self.token_bytes(skip_special_tokens=False)[token_id]
        if self.splits_characters:
            data = self.token_bytes(skip_special_tokens=False)[token_id]
            if not is_text(data):
                return data
        return self.token_text(token_id).encode()

    def as_json(self) -> str:
        """The content of tokenizer.json."""
        return str(self._backend.to_str())

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary has them, where a space may be written "Ġ" or "▁"; unknown ids give no text."""
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def description(self) -> dict[str, Any]:
        """The content of tokenizer_config.json in JSON values, with the class and the chat template."""
        found = {name: value for name, value in self._fast.init_kwargs.items() if not name.endswith("_file")}
        usual = self.chat_templates.usual
        template = None if usual is None else usual.text
        return {**json_values(found), "tokenizer_class": self._class_name, "chat_template": template}

    def token_bytes(self, *, skip_special_tokens: bool) -> TokenBytes:
        """Bytes of each token id, before any further step of the decoder; empty for tokens that never show.

        Raises:
            ValueError: The tokens do not represent bytes (raised when a token is looked up).
        """
        return self._token_bytes[skip_special_tokens]

    def is_silent(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """True if a token never shows in a text: a special token that is left out, or an id without a token."""
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        check_text: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: Each with "role" and "content": a text, or a list of parts {"type": "text", "text": ...}.
            add_generation_prompt: End with the beginning of an assistant's message.
            continue_final_message: Leave the last message open, to be continued; not with `add_generation_prompt`.
            add_special_tokens: Add the special tokens of a plain text, although templates write their own.
            chat_template: Jinja text, or the name of one of the tokenizer's own templates, instead of the default.
            chat_template_kwargs: Further variables of the template, such as `enable_thinking`; JSON values.
            tools, reasoning_effort: As for `ChatTemplate.render`.
            check_text: Called with the rendered text before it is encoded; may raise.

        Raises:
            RequestError: There is no chat template, or it refuses the messages; the message says why.
            EngineDeadError: The tokenizer was closed.
        """
        text = self.chat_templates.get(chat_template, has_tools=bool(tools)).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=chat_template_kwargs,
            tools=tools,
            reasoning_effort=reasoning_effort,
        )
        if check_text is not None:
            check_text(text)
        return self.encode(text, add_special_tokens=add_special_tokens)

    def put_into(self, fast: Any) -> None:
        """Put these tokens and this chat template into a `transformers` tokenizer, if it can take them."""
        if getattr(fast, "is_fast", False):
            fast._tokenizer = copy.deepcopy(self._backend)
        usual = self.chat_templates.usual
        if usual is not None:
            fast.chat_template = usual.text

    def close(self) -> None:
        """End the processes that render chat templates. Texts can still be encoded and decoded."""
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
        # Some decoders drop the leading space of a text: decode the token twice and take the second text.
        try:
            alone, twice = self.decode([token_id], False), self.decode([token_id, token_id], False)
        # The tokenizer cannot decode it: use its name.
        except ValueError:
            return self._name(token_id)
        return (twice[len(alone) :] if twice.startswith(alone) else "") or alone


def _encoded(encode: Callable[[], list[Any]]) -> list[Any]:
    """Call a backend, and raise its errors as RequestErrors."""
    try:
        return encode()
    except TypeError:
        raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None
    except BaseException as error:
        raise refusal(error, "the tokenizer cannot encode this text") from None


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer of a config.

    None if the config says so (`skip_tokenizer_init`), for a preset without `tokenizer`, and for a model without one
    whose weights are random, as in a benchmark of an architecture.

    Raises:
        ModelError, TokenizerError: It cannot be loaded.
    """
    if config.skip_tokenizer_init or (config.tokenizer is None and preset_name(config.model) is not None):
        return None
    if preset_name(config.model) is None:
        # If the model cannot be served, that error comes before any error of its tokenizer.
        refuse_unknown(locate_model(config.model, config.revision))
    try:
        return Tokenizer.load(config)
    except MissingTokenizerError:
        if config.load_format == "random":
            return None
        raise


def source_of(config: EngineConfig) -> str | Path:
    """Folder or Hub name of the tokenizer. From the Hub, `transformers` fetches it without the model's weights."""
    if config.tokenizer is None:
        return locate_model(config.model, config.revision)
    if config.tokenizer == DEFAULT_MODEL:
        return locate_model(config.tokenizer)
    return config.tokenizer
