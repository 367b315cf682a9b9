"""The texts around reasoning, in every format that has any: what begins a section, and what closes one from outside."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.chat_formats.formats import ChatFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningMarks:
    """The texts around a section of reasoning.

    Attributes:
        opener: Begins a section.
        closers: Each ends one.
        closing: What closes a section from outside, so that the answer follows.
        is_anywhere: Sections may begin anywhere; if not, there is one, at the beginning.
    """

    opener: str
    closers: tuple[str, ...]
    closing: str
    is_anywhere: bool


def reasoning_marks(form: ChatFormat) -> ReasoningMarks | None:
    """The texts around a section of reasoning; None if the format has none."""
    tags, channels = form.reasoning, form.channels
    if channels is not None:
        assistant, channel = f"{channels.openers[0]}assistant", channels.openers[-1]
        return ReasoningMarks(
            opener=f"{channel}{channels.reasoning[0]}{channels.head.end}",
            closers=channels.closers,
            closing=f"{channels.closers[0]}{assistant}{channel}{channels.answer}{channels.head.end}",
            is_anywhere=True,
        )
    if tags is None:
        return None
    return ReasoningMarks(opener=tags.opener, closers=(tags.closer,), closing=tags.closer, is_anywhere=False)
