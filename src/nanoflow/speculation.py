"""Which kind of speculative decoding an engine does, as its user writes it: `ngram:4`.

Here is only what was asked for. How drafts are found and when they pay: `scheduler/drafts.py`; the guide is
docs/speculative.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.parameters import shown

# A longer draft takes more time to verify than it can be expected to bring.
MAX_DRAFT_TOKENS = 32
MAX_MATCH_TOKENS = 64
_FORM = "ngram:TOKENS[:LONGEST[:SHORTEST]], e.g. ngram:4 or ngram:4:5:2"


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramSpeculation:
    """Drafts by looking up the last tokens of a request in its own prompt and output.

    Attributes:
        num_draft_tokens: Most tokens of a draft.
        longest_match: So many last tokens are looked for first.
        shortest_match: With fewer than so many tokens alike nothing is proposed.

    Raises:
        ValueError: A number is out of its range.
    """

    num_draft_tokens: int
    longest_match: int = 4
    shortest_match: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(f"a draft has 1 to {MAX_DRAFT_TOKENS} tokens, got {self.num_draft_tokens}")
        if not 1 <= self.shortest_match <= self.longest_match <= MAX_MATCH_TOKENS:
            raise ValueError(
                f"tokens to look for must be 1 <= shortest <= longest <= {MAX_MATCH_TOKENS}, "
                f"got shortest {self.shortest_match}, longest {self.longest_match}"
            )

    def __str__(self) -> str:
        """As `read_speculation` reads it."""
        return f"ngram:{self.num_draft_tokens}:{self.longest_match}:{self.shortest_match}"


def speculation_of(text: str | None) -> NgramSpeculation | None:
    """What the option asks for; None for None and for `none`.

    Raises:
        ValueError: As `read_speculation`.
    """
    return None if text is None or text == "none" else read_speculation(text)


def checked(text: str) -> str:
    """The text of the option as it is, if it can be read.

    Raises:
        ValueError: As `read_speculation`.
    """
    speculation_of(text)
    return text


def read_speculation(text: str) -> NgramSpeculation:
    """Read `ngram:TOKENS[:LONGEST[:SHORTEST]]`.

    Raises:
        ValueError: The text is nothing of that form, or a number is out of its range.
    """
    if not isinstance(text, str):
        raise ValueError(f"must be {_FORM}, got {shown(text)}")
    method, *numbers = text.strip().lower().split(":")
    if method != "ngram" or not 1 <= len(numbers) <= 3:
        raise ValueError(f"must be {_FORM}, got {shown(text)}")
    if not all(number.isascii() and number.isdecimal() and len(number) <= 4 for number in numbers):
        raise ValueError(f"must be {_FORM} with whole numbers, got {shown(text)}")
    num_draft_tokens, *matches = map(int, numbers)
    return of_lengths(num_draft_tokens, *matches)


def of_lengths(num_draft_tokens: int, longest: int | None = None, shortest: int | None = None) -> NgramSpeculation:
    """What stands for lengths that are not given: defaults, cut to fit those that are."""
    default_longest, default_shortest = 4, 2
    if longest is None:
        longest = max(default_longest, shortest or 0)
    if shortest is None:
        shortest = min(default_shortest, longest)
    return NgramSpeculation(num_draft_tokens=num_draft_tokens, longest_match=longest, shortest_match=shortest)
