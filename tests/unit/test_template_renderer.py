"""Templates that loop, write without end or break their process are stopped; what comes after them is served."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanoflow.engine.errors import EngineDeadError
from nanoflow.engine.template_renderer import (
    MAX_PROCESSES,
    ChatTemplateError,
    ChatTemplateLimitError,
    TemplateRenderer,
)

# Bounded, should nothing stop it: half a minute.
LOOP = "{% for i in range(99999) %}{% for j in range(5000) %}{% endfor %}{% endfor %}"
# Enough for all but loops, on a machine that is busy with other things.
PATIENT_S = 60.0


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    made = patient()
    yield made
    made.close()


def patient(timeout_s: float = PATIENT_S) -> TemplateRenderer:
    return TemplateRenderer(timeout_s=timeout_s, max_chars=1000)


def job(template: str, content: str = "hi") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "chat_template": template}


def test_a_template_is_rendered_as_the_library_does(renderer: TemplateRenderer) -> None:
    assert (
        renderer.render(job("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "grüß 漢 👍"))
        == "GRÜSS 漢 👍"
    )
    assert renderer.render(job("{{ messages[0].content }}", "\ud800\u2028\n")) == "\ud800\u2028\n"
    assert (
        renderer.render(job("{% generation %}{{ x | tojson }}{% endgeneration %}") | {"x": {"a": [1]}}) == '{"a": [1]}'
    )


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no\nmore') }}", "no"),
        ("{% if", "unexpected 'end of template'"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
            "memory",
        ),
        ("{{ '%0100000000000d' % 1 }}", "too much memory"),
        ("{{ 'a' | center(10**11) }}", "too much memory"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ 'a' * 1001 }}", "it writes 1001 characters, and 1000 are the most"),
    ],
)
def test_a_template_that_cannot_be_rendered_says_why(renderer: TemplateRenderer, template: str, problem: str) -> None:
    with pytest.raises(ChatTemplateError, match=problem) as caught:
        renderer.render(job(template))
    assert "\n" not in str(caught.value)
    assert renderer.render(job("{{ messages[0].content }}")) == "hi"


def test_other_than_json_values_are_refused(renderer: TemplateRenderer) -> None:
    with pytest.raises(ChatTemplateError, match="JSON values only"):
        renderer.render(job("x") | {"x": object()})


def test_a_loop_is_stopped_and_others_go_on_meanwhile() -> None:
    hasty = patient(timeout_s=1.5)
    hasty.render(job("warm"))
    with ThreadPoolExecutor(1) as pool:
        start_s = time.monotonic()
        looping = pool.submit(hasty.render, job(LOOP))
        num_others = 0
        while not looping.done():
            assert hasty.render(job("{{ messages[0].content }}")) == "hi"
            num_others += 1
        with pytest.raises(ChatTemplateLimitError, match=r"it takes longer than 1\.5 s"):
            looping.result()
    assert 1.5 <= time.monotonic() - start_s < 10 and num_others > 0
    hasty.close()


def test_a_process_that_ends_is_replaced(renderer: TemplateRenderer) -> None:
    """Whatever ends it: the system for want of memory, or a crash."""
    renderer.render(job("warm"))
    for process in list(renderer._processes._all):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert renderer.render(job("{{ messages[0].content }}")) == "hi"


def test_a_process_that_ends_at_work_is_told(renderer: TemplateRenderer) -> None:
    own = patient()
    own.render(job("warm"))
    (process,) = own._processes._all
    threading.Timer(0.2, process.send_signal, (signal.SIGSEGV,)).start()
    with pytest.raises(ChatTemplateLimitError, match=r"ended the process that it ran in \(SIGSEGV\)"):
        own.render(job(LOOP))
    own.close()


def test_closing_ends_what_is_at_work() -> None:
    own = patient()
    with ThreadPoolExecutor(1) as pool:
        looping = pool.submit(own.render, job(LOOP))
        wait_until(lambda: bool(own._processes._all))
        own.close()
        with pytest.raises(EngineDeadError, match="closed"):
            looping.result(timeout=5)
    with pytest.raises(EngineDeadError, match="closed"):
        own.render(job("x"))
    assert all(process.poll() is not None for process in own._processes._all)


def test_quick_templates_share_one_process() -> None:
    """Another one would take longer to start than they take together."""
    own = patient()
    own.render(job("warm"))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: own.render(job("{{ messages[0].content }}")), range(12)))
    assert len(own._processes._all) < 3
    own.close()


def test_many_at_once_share_a_few_processes(renderer: TemplateRenderer) -> None:
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: renderer.render(job("{{ messages[0].content }}", str(i))), range(64)))
    assert texts == [str(i) for i in range(64)]
    assert len(renderer._processes._all) <= MAX_PROCESSES


def wait_until(is_true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.01)
