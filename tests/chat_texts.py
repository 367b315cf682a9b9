"""What models write, by format, with what a parser finds in it. Also pieces of it, for random texts."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow.chat_formats.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from nanoflow.chat_formats.formats import CALLS, HARMONY, REASONING, ChatFormat

NAMES = ("get_weather", "add")
THINKS_HERMES = ChatFormat(calls=CALLS["hermes"], reasoning=REASONING["qwen3"])
FORMATS = {
    "hermes": THINKS_HERMES,
    "llama3_json": ChatFormat(calls=CALLS["llama3_json"]),
    "mistral": ChatFormat(calls=CALLS["mistral"], reasoning=REASONING["mistral"]),
    "deepseek_v3": ChatFormat(calls=CALLS["deepseek_v3"], reasoning=REASONING["deepseek_r1"]),
    "deepseek_v31": ChatFormat(calls=CALLS["deepseek_v31"], reasoning=REASONING["deepseek_v3"]),
    "openai": HARMONY,
    "qwen3_coder": ChatFormat(calls=CALLS["qwen3_coder"]),
    "glm45": ChatFormat(calls=CALLS["glm45"], reasoning=REASONING["qwen3"]),
    "kimi_k2": ChatFormat(calls=CALLS["kimi_k2"]),
    "seed_oss": ChatFormat(calls=CALLS["seed_oss"], reasoning=REASONING["seed_oss"]),
}
PARAMETERS = {
    "get_weather": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "array"},
            "far": {"type": "boolean"},
            "zip": {"enum": ["01", "2"]},
            "near": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "n": {"type": ["integer", "null"]},
        }
    }
}


@dataclass(frozen=True)
class Found:
    """The sum of the events of a message: content, reasoning, and (name, arguments, is_whole) of each call."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str, bool], ...] = ()


def found(events: list[Event]) -> Found:
    """Sum events up; the order of those of a call is checked."""
    content = reasoning = ""
    calls: list[tuple[str, str, bool | None]] = []
    for event in events:
        match event:
            case ContentDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case CallStarted(index, _, name):
                assert index == len(calls) and (not calls or calls[-1][2] is not None)
                calls.append((name, "", None))
            case ArgumentsDelta(index, text):
                name, arguments, is_whole = calls[-1]
                assert index == len(calls) - 1 and is_whole is None and text
                calls[-1] = (name, arguments + text, None)
            case CallEnded(index, is_whole):
                assert index == len(calls) - 1
                calls[-1] = (*calls[-1][:2], is_whole)
    return Found(content, reasoning, tuple((name, arguments, bool(is_whole)) for name, arguments, is_whole in calls))


PARIS = ("get_weather", '{"city": "Paris é 東京 🌧", "days": [1, 2.5e3, true]}', True)
SUM = ("add", "{}", True)
_P, _S = PARIS[1], SUM[1]
_DS = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
_DS_NEXT, _DS_END = "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
_TO = "<|start|>assistant<|channel|>commentary to=functions."

