"""A text of a message that is passed on in pieces, without the white space beside its other sections."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.chat_formats.events import ContentDelta, Event, ReasoningDelta

# Stands between two texts of a kind that another section parts, at the beginning of the second.
BORDER = "\n"


@dataclass(slots=True)
class SectionText:
    """Content, or reasoning, as events: without white space beside other sections."""

    event: type[ContentDelta] | type[ReasoningDelta]
    is_blank: bool = True  # nothing was passed on so far
    is_apart: bool = False  # another section stands between the last text and the next
    space: str = ""  # white space that is passed on if more text follows

    def add(self, text: str) -> list[Event]:
        """Pass text on."""
        body = text.lstrip() if self.is_apart else text
        shown = body.rstrip()
        if not shown:
            self.space += body
            return []
        space, self.space = self.space, body[len(shown) :]
        if self.is_apart:
            space = "" if self.is_blank else BORDER
        self.is_blank = self.is_apart = False
        return [self.event(space + shown)]

    def part(self) -> None:
        """Another section begins: what is to come stands apart."""
        self.space, self.is_apart = "", True

    def end(self) -> list[Event]:
        """The message ends in this text."""
        space, self.space = self.space, ""
        return [self.event(space)] if space else []
