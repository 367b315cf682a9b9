"""What becomes of a conversation: roles, forms of content, variables, and messages that a template would leave out."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from nanoflow.engine.chat_template import ChatTemplate
from nanoflow.engine.conversation import joined_text, read_messages
from nanoflow.engine.template_choice import choose_template
from nanoflow.engine.template_renderer import ChatTemplateLimitError
from nanoflow.request import RequestError
from tests import templates
from tests.templates import InProcess, template

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def text_of(source: str, *pairs: tuple[str, Any], **options: Any) -> str:
    return template(source).render(turns(*pairs), **{"add_generation_prompt": False, **options})


# Roles


def test_a_role_is_passed_on_where_the_template_knows_it() -> None:
    assert text_of(templates.ANY_ROLE, ("developer", "d"), ("user", "u")) == "[developer]d[user]u"
    assert text_of(templates.ANY_ROLE, ("user", "u"), ("wizard", "w")) == "[user]u[wizard]w"
    assert text_of(templates.KNOWN_ROLES, ("user", "u"), ("tool", "t")) == "[user]u[tool]t"


def test_a_developer_is_the_system_where_the_template_drops_him() -> None:
    assert text_of(templates.KNOWN_ROLES, ("developer", "d"), ("user", "u")) == "[system]d[user]u"
    assert (
        text_of(templates.KNOWN_ROLES, ("system", "s"), ("developer", "d"), ("user", "u"))
        == "[system]s[system]d[user]u"
    )


def test_a_role_that_would_be_dropped_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="does not know the role 'wizard'"):
        text_of(templates.KNOWN_ROLES, ("user", "u"), ("wizard", "w"))


def test_a_role_is_found_where_turns_must_alternate() -> None:
    assert text_of(templates.ALTERNATING, ("user", "u"), ("model", "m"), ("user", "v")) == "[user]u[model]m[user]v"
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        text_of(templates.ALTERNATING, ("developer", "d"), ("user", "u"))


def test_a_message_that_would_be_left_out_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"leave out messages\[1\], of role 'system'"):
        text_of(templates.FIRST_SYSTEM, ("user", "u"), ("system", "s"), ("user", "v"))
    assert text_of(templates.FIRST_SYSTEM, ("system", "s"), ("user", "v")) == "[system]s[user]v"


def test_a_template_may_change_contents_and_need_not_show_any() -> None:
    assert text_of(templates.NO_THOUGHTS, ("user", "u"), ("assistant", "<think>t</think>a")) == "[user]u[assistant]a"
    assert text_of("always the same", ("user", "u"), ("assistant", "a")) == "always the same"


def test_a_template_may_need_a_variable_or_change_letters_of_some_roles() -> None:
    only_if_asked = "{% for m in messages if m.role != 'system' or shown %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    conversation = (("system", "s"), ("user", "u"))
    assert text_of(only_if_asked, *conversation, kwargs={"shown": True}) == "[system]s[user]u"
    with pytest.raises(ValueError, match=r"leave out messages\[0\], of role 'system'"):
        text_of(only_if_asked, ("system", "s"), ("user", "u"), ("assistant", "a"))
    loud = "{% for m in messages %}{{ m.content | upper if m.role == 'system' else m.content }}{% endfor %}"
    assert text_of(loud, *conversation) == "Su"


# Contents


def test_parts_go_to_templates_that_take_them_and_are_lines_elsewhere() -> None:
    assert text_of(templates.ANY_ROLE, ("user", PARTS)) == "[user]a\nb"
    assert text_of(templates.BOTH, ("user", PARTS)) == "[user]<a><b>"
    assert text_of(templates.BOTH, ("user", "ab")) == "[user]ab"
    assert text_of(templates.PARTS_ONLY, ("user", PARTS), ("assistant", "ab")) == "[user]<a><b>[assistant]<ab>"


def test_an_assistant_may_say_nothing() -> None:
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        conversation = [*turns(("user", "u")), message, *turns(("user", "v"))]
        assert template(templates.ANY_ROLE).render(conversation) == "[user]u[assistant][user]v[assistant]"


def test_parts_are_joined_in_one_way() -> None:
    assert joined_text(PARTS) == "a\nb"
    assert (joined_text("a"), joined_text(None)) == ("a", "")
    assert read_messages(turns(("user", ["a", {"text": "b"}])), takes=lambda _: False)[0]["content"] == PARTS


def test_a_field_goes_to_templates_that_look_at_it_and_is_refused_elsewhere() -> None:
    """Nothing is passed over: not a slip either."""
    shows_language = "{% for m in messages %}[{{ m.lang }}]{{ m.content }}{% endfor %}"
    message = {"role": "user", "content": "u", "lang": "en"}
    assert template(shows_language).render([message]) == "[en]u"
    for turn, problem in (
        (message, r"^messages\[1\]: unknown field 'lang'"),
        ({"role": "user", "content": "u", "nmae": "x"}, "unknown field 'nmae'; did you mean 'name'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "u", "txt": "v"}]},
            r"^messages\[1\].content\[0\]: unknown field 'txt'; did you mean 'text'",
        ),
    ):
        with pytest.raises(RequestError, match=problem):
            template(templates.ANY_ROLE).render([*turns(("user", "a")), turn])
    ignored = {"role": "user", "content": "u", "lang": None, "name": "x"}
    assert template(templates.ANY_ROLE).render([ignored], add_generation_prompt=False) == "[user]u"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "a conversation has at least one message"),
        ("hi", "a conversation is a list of messages, got str"),
        ({"role": "user"}, "a conversation is a list of messages, got dict"),
        ([5], r"messages\[0\] must be a mapping with role and content, got int"),
        ([{"content": "a"}], r"messages\[0\].role must be a text"),
        (turns(("", "a")), r"messages\[0\].role must be a text"),
        (turns(("r" * 65, "a")), r"messages\[0\].role must be a text of 1 to 64 characters"),
        (
            turns(("user", "a"), ("user", None)),
            r"messages\[1\].content must be a text or a list of parts, got NoneType",
        ),
        (turns(("user", 5)), r"messages\[0\].content must be a text or a list of parts, got int"),
        (turns(("user", [])), r"messages\[0\].content has no part"),
        (turns(("user", [{"type": "image_url"}])), r"content\[0\] must be a part of type 'text', got 'image_url'"),
        (turns(("user", [{"type": "text", "text": 5}])), r"content\[0\].text must be a text, got int"),
    ],
)
def test_what_is_no_conversation_is_refused_by_place(messages: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        template(templates.ANY_ROLE).render(messages)


# Variables


def test_variables_reach_the_template() -> None:
    source = (
        templates.ANY_ROLE + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    assert text_of(source, ("user", "u")) == "[user]u"
    assert text_of(source, ("user", "u"), kwargs={"enable_thinking": False}) == "[user]u<think></think>"
    nested = text_of("{{ messages[0].content }}{{ a.b[1] }}", ("user", "u"), kwargs={"a": {"b": [1, None, "x"]}})
    assert nested == "uNone"


@pytest.mark.parametrize(
    "name, shows",
    [("KNOWN_ROLES", True), ("CALLING", True), ("FIRST_SYSTEM", False), ("HARMONY", False), ("ALTERNATING", False)],
)
def test_whether_a_late_system_message_is_shown(name: str, shows: bool) -> None:
    assert template(getattr(templates, name)).shows_late_system is shows


def test_a_template_of_the_harmony_format() -> None:
    """Instructions are the developer's, an answer of before is in the channel of answers, the date is today's."""
    date = datetime.now().strftime("%Y-%m-%d")
    system = (
        f"<|start|>system<|message|>I am a test.\nCurrent date: {date}\n\nReasoning: low\n\n"
        "# Valid channels: analysis, commentary, final.<|end|>"
    )
    kwargs = {"reasoning_effort": "low", "model_identity": "I am a test."}
    talk = (("user", "u"), ("assistant", "a"), ("user", "v"))
    said = "<|start|>user<|message|>u<|end|><|start|>assistant<|channel|>final<|message|>a<|end|>"
    said = f"{said}<|start|>user<|message|>v<|end|>"
    assert text_of(templates.HARMONY, *talk, kwargs=kwargs) == system + said
    instructions = "<|start|>developer<|message|># Instructions\n\ns<|end|>"
    for role in ("system", "developer"):
        given = text_of(templates.HARMONY, (role, "s"), *talk, kwargs=kwargs, add_generation_prompt=True)
        assert given == f"{system}{instructions}{said}<|start|>assistant"
    assert "Reasoning: medium" in text_of(templates.HARMONY, *talk)
    with pytest.raises(ValueError, match="refuses the messages: put no channels into a content"):
        text_of(templates.HARMONY, ("user", "u"), ("assistant", "<|channel|>final"), ("user", "v"))


@pytest.mark.parametrize(
    "name", ["messages", "conversations", "tokenize", "add_generation_prompt", "chat_template", "bos_token"]
)
def test_what_the_engine_sets_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot hold '{name}': the engine sets it"):
        template(templates.ANY_ROLE, bos_token="<s>").render(turns(("user", "u")), kwargs={name: False})


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), b"a", [float("inf")]])
def test_other_than_json_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"chat_template_kwargs.x must be a JSON value"):
        template(templates.ANY_ROLE).render(turns(("user", "u")), kwargs={"x": value})


def test_variables_are_a_mapping() -> None:
    for wrong in ([1], "a", {1: 2}):
        with pytest.raises(ValueError, match="chat_template_kwargs must be a mapping of names to values"):
            template(templates.ANY_ROLE).render(turns(("user", "u")), kwargs=wrong)  # type: ignore[arg-type]


def test_special_tokens_are_variables() -> None:
    assert (
        template("{{ bos_token }}" + templates.ANY_ROLE, bos_token="<s>").render(turns(("user", "u"))).startswith("<s>")
    )


# Cost


def test_a_template_is_tried_once_for_a_kind_of_conversation() -> None:
    renderer = InProcess()
    chat = ChatTemplate(templates.KNOWN_ROLES, {}, renderer)
    chat.render(turns(("developer", "d"), ("user", "u")))
    before = renderer.num_jobs
    for _ in range(5):
        chat.render(turns(("developer", "x"), ("user", "y")))
    assert renderer.num_jobs - before == 5


def test_a_template_that_was_stopped_is_not_tried_again_for_the_same_request() -> None:
    class Stopped:
        num_jobs = 0

        def render(self, job: Any) -> str:
            self.num_jobs += 1
            raise ChatTemplateLimitError("it takes longer than 5 s")

    renderer = Stopped()
    with pytest.raises(ValueError, match="the chat template was stopped: it takes longer than 5 s"):
        ChatTemplate(templates.ANY_ROLE, {}, renderer).render(turns(("developer", "d"), ("user", "u")))
    assert renderer.num_jobs == 1


# Which of several


def test_the_default_of_named_templates_is_used() -> None:
    named = {"tool_use": "T", "default": "D"}
    assert choose_template(named, None) == "D"
    assert choose_template(named, "tool_use") == "T"
    assert choose_template(named, "{{ x }}") == "{{ x }}"
    assert choose_template({"tool_use": "T"}, None) is None
    assert choose_template("one", None) == "one"
    assert choose_template(None, None) is None


# Tools and calls

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def called(arguments: Any = '{"a":  1}', **fields: Any) -> list[dict[str, Any]]:
    """A user asks, and the assistant calls."""
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [*turns(("user", "u")), {"role": "assistant", "content": None, "tool_calls": [call], **fields}]


@pytest.mark.parametrize(
    "source, shown",
    [
        (templates.CALLING, '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'),
        (templates.CALLING_TEXT, '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a":  1}'),
        (templates.CALLING_PRINTED, '<add{"a":  1}>'),
        (templates.CALLING_WITHOUT_TEXT, '<add{"a":  1}>'),
        (templates.CALLING_WITH_ONE_TEXT, '<add{"a": 1}>'),
        ("{% for tool in tools %}{% endfor %}" + templates.CALLING, '"arguments": {"a": 1}}</tool_call>'),
    ],
)
def test_calls_are_given_as_the_template_shows_them(source: str, shown: str) -> None:
    text = template(source).render([*called(), {"role": "tool", "content": "3"}], tools=_if_known(source))
    assert shown in text and "3" in text
    assert shown.replace('{"a":  1}', '{"a": 1}') in template(source).render(called({"a": 1}), tools=_if_known(source))


def _if_known(source: str) -> Any:
    return [TOOL] if "tools" in source else None


def test_what_a_model_wrote_in_place_of_arguments_stays_text() -> None:
    for wrong in ('{"a": oops', "[1]"):
        assert f'"arguments": {json.dumps(wrong)}' in template(templates.CALLING).render(called(wrong))
        assert f"<｜tool▁sep｜>{wrong}" in template(templates.CALLING_TEXT).render(called(wrong))


def test_text_and_reasoning_beside_a_call_are_joined_where_the_template_takes_one() -> None:
    fields = {"content": "I look.", "reasoning": "hm"}
    assert "hm\nI look.|<add" in template(templates.CALLING_WITH_ONE_TEXT).render(called(**fields))
    assert "<think>hm</think>I look.<tool_call>" in template(templates.CALLING).render(called(**fields))
    assert "|I look.<add" in template(templates.CALLING_WITH_ONE_TEXT).render(called(content="I look."))


def test_calls_are_refused_where_the_template_shows_none() -> None:
    for source in (templates.ANY_ROLE, templates.ANY_ROLE + "{# tool_calls #}"):
        with pytest.raises(RequestError, match="does not show calls of tools"):
            template(source).render(called())
    no_calls = [{**turns(("user", "u"))[0], "tool_calls": []}]
    assert template(templates.ANY_ROLE).render(no_calls) == "[user]u[assistant]"


@pytest.mark.parametrize(
    "calls, message",
    [
        ("f", "must be a list"),
        ([1], r"tool_calls\[0\] must be a call of type 'function'"),
        ([{"type": "web", "function": {"name": "f"}}], "must be a call of type 'function'"),
        ([{"function": {"name": ""}}], "function.name must be a text"),
        ([{"function": {"name": "f"}, "id": 1}], "id must be a text"),
        ([{"function": {"name": "f", "arguments": 1}}], "must be JSON as text, got int"),
        ([{"function": {"name": "f", "arguments": {"a": float("nan")}}}], "must be JSON"),
    ],
)
def test_calls_that_are_none_are_refused(calls: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        template(templates.CALLING).render([{"role": "assistant", "content": "a", "tool_calls": calls}])


def test_tools_reach_a_template_that_knows_them() -> None:
    text = template(templates.CALLING).render(turns(("user", "u")), tools=[TOOL], reasoning_effort="high")
    assert text == f"[tools]{json.dumps(TOOL)}[user]u[high][assistant]"
    with pytest.raises(RequestError, match="does not know tools") as caught:
        template(templates.ANY_ROLE).render(turns(("user", "u")), tools=[TOOL])
    assert caught.value.param == "tools"
    with pytest.raises(RequestError, match="the engine sets it"):
        template(templates.CALLING).render(turns(("user", "u")), kwargs={"tools": [TOOL]})
