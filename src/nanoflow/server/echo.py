"""Offsets of tokens in a text, and the prompt that an answer shows before its completion (`echo`).

Offsets are counted by the code that makes the text, so they agree with it. A token that is a part of a character begins
where the character begins. A token that is left out of the text begins where the next token begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow.engine.detokenize import Detokenizer, make_detokenizer
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import RequestOutput
from nanoflow.server.backend import ServingTokenizer
from nanoflow.server.logprobs import TokenTexts, whole_text


class TextOffsets:
    """Offsets of one text's tokens, in characters.

    Args:
        detokenizer: Makes the text; None if there is no text.
        texts: Texts of single tokens.
        before: Tokens before this text.
        start: Offset of the first token.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, texts: TokenTexts, *, before: Sequence[int] = (), start: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._texts = texts
        self._num_chars = start
        # True if the tokens before may end inside a character; the longest characters have four bytes.
        self._is_open = any(whole_text(token_id, texts) is None for token_id in before[-4:])

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        return [offset for offset, _ in self._walk(token_ids)]

    def take_text(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """The offsets of the next tokens, and the text that they complete."""
        walk = self._walk(token_ids)
        return [offset for offset, _ in walk], "".join(piece for _, piece in walk)

    def _walk(self, token_ids: Sequence[int]) -> list[tuple[int, str]]:
        walk = []
        for token_id in token_ids:
            piece = "" if self._detokenizer is None else self._detokenizer.push((token_id,))
            begin, self._num_chars = self._num_chars, self._num_chars + len(piece)
            own = whole_text(token_id, self._texts)
            # An incomplete character is shown together with the next token, which shows that it stays incomplete.
            if self._is_open and own is not None and piece.endswith(own):
                begin = self._num_chars - len(own)
            self._is_open = own is None or (self._is_open and not piece)
            walk.append((begin, piece))
        return walk


class PlainDetokenizer:
    """A `Detokenizer` for other tokenizers than the engine's: it decodes each token alone."""

    def __init__(self, tokenizer: ServingTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def push(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=self._skip_special_tokens)

    def flush(self) -> str:
        """Return nothing, since no text is ever held back."""
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A prompt as shown before its completion.

    Attributes:
        text: The text that was given. For token ids, their text with special tokens; without an incomplete character at
            its end if a completion follows, which shows that character.
        text_offsets: Offset of each token.
    """

    text: str
    text_offsets: list[int]


def detokenizer_of(
    tokenizer: ServingTokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
) -> Detokenizer:
    """The text of what follows a prompt, as the engine makes it."""
    if isinstance(tokenizer, Tokenizer):
        return make_detokenizer(tokenizer, prompt_token_ids, skip_special_tokens)
    return PlainDetokenizer(tokenizer, skip_special_tokens)


def echo_prompt(
    tokenizer: ServingTokenizer, output: RequestOutput, texts: TokenTexts, *, is_continued: bool, has_offsets: bool
) -> Echo:
    """The prompt of an output.

    Args:
        tokenizer: The model's.
        output: The request's output.
        texts: Texts of single tokens.
        is_continued: Whether a completion follows.
        has_offsets: Whether offsets are needed.

    Raises:
        ValueError: The tokenizer fails.
    """
    if output.prompt is not None and not has_offsets:
        return Echo(text=output.prompt, text_offsets=[])
    if output.prompt is not None and isinstance(tokenizer, Tokenizer):
        return Echo(text=output.prompt, text_offsets=tokenizer.text_offsets(output.prompt))
    detokenizer = detokenizer_of(tokenizer, (), skip_special_tokens=output.prompt is not None)
    offsets, text = TextOffsets(detokenizer, texts).take_text(output.prompt_token_ids)
    text = text if is_continued else text + detokenizer.flush()
    return Echo(text=text if output.prompt is None else output.prompt, text_offsets=offsets)
