"""Chat templates of the kinds that models have, and a renderer without a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoflow.engine.chat_template import ChatTemplate
from nanoflow.engine.template_environment import render
from nanoflow.engine.template_renderer import ChatTemplateError

ANY_ROLE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Ignores roles that it does not know.
KNOWN_ROLES = (
    "{% for message in messages %}"
    "{% if message.role in ('system', 'user', 'assistant', 'tool') %}"
    "[{{ message.role }}]{{ message.content }}{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ message.role }}]{{ message.content | trim }}{% endfor %}"
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}"
    "{% for message in messages if message.role != 'system' %}[{{ message.role }}]{{ message.content }}{% endfor %}"
)
PARTS_ONLY = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% for part in message.content %}<{{ part.text }}>{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for message in messages %}[{{ message.role }}]{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
)
NO_THOUGHTS = "{% for message in messages %}[{{ message.role }}]{{ message.content.split('</think>')[-1] }}{% endfor %}"
# Of the shape of gpt-oss: a system message of its own, the conversation's as the developer's, channels of an answer.
HARMONY = (
    "{%- macro channels() %}# Valid channels: analysis, commentary, final.{% endmacro %}"
    "{%- if model_identity is not defined %}{% set model_identity = 'You are a large language model.' %}{% endif %}"
    "<|start|>system<|message|>{{ model_identity }}\nCurrent date: {{ strftime_now('%Y-%m-%d') }}\n\n"
    "Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}\n\n{{ channels() }}<|end|>"
    "{%- if messages[0].role in ('developer', 'system') %}{% set rest = messages[1:] %}"
    "<|start|>developer<|message|># Instructions\n\n{{ messages[0].content }}<|end|>"
    "{%- else %}{% set rest = messages %}{% endif %}"
    "{%- for message in rest %}"
    "{%- if message.role == 'assistant' %}"
    "{%- if '<|channel|>' in message.content %}{{ raise_exception('put no channels into a content') }}{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>"
    "{%- elif message.role == 'user' %}<|start|>user<|message|>{{ message.content }}<|end|>"
    "{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif %}"
)

# Tools, calls and reasoning as in Qwen 3; arguments are objects.
CALLING = (
    "{% if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{% if message.reasoning_content %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endfor %}{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% if opens %}<think>{% endif %}{% endif %}"
)
# Arguments are text, content beside calls is left out, and a message of a tool has to follow a call, as in DeepSeek.
CALLING_TEXT = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% set seen = namespace(calls=false) %}"
    "{% for message in messages %}"
    "{% if message.tool_calls %}{% set seen.calls = true %}{% for call in message.tool_calls %}"
    "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + call.function.name }}"
    "{{ '<｜tool▁sep｜>' + call.function.arguments }}"
    "{% endfor %}{% else %}"
    "{% if message.role == 'tool' and not seen.calls %}{{ raise_exception('no call before') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endif %}{% endfor %}"
)

# Prints arguments as they are, so that an object would look as in Python.
CALLING_PRINTED = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<{{ call.function.name }}{{ call.function.arguments }}>{% endfor %}"
    "{% endfor %}"
)
# Calls are shown only where there is no text, as in DeepSeek R1.
CALLING_WITHOUT_TEXT = (
    "{% for message in messages %}{% if message.content is none %}{% for call in message.tool_calls %}"
    "{{ '<' + call.function.name + call.function.arguments + '>' }}{% endfor %}"
    "{% else %}[{{ message.role }}]{{ message.content }}{% endif %}{% endfor %}"
)
# Text and reasoning may not stand beside one call, as in gpt-oss.
CALLING_WITH_ONE_TEXT = (
    "{% for message in messages %}{% if message.tool_calls and message.content and message.thinking %}"
    "{{ raise_exception('not both') }}{% endif %}"
    "[{{ message.role }}]{{ message.thinking }}|{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<{{ call.function.name }}{{ call.function.arguments | tojson }}>"
    "{% endfor %}{% endfor %}"
)


class InProcess:
    """Renders in this process, and counts."""

    def __init__(self) -> None:
        self.num_jobs = 0

    def render(self, job: Mapping[str, Any]) -> str:
        self.num_jobs += 1
        try:
            options = {name: value for name, value in job.items() if name not in ("messages", "chat_template")}
            return render(job["messages"], job["chat_template"], **options)
        except Exception as error:
            raise ChatTemplateError(str(error)) from error


def template(text: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate(text, special_tokens, InProcess())
