"""The formats in which models write calls and reasoning, as data: one table, which `parser.py` interprets.

A format is found from the words of a chat template, or named as vLLM's options `--tool-call-parser` and
`--reasoning-parser` name it. A new format is an entry here, as long as it has one of the two shapes of a call:

- an object: a JSON object with the name and the arguments as members, as in Hermes, Llama 3 and the older Mistral;
- a head: text with the name, then the arguments as a JSON value, as in DeepSeek, gpt-oss and the newer Mistral; or as
  members between tags (`tagged.py`), as in Qwen 3 Coder and GLM.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nanoflow.chat_formats.tagged import TaggedArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTags:
    """A section of reasoning at the beginning of a message.

    Attributes:
        opener, closer: The tags around it.
        is_assumed: The section is open at the beginning even without its opener, unless the prompt has closed it.
    """

    opener: str
    closer: str
    is_assumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CallObject:
    """Members of a JSON object that is a call; others are passed over.

    Attributes:
        name: Member with the function's name.
        arguments: Members that may have the arguments.
    """

    name: str = "name"
    arguments: tuple[str, ...] = ("arguments", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHead:
    """Text before the arguments of a call.

    Attributes:
        end: Ends the head.
        is_part_of_arguments: True if the arguments begin with `end`.
        pattern: The whole head, with its opener, and without `end`. Its group "name" has the function's name; a head
            without one begins a section of text, of the channel that the group "channel" names. A group "id" has the
            id of the call, where the model writes one.
    """

    end: str
    is_part_of_arguments: bool = False
    pattern: re.Pattern[str]


class IdStyle(enum.Enum):
    """How ids of calls look."""

    OPENAI = "call_ and 24 hexadecimal digits"
    NINE = "nine letters and digits"  # Mistral's templates refuse others


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a model that makes no mistakes writes its calls; a grammar holds it to this (`grammar.py`).

    Attributes:
        call: One call, with {name}, {arguments}, and {index} for a number.
        begin, end: Around all calls.
        between: Between two calls; None if a message has one call.
    """

    call: str
    begin: str = ""
    between: str | None = None
    end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How calls are written.

    Attributes:
        openers: Texts that begin a call, or a list of calls.
        closers: Texts that may follow the arguments and are no part of the answer.
        is_bare: A message that begins with "{" is a call too, without an opener.
        separator: Stands between two call objects after one opener.
        call_object: Shape of a call that is an object, or a list of objects; None if there are none.
        head: Shape of a call with a head; None if there are none.
        tagged: How members of arguments stand between tags behind a head; None if they are JSON.
        ids: How ids of its calls look.
        writings: How calls are written without mistakes; one of these.
    """

    openers: tuple[str, ...]
    writings: tuple[Writing, ...]
    closers: tuple[str, ...] = ()
    is_bare: bool = False
    separator: str | None = None
    call_object: CallObject | None = None
    head: CallHead | None = None
    tagged: TaggedArguments | None = None
    ids: IdStyle = IdStyle.OPENAI


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """All text of a message is in sections, each with a head that names its channel; calls are sections as well.

    Attributes:
        openers: Texts that begin a head.
        head: Shape of a head.
        first_words: A message may begin with a head without an opener, if it begins with one of these.
        closers: Texts that end a section.
        reasoning: Channels with reasoning; others have text for the user.
        answer: The channel of the answer.
        notes: Channels of text before calls.
    """

    openers: tuple[str, ...]
    head: CallHead
    first_words: tuple[str, ...]
    closers: tuple[str, ...]
    reasoning: tuple[str, ...]
    answer: str = "final"
    notes: tuple[str, ...] = ("commentary",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What is looked for in a message.

    Attributes:
        calls: How calls are written; None looks for none.
        reasoning: Tags of reasoning; None looks for none.
        channels: Set if the message consists of sections with heads.
    """

    calls: CallSyntax | None = None
    reasoning: ReasoningTags | None = None
    channels: Channels | None = None

    @property
    def is_plain(self) -> bool:
        """True if nothing is looked for: the whole text is content."""
        return self.calls is None and self.reasoning is None and self.channels is None


_NAME = r"(?P<name>[A-Za-z0-9_.-]+)"
_NAME_OF_ID = r"(?P<name>[A-Za-z0-9_-]+)"
_KIMI = "<|tool_call"
_DEEPSEEK_OPENERS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
_DEEPSEEK_CLOSERS = ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_BEGIN = r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>"


def _object(arguments: str) -> str:
    """A call object whose arguments have this name."""
    return '{"name": "{name}", "' + arguments + '": {arguments}}'


def _functions(opener: str, closer: str) -> CallSyntax:
    """Calls whose function and parameters are tags, as Qwen 3 Coder writes them."""
    return CallSyntax(
        openers=(opener, "<function="),
        closers=("</function>", closer),
        head=CallHead(end=">", pattern=re.compile(rf"(?:{opener}\s*)?<function=\s*{_NAME}\s*")),
        tagged=TaggedArguments(
            begin="<parameter=",
            middle=(">",),
            end="</parameter>",
            trim="\n",
            member="<parameter={name}>\n{value}\n</parameter>\n",
            closer="</function>",
        ),
        writings=(Writing(call=f"{opener}\n<function={{name}}>\n{{arguments}}</function>\n{closer}", between="\n"),),
    )


def _deepseek(call: str) -> Writing:
    """Calls in DeepSeek's brackets."""
    return Writing(
        begin="<｜tool▁calls▁begin｜>",
        call=f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>",
        between="",
        end="<｜tool▁calls▁end｜>",
    )