CASES: dict[str, tuple[str, str, Found]] = {
    "hermes two calls": (
        "hermes",
        "<think>\nHm: 1 < 2.\n</think>\n\nI look.\n<tool_call>\n"
        f'{{"name": "get_weather", "arguments": {_P}}}\n</tool_call>\n<tool_call>\n'
        f'{{"arguments": {_S}, "name": "add"}}\n</tool_call>\nDone.',
        Found("I look.\nDone.", "Hm: 1 < 2.", (PARIS, SUM)),
    ),
    "hermes text only": ("hermes", " a < b <tool_ \n", Found(" a < b <tool_ \n")),
    "hermes undeclared": (
        "hermes",
        'A <tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> B',
        Found('A <tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> B'),
    ),
    "hermes closer in a string": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>\\"}"}}</tool_call>',
        Found("", "", (("add", '{"a": "</tool_call>\\"}"}', True),)),
    ),
    "hermes arguments as a string": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\u00e9\\"}"}</tool_call>',
        Found("", "", (("add", '{"a": "é"}', True),)),
    ),
    "hermes arguments as a string that is blank, and one that is no JSON": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": ""}</tool_call>'
        '<tool_call>{"name": "add", "arguments": " b"}</tool_call>',
        Found("", "", (SUM, ("add", " b", False))),
    ),
    "hermes a bracket too many": (
        "hermes",
        f'<tool_call>\n{{"name": "add", "arguments": {_S}}}}}\n</tool_call>',
        Found("", "", (SUM,)),
    ),
    "hermes arguments that are no JSON": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>x',
        Found("x", "", (("add", '{"a": oops}}', False),)),
    ),
    "hermes no JSON before the name": (
        "hermes",
        '<tool_call>{"name": add}</tool_call>',
        Found('<tool_call>{"name": add}</tool_call>'),
    ),
    "hermes without arguments": (
        "hermes",
        '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "add", "arguments": null}</tool_call>',
        Found("", "", (SUM, SUM)),
    ),
    "hermes cut off in the arguments": (
        "hermes",
        '<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
        Found("", "", (SUM, ("get_weather", '{"city": "Pa', False))),
    ),
    "hermes cut off in the name": ("hermes", 'x <tool_call>{"name": "ad', Found('x <tool_call>{"name": "ad')),
    "hermes cut off in the reasoning": ("hermes", "<think>so \n", Found("", "so \n")),
    "hermes tag in the text": ("hermes", "The tag <think> is </think>.", Found("The tag <think> is </think>.")),
    "llama bare": (
        "llama3_json",
        f'\n{{"name": "get_weather", "parameters": {_P}}}; {{"name": "add", "parameters": {_S}}}',
        Found("", "", (PARIS, SUM)),
    ),
    "llama python tag": (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {_P}}}',
        Found("", "", (PARIS,)),
    ),
    "llama an answer in JSON": ("llama3_json", '{"name": "Bob", "age": 5}', Found('{"name": "Bob", "age": 5}')),
    "mistral list": (
        "mistral",
        f'ok[TOOL_CALLS] [{{"name": "get_weather", "arguments": {_P}}}, {{"name": "add", "arguments": {_S}}}]',
        Found("ok", "", (PARIS, SUM)),
    ),
    "mistral heads": (
        "mistral",
        f"[THINK]hm[/THINK][TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{_P}[TOOL_CALLS]add{_S}",
        Found("", "hm", (PARIS, SUM)),
    ),
    "deepseek v3": (
        "deepseek_v3",
        f"hm</think>ok{_DS}function<｜tool▁sep｜>get_weather\n```json\n{_P}\n```{_DS_NEXT}"
        f"function<｜tool▁sep｜>add\n```json\n{_S}\n```{_DS_END}",
        Found("ok", "hm", (PARIS, SUM)),
    ),
    "deepseek v3.1": (
        "deepseek_v31",
        f"{_DS}get_weather<｜tool▁sep｜>{_P}{_DS_NEXT}add<｜tool▁sep｜>{_S}{_DS_END}",
        Found("", "", (PARIS, SUM)),
    ),
    "deepseek white space between its marks": (
        "deepseek_v31",
        f"ok<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>{_S}<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>",
        Found("ok", "", (SUM,)),
    ),
    "deepseek a block without calls": (
        "deepseek_v31",
        "a <｜tool▁calls▁begin｜> b <｜tool▁calls▁begin｜>",
        Found("a <｜tool▁calls▁begin｜> b <｜tool▁calls▁begin｜>"),
    ),
    "harmony": (
        "openai",
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"{_TO}get_weather <|constrain|>json<|message|>{_P}<|call|>",
        Found("I look.", "hm", (PARIS,)),
    ),
    "harmony to in front": (
        "openai",
        f" to=functions.get_weather<|channel|>commentary json<|message|>{_P}<|call|>{_TO}add<|message|>{_S}<|call|>",
        Found("", "", (PARIS, SUM)),
    ),
    "mistral undeclared": ("mistral", "a [TOOL_CALLS]rm{} b", Found("a [TOOL_CALLS]rm{} b")),
    "deepseek undeclared": ("deepseek_v31", f"a {_DS}rm<｜tool▁sep｜>{{}}", Found(f"a {_DS}rm<｜tool▁sep｜>{{}}")),
    "harmony undeclared": (
        "openai",
        "<|channel|>commentary to=functions.rm<|message|>{}<|call|>",
        Found("<|channel|>commentary to=functions.rm<|message|>{}"),
    ),
    "harmony white space before the arguments": (
        "openai",
        f"<|channel|>commentary to=functions.add<|message|>\n {_S}<|call|>",
        Found("", "", (SUM,)),
    ),
    "harmony final": (
        "openai",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello 1 < 2 <|no|>.<|return|>",
        Found("Hello 1 < 2 <|no|>.", "a\nb"),
    ),
    "harmony cut off in a head": (
        "openai",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|chan",
        Found("<|start|>assistant<|chan", "hm"),
    ),
    "harmony no sections": ("openai", "to be or not", Found("to be or not")),
}

