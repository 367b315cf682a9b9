"""Where tokens begin in a text, and the prompt as an answer shows it before its completion.

Both are counted by the same code that makes the text, so that text and offsets cannot disagree. A token that is only
a part of a character begins where the character does; one that is left out of the text, where the next one begins.
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
        detokenizer: Of that text; None if there is no text.
        texts: What tokens are called.
        before: Tokens that stand before it.
        start: Where the first token begins.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, texts: TokenTexts, *, before: Sequence[int] = (), start: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._texts = texts
        self._num_chars = start
        # True if tokens before may have begun a character; the longest has four bytes.
        self._is_open = any(whole_text(token_id, texts) is None for token_id in before[-4:])

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the tokens that follow."""
        return [offset for offset, _ in self._walk(token_ids)]

    def take_text(self, token_ids: Sequence[int]) -> tuple[list[int], str]:
        """The offsets of the tokens that follow, and the text that these complete."""
        walk = self._walk(token_ids)
        return [offset for offset, _ in walk], "".join(piece for _, piece in walk)

    def _walk(self, token_ids: Sequence[int]) -> list[tuple[int, str]]:
        walk = []
        for token_id in token_ids:
            piece = "" if self._detokenizer is None else self._detokenizer.push((token_id,))
            begin, self._num_chars = self._num_chars, self._num_chars + len(piece)
            own = whole_text(token_id, self._texts)
            # A character that was not completed is shown with the token that tells so, before it.
            if self._is_open and own is not None and piece.endswith(own):
                begin = self._num_chars - len(own)
            self._is_open = own is None or (self._is_open and not piece)
            walk.append((begin, piece))
        return walk


class PlainDetokenizer:
    """A `Detokenizer` for a tokenizer that is not the engine's own: each token is a text of its own."""

    def __init__(self, tokenizer: ServingTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def push(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=self._skip_special_tokens)

    def flush(self) -> str:
        """Nothing is ever left."""
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A prompt as it stands before its completion.

    Attributes:
        text: As it was given. Of token ids: what they decode to, special tokens included; where a completion follows
            and the prompt ends inside a character, without that: the completion shows it.
        text_offsets: Where each token begins.
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
        output: Of the request.
        texts: What tokens are called.
        is_continued: A completion follows.
        has_offsets: Offsets are asked for.

    Raises:
        ValueError: The tokenizer fails at it.
    """
    if output.prompt is not None and not has_offsets:
        return Echo(text=output.prompt, text_offsets=[])
    if output.prompt is not None and isinstance(tokenizer, Tokenizer):
        return Echo(text=output.prompt, text_offsets=tokenizer.text_offsets(output.prompt))
    detokenizer = detokenizer_of(tokenizer, (), skip_special_tokens=output.prompt is not None)
    offsets, text = TextOffsets(detokenizer, texts).take_text(output.prompt_token_ids)
    text = text if is_continued else text + detokenizer.flush()
    return Echo(text=text if output.prompt is None else output.prompt, text_offsets=offsets)