_HARMONY_HEAD = re.compile(
    # Who speaks, then to whom: before the channel, or behind it. The word behind both is the type of the content.
    r"(?:<\|start\|>\s*\w+)?(?:(?=.*\bto=(?:functions\.)?(?P<name>[^\s<]+)))?"
    r"\s*(?:to=[^\s<]+\s*)?(?:<\|channel\|>\s*(?P<channel>\w+)\s*(?:to=[^\s<]+\s*)?)?(?:(?:<\|constrain\|>)?\s*\w+\s*)?",
    re.DOTALL,
)
_HARMONY_CLOSERS = ("<|end|>", "<|call|>", "<|return|>")

_HARMONY_OPENERS = ("<|start|>", "<|channel|>")

HARMONY = ChatFormat(
    calls=CallSyntax(
        openers=_HARMONY_OPENERS,
        closers=_HARMONY_CLOSERS,
        # The token that ends a call ends the message too.
        writings=(Writing(call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"),),
    ),
    channels=Channels(
        openers=_HARMONY_OPENERS,
        head=CallHead(end="<|message|>", pattern=_HARMONY_HEAD),
        first_words=("to=",),
        closers=_HARMONY_CLOSERS,
        reasoning=("analysis",),
    ),
)
"""gpt-oss: sections with channels. Reasoning and calls are parts of one format, which either name chooses."""

CALLS: Mapping[str, CallSyntax] = {
    "hermes": CallSyntax(
        openers=("<tool_call>",),
        closers=("</tool_call>",),
        call_object=CallObject(),
        writings=(Writing(call=f"<tool_call>\n{_object('arguments')}\n</tool_call>", between="\n"),),
    ),
    "llama3_json": CallSyntax(
        openers=("<|python_tag|>",),
        is_bare=True,
        separator=";",
        call_object=CallObject(),
        writings=(Writing(call=_object("parameters"), between="; "),),
    ),
    "mistral": CallSyntax(
        openers=("[TOOL_CALLS]",),
        call_object=CallObject(),
        head=CallHead(
            end="{",
            is_part_of_arguments=True,
            pattern=re.compile(rf"\[TOOL_CALLS\]\s*{_NAME}\s*(?:\[CALL_ID\][^\[\]]*)?(?:\[ARGS\])?\s*"),
        ),
        ids=IdStyle.NINE,
        writings=(
            Writing(begin="[TOOL_CALLS][", call=_object("arguments"), between=", ", end="]"),
            Writing(call="[TOOL_CALLS]{name}[ARGS]{arguments}", between=""),
        ),
    ),
    "deepseek_v3": CallSyntax(
        openers=_DEEPSEEK_OPENERS,
        closers=("```", *_DEEPSEEK_CLOSERS),
        head=CallHead(
            end="{",
            is_part_of_arguments=True,
            pattern=re.compile(rf"{_DEEPSEEK_BEGIN}\s*function\s*<｜tool▁sep｜>\s*{_NAME}\s*```json\s*"),
        ),
        writings=(_deepseek("function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"),),
    ),
    "deepseek_v31": CallSyntax(
        openers=_DEEPSEEK_OPENERS,
        closers=_DEEPSEEK_CLOSERS,
        head=CallHead(
            end="{",
            is_part_of_arguments=True,
            pattern=re.compile(rf"{_DEEPSEEK_BEGIN}\s*{_NAME}\s*<｜tool▁sep｜>\s*"),
        ),
        writings=(_deepseek("{name}<｜tool▁sep｜>{arguments}"),),
    ),
    "qwen3_coder": _functions("<tool_call>", "</tool_call>"),
    "seed_oss": _functions("<seed:tool_call>", "</seed:tool_call>"),
    "glm45": CallSyntax(
        openers=("<tool_call>",),
        closers=("</tool_call>",),
        head=CallHead(end="<", is_part_of_arguments=True, pattern=re.compile(rf"<tool_call>\s*{_NAME}\s*")),
        tagged=TaggedArguments(
            begin="<arg_key>",
            middle=("</arg_key>", "<arg_value>"),
            end="</arg_value>",
            member="<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n",
            closer="</tool_call>",
        ),
        writings=(Writing(call="<tool_call>{name}\n{arguments}</tool_call>", between="\n"),),
    ),
    "kimi_k2": CallSyntax(
        openers=(f"{_KIMI}s_section_begin|>", f"{_KIMI}_begin|>"),
        closers=(f"{_KIMI}_end|>", f"{_KIMI}s_section_end|>"),
        head=CallHead(
            end=f"{_KIMI}_argument_begin|>",
            pattern=re.compile(
                r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>"
                rf"\s*(?P<id>(?:functions\.)?{_NAME_OF_ID}(?::\d+)?)\s*"
            ),
        ),
        writings=(
            Writing(
                begin=f"{_KIMI}s_section_begin|>",
                call=f"{_KIMI}_begin|>functions.{{name}}:{{index}}{_KIMI}_argument_begin|>{{arguments}}{_KIMI}_end|>",
                between="",
                end=f"{_KIMI}s_section_end|>",
            ),
        ),
    ),
}
"""Formats of calls by name, beside "openai"."""

_THINK = ReasoningTags(opener="<think>", closer="</think>")

REASONING: Mapping[str, ReasoningTags] = {
    "qwen3": _THINK,
    "deepseek_r1": ReasoningTags(opener="<think>", closer="</think>", is_assumed=True),
    "deepseek_v3": _THINK,
    "mistral": ReasoningTags(opener="[THINK]", closer="[/THINK]"),
    "seed_oss": ReasoningTags(opener="<seed:think>", closer="</seed:think>"),
}
"""Formats of reasoning by name, beside "openai_gptoss"."""