_CODER = (
    '<function=get_weather>\n<parameter=city>\nParis "é"\n\n 東京 </param\n</parameter>\n<parameter=days>\n[1, 2.5]\n'
    "</parameter>\n<parameter=far>\nTrue\n</parameter>\n<parameter=zip>\n2\n</parameter>\n<parameter=near>\nnull\n"
    "</parameter>\n<parameter=n>\n3\n</parameter>\n<parameter=else>\nno JSON\n</parameter>\n</function>"
)
_CODED = (
    "get_weather",
    '{"city": "Paris \\"é\\"\\n\\n 東京 </param", "days": [1, 2.5], "far": true, "zip": "2", "near": null, "n": 3, '
    '"else": "no JSON"}',
    True,
)
_GLM = "<arg_key>city</arg_key>\n<arg_value>Paris\n</arg_value>\n<arg_key>n</arg_key><arg_value>3</arg_value>\n"
_KIMI, _KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"

CASES |= {
    "qwen coder": (
        "qwen3_coder",
        f"I look.\n<tool_call>\n{_CODER}\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>\nDone.",
        Found("I look.\nDone.", "", (_CODED, SUM)),
    ),
    "qwen coder without the outer tag": ("qwen3_coder", f"{_CODER}\n</tool_call>", Found("", "", (_CODED,))),
    "qwen coder undeclared": (
        "qwen3_coder",
        "a <tool_call>\n<function=rm>\n</function>",
        Found("a <tool_call>\n<function=rm>\n</function>"),
    ),
    "qwen coder cut off in a text": (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPa\n</para",
        Found("", "", (("get_weather", '{"city": "Pa\\n</para', False),)),
    ),
    "qwen coder no member": (
        "qwen3_coder",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\noops</function>",
        Found("oops</function>", "", (("add", '{"a": 1', False),)),
    ),
    "seed": (
        "seed_oss",
        f"<seed:think>hm</seed:think><seed:tool_call>\n{_CODER}\n</seed:tool_call>",
        Found("", "hm", (_CODED,)),
    ),
    "glm": (
        "glm45",
        f"\n<think>hm</think>\nok\n<tool_call>get_weather\n{_GLM}</tool_call>\n<tool_call>add\n</tool_call>",
        Found("ok", "hm", (("get_weather", '{"city": "Paris\\n", "n": 3}', True), SUM)),
    ),
    "glm on one line": (
        "glm45",
        "<tool_call>add<arg_key>a</arg_key><arg_value>[true]</arg_value></tool_call>",
        Found("", "", (("add", '{"a": [true]}', True),)),
    ),
    "kimi": (
        "kimi_k2",
        f"ok{_KIMI}<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{_P}<|tool_call_end|>"
        f"<|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{_S}<|tool_call_end|>{_KIMI_END}",
        Found("ok", "", (PARIS, SUM)),
    ),
}

CASES["kimi with line breaks"] = (CASES["kimi"][0], CASES["kimi"][1].replace("|><|", "|>\n<|"), CASES["kimi"][2])

PIECES = (
    *("<function=add>", "<function=get_weather>", "<parameter=city>", "</parameter>", "</function>", "<arg_key>city"),
    *("</arg_key>", "<arg_value>", "</arg_value>", "\n<parameter=n>", "1", "<|tool_call_begin|>functions.add:3"),
    "<|tool_call_argument_begin|>",
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
    *("<|python_tag|>", "<|start|>", "assistant", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>"),
    *("<|call|>", " to=functions.add", _DS, _DS_NEXT, _DS_END, "function<｜tool▁sep｜>add", "add<｜tool▁sep｜>"),
    *("\n```json\n", "\n```", '{"name": "add", "arguments": ', '{"a": [1, "x}"]}', "}", "{", "[", "]", ",", ";"),
    *("add", " ", "\n", "é", "🌧", "<", "|", '"', "\\", "text", "<eos>"),
)
