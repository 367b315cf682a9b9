"""From the shape that a request asks for to a grammar of llguidance, and what such a grammar may cost.

llguidance (https://github.com/guidance-ai/llguidance) builds automata lazily: to compile a grammar takes about a
millisecond, and each step builds what it needs. Its limits bound what a step may take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from llguidance import LLMatcher, LLParserLimits, StructTag
from llguidance.gbnf_to_lark import any_to_lark

from nanoflow.structured import GrammarKind, Structured

# Between the tokens of JSON: a newline and the indentation of some levels. Without a bound a weak model would go on.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
_MAX_MESSAGE_CHARS = 200


class GrammarError(ValueError):
    """A grammar cannot be used; the message is one line that says why."""


def limits() -> LLParserLimits:
    """What building a grammar and one step of it may take: some 100 ms and 15 ms of a processor."""
    return LLParserLimits(
        initial_lexer_fuel=200_000, step_lexer_fuel=50_000, step_max_items=50_000, verbose_errors=False
    )


def grammar_of(structured: Structured) -> str:
    """The grammar as llguidance takes it.

    Raises:
        GrammarError: Its text is not of its kind. Not everything is found here: compile it.
    """
    try:
        return _MAKERS[structured.kind](structured.text)
    except ValueError as error:
        raise GrammarError(said(str(error))) from None


def in_lark(text: str) -> str:
    """A grammar in Lark's format, from one in that format or in GBNF, the format of llama.cpp.

    Raises:
        GrammarError: It is neither.
    """
    try:
        return str(any_to_lark(text))
    # Its parser of GBNF is not made for texts of all kinds.
    except Exception as error:
        raise GrammarError(said(str(error))) from None


def said(message: str) -> str:
    """A message of llguidance, which may have many lines, as one short line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["it has no meaning"]
    cause = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), None)
    if cause is not None and lines[0].endswith(":"):
        lines[0] += f" {cause}"
    text = lines[0].removesuffix(" <non-verbose/>")
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[: _MAX_MESSAGE_CHARS - 3] + "..."


def _json(text: str) -> str:
    # A schema's `oneOf` whose branches cannot be told apart is read as `anyOf`.
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE, "coerce_one_of": True})


def _choice(text: str) -> str:
    # One token of the grammar: as alternatives of a rule, only a few could be followed at once.
    choices = " | ".join(json.dumps(choice) for choice in json.loads(text))
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}\n")


def _tags(text: str) -> str:
    given = json.loads(text)
    tags = [
        StructTag(
            trigger=max((each for each in given["triggers"] if one["begin"].startswith(each)), key=len),
            begin=one["begin"],
            grammar={**one["schema"], "x-guidance": {"whitespace_pattern": _WHITESPACE, "coerce_one_of": True}},
            end=one["end"],
        )
        for one in given["structures"]
    ]
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


_MAKERS: Mapping[GrammarKind, Callable[[str], str]] = {
    "json": _json,
    "regex": LLMatcher.grammar_from_regex,
    "choice": _choice,
    "grammar": LLMatcher.grammar_from_lark,
    "structural_tag": _tags,
}
