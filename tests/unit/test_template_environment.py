"""Chat templates give here what they give with `transformers`: text for text, and an error where that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nanoflow.engine.template_environment import render
from tests import templates

_TURNS: list[Mapping[str, Any]] = [
    {"role": "system", "content": "be  brief"},
    {"role": "user", "content": 'h\u00e9llo <b> & "q" '},
    {"role": "assistant", "content": " so be it  ", "reasoning_content": "hm"},
]
_PARTS: list[Mapping[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}
]
_STRANGE = (
    "{{ messages | tojson }}{{ {'b': [1, '<'], 'a': none} | tojson(indent=2, sort_keys=true) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% set ns = namespace(_n=0) %}{{ ns._n }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n {% endif %}\n{% endfor %}",
    "{{ dict(a=1) }}{{ dict.fromkeys(['x']) }}{{ bos_token }}{{ undefined_name }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}{{ m.content }}{% endfor %}",
    "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ messages[9].content }}",
    "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
    "{{ dict.__class__ }}{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception('no') }}",
    "{{ template }}{{ self }}",
    "{% if",
)
_ALL = (
    *(templates.ANY_ROLE, templates.KNOWN_ROLES, templates.ALTERNATING, templates.FIRST_SYSTEM),
    *(templates.PARTS_ONLY, templates.BOTH, templates.NO_THOUGHTS),
    *_STRANGE,
)


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("turns", [_TURNS, _TURNS[1:2], _PARTS, []], ids=["three", "one", "parts", "none"])
@pytest.mark.parametrize("template", _ALL)
def test_same_as_the_library(template: str, turns: list[Mapping[str, Any]], continues: bool) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "template": "a variable", "enable_thinking": False}
    options = {"continue_final_message": continues, "add_generation_prompt": not continues}
    try:
        (expected,), _ = render_jinja_template(conversations=[turns], chat_template=template, **options, **variables)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017  (of any kind: whatever a template raises)
            render(turns, template, **options, **variables)
        return
    # The address of an object, which differs.
    if "self" not in template:
        assert render(turns, template, **options, **variables) == expected
