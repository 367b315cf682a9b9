"""The grammar of a message with calls: in the model's format, with arguments by their schema.

A required call leaves nothing else. Where the model may decide, text is free up to the mark that begins a call; from
there on the call is held to its form. `grammar_texts.py` writes literals and free texts. Nothing here compiles or
applies a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.chat_formats.formats import CallSyntax, Channels, ChatFormat, Writing
from nanoflow.chat_formats.grammar_arguments import argument_rules, json_value, shape_rules
from nanoflow.chat_formats.grammar_texts import begins_with_token, free_text_rules, literal, thought_rule
from nanoflow.chat_formats.tools import Calling, ToolChoice, bad_schema, has_strict
from nanoflow.parameters import RequestError
from nanoflow.structured import Structured

_INDEX = "/[0-9]{1,3}/"
# How errors of a grammar begin, and rules of arguments.
_PLACE = re.compile(r"at (?P<line>\d+)\(\d+\): (?:failed to compile JSON schema: )?")
_ARGUMENTS = re.compile(r"arguments_(\d+)")
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def grammar_of(
    form: ChatFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    *,
    special: Mapping[str, int] | None = None,
    is_reasoning: bool | None = None,
    is_parallel: bool = True,
    answer: Mapping[str, Any] | None = None,
) -> str | None:
    """The grammar of a message.

    Args:
        form: How the model writes calls and reasoning.
        tools: Declared functions, checked.
        choice: Which of them have to be called.
        special: Ids of the tokenizer's special tokens by name: where the format has such a name, the grammar takes the
            token and not its text.
        is_reasoning: As for `ChatParser`. Reasoning may come before the calls.
        is_parallel: Whether there may be several calls.
        answer: A JSON schema that a message without calls has to match; None for any text.

    Returns:
        The grammar, in the dialect of Lark that llguidance reads (`%json` takes a JSON schema, `<[7]>` is the token 7);
        None if nothing is held: no call is required, no function that may be called is strict, and there is none
        beside an answer with a schema.
    """
    callable_tools = choice.of(tools)
    is_required = choice.calling is Calling.REQUIRED
    is_held = is_required or has_strict(callable_tools) or (answer is not None and bool(callable_tools))
    if form.calls is None or not is_held:
        return None
    made = _Grammar(form.calls, form.channels, callable_tools, special or {}, is_parallel=is_parallel)
    rules = [f"start: {_before(form, made.ids, is_reasoning)}message"]
    rules += made.required() if is_required else made.free(answer)
    for place, tool in enumerate(callable_tools):
        is_strict = is_required or tool["function"].get("strict")
        schema = (tool["function"].get("parameters") if is_strict or form.calls.tagged else None) or ANY_OBJECT
        rules += argument_rules(f"arguments_{place}", schema, form.calls.tagged, made.ids)
    return "\n".join((*rules, *_reasoning_rules(form, made.ids))) + "\n"


def answer_grammar(
    form: ChatFormat, shape: Structured, *, special: Mapping[str, int] | None = None, is_reasoning: bool | None = None
) -> str | None:
    """The grammar of an answer that has a shape, behind reasoning.

    Args:
        form: How the model writes reasoning.
        shape: The shape.
        special, is_reasoning: As for `grammar_of`.

    Returns:
        The grammar; None if the shape is that of the whole text: there is no reasoning, or it is a grammar itself.
    """
    ids, channels = special or {}, form.channels
    answer = shape_rules("answer", shape)
    if answer is None or (channels is None and (form.reasoning is None or is_reasoning is False)):
        return None
    head = "" if channels is None else literal(f"{channels.openers[-1]}{channels.answer}{channels.head.end}", ids)
    rules = [f"start: {_before(form, ids, is_reasoning)}{head} answer", *answer]
    return "\n".join((*rules, *_reasoning_rules(form, ids))) + "\n"


def blamed(grammar: str, problem: RequestError, tools: Sequence[Mapping[str, Any]], choice: ToolChoice) -> RequestError:
    """The error that a grammar of calls cannot be used, as one about the schema that is wrong in it.

    Args:
        grammar: Of `grammar_of`, with these tools and this choice.
        problem: What was said about it.
        tools, choice: As for `grammar_of`.

    Returns:
        The error; the same one if it is about no schema of a function.
    """
    cause = str(problem).partition("cannot be used: ")[2] or str(problem)
    place = _PLACE.match(cause)
    line = grammar.split("\n")[int(place["line"]) - 1] if place is not None else ""
    rule = _ARGUMENTS.match(line)
    if place is None or rule is None:
        return problem
    tool = choice.of(tools)[int(rule[1])]
    return bad_schema(tool["function"]["name"], cause[place.end() :], f"tools[{tools.index(tool)}].function.parameters")


@dataclass(frozen=True, slots=True)
class _Grammar:
    """The rules of the calls of a message.

    Attributes:
        syntax: How calls are written.
        channels: Of the format, if it has any.
        tools: Functions that may be called.
        ids: Of special tokens.
        is_parallel: Whether there may be several calls.
    """

    syntax: CallSyntax
    channels: Channels | None
    tools: Sequence[Mapping[str, Any]]
    ids: Mapping[str, int]
    is_parallel: bool

    def required(self, name: str = "message") -> list[str]:
        """The rules of a message of calls alone."""
        count = len(self.syntax.writings)
        rules = [f"{name}: {' | '.join(f'message_{i}' for i in range(count))}"]
        for place, writing in enumerate(self.syntax.writings):
            rules += self._calls(place, writing, mark="")
        return rules

    def free(self, answer: Mapping[str, Any] | None) -> list[str]:
        """The rules of a message that may be text, text and calls, or calls."""
        final = "FREE" if answer is None else json_value(answer)
        openers = self.syntax.openers
        # Also those that are tokens: the same characters of other tokens would be read as the mark.
        texts = free_text_rules(openers)
        if self.channels is not None:
            return [*self._sections("ANY" if answer is None else final), *texts]
        if self.syntax.is_bare:
            # Text is told from calls by how it begins.
            texts.append(r"TEXT: FREE & ~/\s*\{(?s:.*)/")
            calls = self.required()[1:]
            return [f"message: /\\s{{0,4}}/ message_0 | {'TEXT' if answer is None else final}", *calls, *texts]
        if answer is not None:
            # Free text before the calls could not be told from the answer.
            return [f"message: calls | {final}", *self.required("calls")]
        held = " | ".join(f"upto_{place} message_{place}" for place in range(len(self._marks)))
        rules = [f"message: ({held}){'*' if self.is_parallel else '?'} {final}"]
        for place, (mark, writing) in enumerate(zip(self._marks, self.syntax.writings, strict=True)):
            if begins_with_token(mark, self.ids):
                rules.append(f"upto_{place}: FREE {literal(mark, self.ids)}")
            else:
                rules.append(f"upto_{place}[lazy]: FREE {json.dumps(mark, ensure_ascii=False)}")
            rules += self._calls(place, writing, mark=mark)
        return [*rules, *texts]

    @property
    def _marks(self) -> list[str]:
        """The mark that begins a call in each way of writing; empty for a message that is a call from its beginning."""
        begins = [writing.begin + writing.call for writing in self.syntax.writings]
        return [max((o for o in self.syntax.openers if text.startswith(o)), key=len, default="") for text in begins]

    def _sections(self, final: str) -> list[str]:
        """The rules of a message of sections: a call, or the answer, after any that say what the model is about."""
        channels = self.channels
        assert channels is not None
        notes = [
            f"{literal(self._head(name), self.ids)} thought {literal(f'{channels.openers[0]}assistant', self.ids)}"
            for name in channels.notes
        ]
        before = f"({' | '.join(notes)})* " if notes else ""
        final = f"{literal(self._head(channels.answer), self.ids)} {final}"
        return [f"message: {before}(message_0 | {final})", *self.required()[1:]]

    def _head(self, name: str) -> str:
        assert self.channels is not None
        return f"{self.channels.openers[-1]}{name}{self.channels.head.end}"

    def _calls(self, place: int, writing: Writing, *, mark: str) -> list[str]:
        """The rules of calls in one way of writing, behind the mark that begins them."""
        more = ""
        if self.is_parallel and writing.between is not None:
            more = f" ({literal(writing.between, self.ids)} call_{place})*"
        begin, end = writing.begin, literal(writing.end, self.ids)
        rules = [f"call_{place}: {self._alternatives(writing, 0)}"]
        if begin.startswith(mark):
            first = f"{literal(begin.removeprefix(mark), self.ids)} call_{place}"
        else:
            first = f"first_{place}"
            num_begun = len(mark) - len(begin)
            rules.append(f"{first}: {self._alternatives(writing, num_begun)}")
        return [f"message_{place}: {first}{more} {end}", *rules]

    def _alternatives(self, writing: Writing, num_begun: int) -> str:
        """A call of any function, without its first characters."""
        calls = []
        for i, tool in enumerate(self.tools):
            before, after = writing.call.replace("{name}", tool["function"]["name"]).split("{arguments}")
            head = f" {_INDEX} ".join(literal(part, self.ids) for part in before[num_begun:].split("{index}"))
            calls.append(f"{head} arguments_{i} {literal(after, self.ids)}")
        return " | ".join(calls)


def _before(form: ChatFormat, ids: Mapping[str, int], is_reasoning: bool | None) -> str:
    """What stands before the calls: reasoning that has been opened, or may be."""
    if form.channels is not None:
        return "reasoning* "
    tags = form.reasoning
    if tags is None or is_reasoning is False:
        return ""
    if is_reasoning or tags.is_assumed:
        return "reasoning "
    return f"({literal(tags.opener, ids)} reasoning)? "


def _reasoning_rules(form: ChatFormat, ids: Mapping[str, int]) -> list[str]:
    """Rules of a section of reasoning, up to the text that closes it."""
    channels, tags = form.channels, form.reasoning
    if channels is not None:
        opener = literal(f"{channels.openers[-1]}{channels.reasoning[0]}{channels.head.end}", ids)
        # What comes next begins with who speaks.
        after = literal(f"{channels.openers[0]}assistant", ids)
        return [f"reasoning: {opener} thought {after}", thought_rule(channels.closers[0], ids)]
    return [] if tags is None else [r"reasoning: thought /\s{0,4}/", thought_rule(tags.closer, ids)]
