"""What a parser finds in the text of an assistant's message, in the order of the text.

A stream sends events as they come; a whole answer is their sum. `parser.py` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call of a declared function begins.

    Attributes:
        index: Place among the calls of the message, from 0.
        call_id: Name of the call, which the message with its result repeats.
        name: The function.
    """

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments: JSON, as the model writes it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call has ended.

    Attributes:
        index: Its place.
        is_whole: False if its arguments are no whole JSON value: the text was cut off, or the model made a mistake.
    """

    index: int
    is_whole: bool


Event = ContentDelta | ReasoningDelta | CallStarted | ArgumentsDelta | CallEnded
