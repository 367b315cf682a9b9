"""The option for speculative decoding, as a user writes it: `ngram:4`.

`scheduler/drafts.py` finds drafts and decides when they pay; the guide is docs/speculative.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.option import ConfigError
from nanoflow.parameters import shown

# A longer draft takes longer to verify than its expected gain is worth.
MAX_DRAFT_TOKENS = 32
MAX_MATCH_TOKENS = 64
_LONGEST, _SHORTEST = 4, 2
_FORM = "ngram:TOKENS[:LONGEST[:SHORTEST]], e.g. ngram:4 or ngram:4:5:2"


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramSpeculation:
    """Drafts by looking up the last tokens of a request in its own prompt and output.

    Attributes:
        num_draft_tokens: Most tokens of a draft.
        longest_match: How many last tokens are looked up first.
        shortest_match: Fewest matching tokens for which a draft is proposed.

    Raises:
        ValueError: A number is out of its range.
    """

    num_draft_tokens: int
    longest_match: int = _LONGEST
    shortest_match: int = _SHORTEST

    def __post_init__(self) -> None:
        if not 1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(f"a draft has 1 to {MAX_DRAFT_TOKENS} tokens, got {self.num_draft_tokens}")
        if not 1 <= self.shortest_match <= self.longest_match <= MAX_MATCH_TOKENS:
            raise ValueError(
                f"tokens to look for must be 1 <= shortest <= longest <= {MAX_MATCH_TOKENS}, "
                f"got shortest {self.shortest_match}, longest {self.longest_match}"
            )

    def __str__(self) -> str:
        """The text from which `read_speculation` reads this."""
        return f"ngram:{self.num_draft_tokens}:{self.longest_match}:{self.shortest_match}"


def read_speculation(text: str) -> NgramSpeculation:
    """Read `ngram:TOKENS[:LONGEST[:SHORTEST]]`.

    Raises:
        ValueError: The text has another form, or a number is out of its range.
    """
    method, *numbers = str(text).strip().lower().split(":")
    if method != "ngram" or not 1 <= len(numbers) <= 3:
        raise ValueError(f"must be {_FORM}, got {shown(text)}")
    if not all(number.isascii() and number.isdecimal() and len(number) <= 4 for number in numbers):
        raise ValueError(f"must be {_FORM} with whole numbers, got {shown(text)}")
    num_draft_tokens, *matches = map(int, numbers)
    longest = matches[0] if matches else _LONGEST
    shortest = matches[1] if len(matches) > 1 else min(_SHORTEST, longest)
    return NgramSpeculation(num_draft_tokens=num_draft_tokens, longest_match=longest, shortest_match=shortest)


def in_full(text: str) -> str | None:
    """The option with all numbers written out, so that equal settings are equal texts; None for "none"."""
    return None if text.strip().lower() == "none" else str(read_speculation(text))


def check_speculation(text: str | None) -> None:
    """Check that `read_speculation` can read the text.

    Raises:
        ConfigError: It cannot; the message is one line that says what the option may be.
    """
    try:
        if text is not None:
            read_speculation(text)
    except ValueError as error:
        raise ConfigError(f"speculative: {error}") from None
