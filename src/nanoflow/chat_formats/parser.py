"""Read an assistant's message as its text arrives: what is content, what is reasoning, and which calls there are.

`ChatParser` interprets a `ChatFormat`. What it finds depends on the text alone, not on how the text was cut.

- Text that is no part of a well-formed call of a declared function stays content, with the marks around it.
- A call begins as soon as its name is known and its arguments begin. From then on the arguments are passed on as the
  model writes them, also where they turn out to be no JSON; then they end at the next mark of the format.
- White space beside reasoning and calls is no content. Where they stand between two texts, a line break does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nanoflow.chat_formats.call_object import ObjectReader, Verdict
from nanoflow.chat_formats.calls import Calls, new_call_id
from nanoflow.chat_formats.events import ContentDelta, Event, ReasoningDelta
from nanoflow.chat_formats.formats import CallSyntax, ChatFormat, IdStyle
from nanoflow.chat_formats.json_scan import is_json
from nanoflow.chat_formats.markers import could_become, markers
from nanoflow.chat_formats.sections import SectionText
from nanoflow.chat_formats.tagged import Progress, TaggedReader

# A head with the name of a function is not longer. What is longer is content.
_MAX_HEAD_CHARS = 512
# What may stand between a call object and its closer: a bracket too many is a common mistake of small models.
_SPACE = " \t\r\n"
_FILLING = " \t\r\n}]"


class ChatParser:
    """Reads one message.

    Args:
        form: The format.
        names: Functions that may be called; without any, calls stay content.
        parameters: Schemas of their arguments by name, for formats whose arguments are no JSON.
        is_reasoning: Whether the prompt has opened a section of reasoning; None if it says nothing about it.
        hidden: Names of special tokens that are left out of texts.
        max_calls: Calls after so many are dropped; None for no limit.
        new_id: Makes ids of calls.
    """

    def __init__(
        self,
        form: ChatFormat,
        *,
        names: Iterable[str] = (),
        parameters: Mapping[str, Any] | None = None,
        is_reasoning: bool | None = None,
        hidden: Iterable[str] = (),
        max_calls: int | None = None,
        new_id: Callable[[IdStyle], str] = new_call_id,
    ) -> None:
        self._names = frozenset(names)
        self._calls: CallSyntax | None = form.calls if self._names else None
        self._channels, self._tags = form.channels, form.reasoning
        ids = IdStyle.OPENAI if form.calls is None else form.calls.ids
        self._found_calls = Calls(ids=ids, new_id=new_id, most=max_calls)
        self._buffer, self._is_end = "", False
        self._events: list[Event] = []
        self._content, self._reasoning = SectionText(ContentDelta), SectionText(ReasoningDelta, is_apart=True)
        self._reader: ObjectReader | None = None
        self._tagged: TaggedReader | None = None
        self._parameters = parameters or {}
        self._opener = ""
        self._is_in_list = False
        self._hidden = frozenset(hidden)
        calls, channels, tags = self._calls, self._channels, self._tags
        self._head = channels.head if channels is not None else None if calls is None else calls.head
        openers = () if calls is None else calls.openers
        section_marks = () if channels is None else (*channels.openers, *channels.closers)
        self._openers = frozenset(openers if channels is None else channels.openers)
        self._in_content = markers(self._hidden.union(openers, section_marks))
        self._in_reasoning = markers(self._hidden.union(section_marks, () if tags is None else (tags.closer,)))
        self._in_mistake = markers(frozenset(openers).union(() if calls is None else calls.closers))
        is_open = is_reasoning if is_reasoning is not None else self._tags is not None and self._tags.is_assumed
        self._state: Callable[[], bool] = self._begin
        self._can_reason = self._tags is not None
        self._is_opened = is_open and self._tags is not None

    def push(self, text: str) -> list[Event]:
        """Read more text; returns what is sure now."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """The text has ended; returns the rest. A call that is not whole ends with `is_whole` false."""
        self._is_end = True
        events = self._run()
        self._events += self._found_calls.end(is_whole=False)
        is_reasoning = self._state == self._read_reasoning
        return [*events, *self._take(), *(self._reasoning if is_reasoning else self._content).end()]

    def _run(self) -> list[Event]:
        while self._state():
            pass
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _goto(self, state: Callable[[], bool], num_taken: int = 0) -> bool:
        """Take characters from the buffer, then go on in a state."""
        self._buffer = self._buffer[num_taken:]
        self._state = state
        return True

    def _waits(self) -> bool:
        """True if more text may come and has to be waited for."""
        return not self._is_end

    # -- the beginning ----------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Before any content: a section of reasoning, or a call or a head without an opener."""
        text = self._buffer.lstrip()
        num_spaces = len(self._buffer) - len(text)
        opener = self._tags.opener if self._tags is not None and self._can_reason else None
        bare = ("{",) if self._calls is not None and self._calls.is_bare else ()
        firsts = bare if self._channels is None else self._channels.first_words
        if opener is not None and text.startswith(opener):
            self._can_reason = self._is_opened = False
            return self._goto(self._read_reasoning, num_spaces + len(opener))
        words = firsts if opener is None else (opener, *firsts)
        if self._waits() and (not text or any(could_become(text, word) for word in words)):
            return False
        if self._is_opened:
            self._can_reason = self._is_opened = False
            return self._goto(self._read_reasoning)
        if text.startswith(firsts) and firsts:
            self._content.add(self._buffer[:num_spaces])
            self._opener = ""
            return self._goto(self._read_head if self._channels is not None else self._read_opening, num_spaces)
        return self._goto(self._read_content)

    # -- texts ------------------------------------------------------------------------------------------------------

    def _read_content(self) -> bool:
        num_sure, mark = self._in_content.find(self._buffer, is_end=self._is_end)
        self._events += self._content.add(self._buffer[:num_sure])
        if mark is None:
            return self._goto(self._read_content, num_sure) and False
        if mark in self._openers:
            self._opener = mark
            state = self._read_opening if self._channels is None else self._read_head
            return self._goto(state, num_sure + len(mark))
        if self._channels is not None and mark in self._channels.closers:
            self._content.part()
        return self._goto(self._read_content, num_sure + len(mark))

    def _read_reasoning(self) -> bool:
        num_sure, mark = self._in_reasoning.find(self._buffer, is_end=self._is_end)
        self._events += self._reasoning.add(self._buffer[:num_sure])
        if mark is None:
            return self._goto(self._read_reasoning, num_sure) and False
        is_closer = self._tags is not None and mark == self._tags.closer
        if not is_closer and (self._channels is None or mark not in (*self._openers, *self._channels.closers)):
            return self._goto(self._read_reasoning, num_sure + len(mark))
        self._reasoning.part()
        self._content.part()
        # An opener is read again as content, where it begins a head.
        return self._goto(self._begin if is_closer else self._read_content, num_sure + len(mark) * is_closer)

    def _stay_content(self) -> bool:
        """What the opener has begun is no call: the opener is content, and so is what follows, unless it has marks."""
        if self._opener not in self._hidden:
            self._events += self._content.add(self._opener)
        self._is_in_list = False
        return self._goto(self._read_content)

    # -- before the arguments ---------------------------------------------------------------------------------------

    def _read_opening(self) -> bool:
        """Behind an opener: which shape the call has."""
        syntax = self._calls
        assert syntax is not None
        place = _skip(self._buffer, 0)
        can_be_list = syntax.call_object is not None and bool(self._opener) and not self._is_in_list
        begins_list = can_be_list and self._buffer.startswith("[", place)
        if begins_list:
            place = _skip(self._buffer, place + 1)
        if place == len(self._buffer) and self._waits():
            return False
        self._is_in_list |= begins_list
        if syntax.call_object is not None and self._buffer.startswith("{", place):
            self._reader = ObjectReader(syntax.call_object, self._names, place)
            return self._goto(self._read_object)
        if syntax.head is not None and not self._is_in_list:
            return self._goto(self._read_head)
        return self._stay_content()

    def _read_head(self) -> bool:
        """Behind an opener: a head, up to the text that ends it."""
        head = self._head
        assert head is not None
        place = self._buffer.find(head.end, 0, _MAX_HEAD_CHARS + len(head.end))
        if place < 0 and self._waits() and len(self._buffer) < _MAX_HEAD_CHARS + len(head.end):
            return False
        written = self._opener + (self._buffer if place < 0 else self._buffer[:place])
        match = head.pattern.fullmatch(written)
        if match is None or (place < 0 and not self._is_cut_off_head()):
            return self._stay_content()
        if place < 0:
            return self._goto(self._read_content, len(self._buffer))
        num_taken = place if head.is_part_of_arguments else place + len(head.end)
        name = match["name"]
        if name is None:
            return self._begin_section(match["channel"], num_taken)
        if name not in self._names or self._calls is None:
            return self._stay_content()
        self._start_call(name, None, match.groupdict().get("id"))
        if self._calls.tagged is not None:
            self._tagged = TaggedReader(self._calls.tagged, self._parameters.get(name) or {})
            return self._goto(self._read_tagged, num_taken)
        return self._goto(self._read_arguments, num_taken)

    def _is_cut_off_head(self) -> bool:
        """True if the message ends inside the head of a section, which is no text."""
        return self._channels is not None and bool(self._opener) and len(self._buffer) < _MAX_HEAD_CHARS

    def _begin_section(self, channel: str | None, num_taken: int) -> bool:
        """Begin the text behind a head that names no function."""
        self._content.part()
        is_reasoning = self._channels is not None and channel in self._channels.reasoning
        return self._goto(self._read_reasoning if is_reasoning else self._read_content, num_taken)

    def _read_object(self) -> bool:
        """In a call object whose arguments have not begun."""
        reader = self._reader
        assert reader is not None
        verdict = reader.read(self._buffer)
        if verdict is Verdict.OPEN and self._waits():
            return False
        if verdict in (Verdict.OPEN, Verdict.NO_CALL):
            self._reader = None
            return self._stay_content()
        assert reader.name is not None
        self._start_call(reader.name, reader)
        if verdict is Verdict.STREAMS:
            return self._goto(self._read_arguments, reader.place)
        arguments = "{}" if reader.arguments is None else reader.arguments
        self._events += self._found_calls.add(arguments)
        self._events += self._found_calls.end(is_whole=is_json(arguments))
        return self._goto(self._read_tail, reader.place)

    # -- the arguments, and what follows them -----------------------------------------------------------------------

    def _read_arguments(self) -> bool:
        call = self._found_calls.current
        assert call is not None
        if call.is_empty:
            self._buffer = self._buffer.lstrip(_SPACE)
        end = call.scan.advance(self._buffer, 0)
        self._events += self._found_calls.add(self._buffer[:end])
        if call.scan.is_broken:
            return self._goto(self._read_mistake, end)
        if not call.scan.is_done:
            return self._goto(self._read_arguments, end) and False
        if self._reader is None:
            self._events += self._found_calls.end(is_whole=True)
            return self._goto(self._read_tail, end)
        self._reader.resume(0)
        return self._goto(self._read_rest, end)

    def _read_tagged(self) -> bool:
        """In arguments that are members between tags."""
        reader = self._tagged
        assert reader is not None
        num_read, written, progress = reader.read(self._buffer, is_end=self._is_end)
        self._events += self._found_calls.add(written)
        if progress is Progress.OPEN:
            return self._goto(self._read_tagged, num_read) and False
        self._events += self._found_calls.end(is_whole=progress is Progress.ENDED)
        return self._goto(self._read_tail, num_read)

    def _read_rest(self) -> bool:
        """Behind the arguments in a call object."""
        reader = self._reader
        assert reader is not None
        verdict = reader.read(self._buffer)
        if verdict is Verdict.OPEN and self._waits():
            return False
        self._events += self._found_calls.end(is_whole=True)
        return self._goto(self._read_tail, reader.place if verdict is Verdict.ENDED else 0)

    def _read_mistake(self) -> bool:
        """In arguments that are no JSON: up to the next mark of a call."""
        num_sure, mark = self._in_mistake.find(self._buffer, is_end=self._is_end)
        self._events += self._found_calls.add(self._buffer[:num_sure])
        if mark is None:
            return self._goto(self._read_mistake, num_sure) and False
        self._events += self._found_calls.end(is_whole=False)
        return self._goto(self._read_tail, num_sure)

    def _read_tail(self) -> bool:
        """Behind a call: what closes it, and what begins the next one of the same list."""
        syntax, text = self._calls, self._buffer
        assert syntax is not None
        place = _skip(text, 0)
        separator = "," if self._is_in_list else syntax.separator if self._reader is not None else None
        if self._is_in_list and text.startswith("]", place):
            self._is_in_list = False
            return self._goto(self._read_tail, place + 1)
        if separator is not None and text.startswith(separator, place):
            self._opener = separator
            return self._goto(self._read_opening, place + 1)
        filled = _skip(text, 0, _FILLING) if syntax.closers else place
        for closer in syntax.closers:
            if text.startswith(closer, filled):
                self._is_in_list = False
                return self._goto(self._read_tail, filled + len(closer))
        rest = text[filled:]
        if self._waits() and (not rest or any(could_become(rest, closer) for closer in syntax.closers)):
            return False
        self._is_in_list = False
        return self._goto(self._read_content)

    def _start_call(self, name: str, reader: ObjectReader | None, written_id: str | None = None) -> None:
        """A call begins, which is an object if there is a reader."""
        self._reader = reader
        self._content.part()
        self._events += self._found_calls.start(name, written_id)


def _skip(text: str, place: int, chars: str = _SPACE) -> int:
    """Index of the first character from `place` on that is none of `chars`."""
    while place < len(text) and text[place] in chars:
        place += 1
    return place
