"""The page in a headless Chromium, as its readers use it; skipped where there is none."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from nanoflow.config import ServerConfig
from nanoflow.server.app import create_app
from tests.browser import VARIABLE, Browser, Tab, chromium, running_browser
from tests.fake_async_engine import FakeAsyncEngine
from tests.fake_server import listening, served, wait_until
from tests.scripted_engine import ScriptedEngine
from tests.server_process import running_server
from tests.templates import CALLING
from tests.toy_tokenizers import toy_tokenizer

FOUND = chromium()
pytestmark = pytest.mark.skipif(FOUND is None, reason=f"there is no Chromium; {VARIABLE} names one")

TOY = ServerConfig(served_model_name="toy")
HOSTILE = """Hello <img src=x onerror="window.hacked = 1"> **bold** and `co<b>de`
[bad](javascript:alert(1)) [worse](javascript://a/%0Aalert) [good](https://example.com/a)

- one
- two

```html
<script>window.hacked = 1</script>
"""
CALL = """<think>
Let me look.
</think>

<tool_call>
{"name": "get_weather", "arguments": {"city": "Rome"}}
</tool_call>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert FOUND is not None
    with running_browser(FOUND) as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> FakeAsyncEngine:
    return FakeAsyncEngine(step_s=0.02)


@pytest.fixture(scope="module")
def slow_url(slow: FakeAsyncEngine) -> Iterator[str]:
    with served(slow, TOY) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(toy_tokenizer(chat_template=CALLING))
    yield engine
    engine.tokenizer.close()


@pytest.fixture(scope="module")
def scripted_url(scripted: ScriptedEngine) -> Iterator[str]:
    with served(scripted, TOY) as url:
        yield f"{url}/"


def focused(tab: Tab) -> str:
    return str(tab.run("document.activeElement.id || document.activeElement.innerText"))


def ask(tab: Tab, text: str) -> None:
    """Send a message from the keyboard and wait until the answer has ended."""
    tab.run("$('prompt').focus()")
    tab.type(text)
    tab.press("Enter")
    tab.wait("$('stop').disabled")


@pytest.mark.slow
def test_the_embedded_model_answers_once_a_key_is_given(browser: Browser) -> None:
    """The whole server: key, streamed text, numbers, plan."""
    options = ("--device", "cpu", "--api-servers", "1", "--api-key", "key-1")
    with running_server(("default", *options)) as server:
        tab = browser.open(f"{server.root_url}/")
        tab.wait("$('keys').open")
        assert focused(tab) == "keys-text"
        tab.type("key-1")
        tab.press("Enter")
        assert tab.wait("$('model').value") == "default"
        tab.run(
            "window.lengths = new Set(); new MutationObserver(() => window.lengths.add("
            "document.querySelector('.rendered')?.innerText.length)).observe($('log'), {subtree: true, childList: 1})"
        )
        tab.wait("$('numbers').innerText.includes('Generated')")  # rates count from here
        tab.run(
            "window.fastest = 0; new MutationObserver(() => { window.fastest = Math.max(window.fastest,"
            "parseFloat(document.querySelector('#numbers dd').innerText) || 0) }).observe($('numbers'), {childList: 1})"
        )
        tab.run("document.querySelector('[name=max_tokens]').value = 120; $('prompt').focus()")
        tab.type("def add(a, b):")
        tab.press("Enter")
        tab.wait("/tokens · [1-9]/.test(document.querySelector('.foot')?.innerText)")
        assert tab.run("window.lengths.size") > 2, "the text has come piece by piece"
        assert tab.run("document.querySelector('.rendered').innerText.length") > 10
        tab.wait("/[0-9] ms/.test($('numbers').innerText)")
        tab.wait("window.fastest > 0")
        shown = tab.text("#numbers")
        assert "KV cache, device" in shown and "Prefix cache, found" in shown, shown
        tab.wait("document.querySelector('#drawing .soft') && !/nothing has run/.test($('drawing').innerText)")
        assert tab.run("document.querySelectorAll('#drawing rect title').length") == 10
        assert tab.run("Object.values(sessionStorage).includes(JSON.stringify('key-1'))")
        assert all("401" in complaint for complaint in tab.complaints()), tab.complaints()
        assert browser.open(f"{server.root_url}/").run("sessionStorage.length") == 0, "of another visitor"


def test_everything_is_done_from_the_keyboard(browser: Browser, slow_url: str, slow: FakeAsyncEngine) -> None:
    tab = browser.open(slow_url)
    assert focused(tab) == "prompt"
    tab.type("one")
    tab.press("Enter", shift=True)
    tab.type("two")
    closed = slow.num_closed
    tab.press("Enter")
    tab.wait("document.querySelector('.rendered')?.innerText.length > 12")
    assert tab.text(".user .text") == "one\ntwo" and focused(tab) == "prompt"
    tab.press("Escape")
    tab.wait("document.querySelector('.foot').innerText === 'stopped'")
    wait_until(lambda: slow.num_closed == closed + 1)
    assert tab.text(".rendered").startswith("the quick")
    assert "the quick" in tab.run("$('spoken').textContent") and "Stopped." in tab.run("$('spoken').textContent")
    tab.press("Tab")
    assert focused(tab) == "retry"
    tab.press(" ")
    tab.wait("!$('stop').disabled")
    assert focused(tab) == "stop"
    tab.press(" ")
    tab.wait("$('stop').disabled")
    assert focused(tab) == "retry" and tab.run("document.querySelectorAll('.turn').length") <= 2
    tab.run("document.querySelector('.skip').focus()")
    order = []
    for _ in range(13):
        order.append(focused(tab))
        tab.press("Tab")
    assert order[:7] == ["Skip to the message", "model", "new", "key", "log", "prompt", "retry"], order
    assert order[7:] == ["send", "Server now", "Plan", "Settings", "Routes and fields", "Metrics"], order
    unnamed = tab.run(
        "[...document.querySelectorAll('input, select, textarea')].filter((e) => !e.labels.length).length"
    )
    assert unnamed == 0 and tab.complaints() == []


def test_it_fits_a_phone_in_the_dark(browser: Browser, scripted_url: str, scripted: ScriptedEngine) -> None:
    scripted.texts.append("x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n")
    tab = browser.open(scripted_url, width=320, height=640, phone=True, dark=True)
    tab.wait("$('model').value")
    tab.run("$('prompt').value = 'z'.repeat(300); $('send').click()")
    tab.wait("$('stop').disabled && document.querySelector('.rendered pre') !== null")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    for script in ("0", "$('keys').showModal()"):
        tab.run(script)
        assert tab.run("document.documentElement.scrollWidth") <= 320
        assert tab.run(
            "[...document.querySelectorAll('button, input, textarea, select')]"
            ".every((each) => each.getBoundingClientRect().right <= 320)"
        )
    back = tab.run("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, back[4:-1].split(","))) < 60, back


def test_what_a_model_says_stays_text(browser: Browser, scripted_url: str, scripted: ScriptedEngine) -> None:
    scripted.texts.append(HOSTILE)
    tab = browser.open(scripted_url)
    ask(tab, "<b>hi</b>")
    assert tab.run("window.hacked") is None and tab.run("$('log').querySelectorAll('img, script, b').length") == 0
    assert tab.text(".user .text") == "<b>hi</b>" and tab.text(".rendered strong") == "bold"
    assert tab.text(".rendered p code") == "co<b>de" and "window.hacked" in tab.text(".rendered pre")
    assert tab.run("[...$('log').querySelectorAll('a')].map((link) => link.href)") == ["https://example.com/a"]
    assert tab.run("$('log').querySelectorAll('ul li').length") == 2
    tab.call("Page.reload")
    tab.wait("document.readyState === 'complete' && document.querySelectorAll('.turn').length === 2")
    assert tab.text(".rendered strong") == "bold", "a conversation outlasts a reload"
    assert tab.run("document.querySelector('.rendered p').dir") == "auto", "some languages run from the right"


def test_code_ends_where_markdown_says(browser: Browser, slow_url: str) -> None:
    wanted = {
        "```a```\nb": [("text", "```a```\nb")],
        "````md\n```js\na\n```\n````\nb": [("code", "```js\na\n```"), ("text", "b")],
        "```py\na\n``` b\n```\nc": [("code", "a\n``` b"), ("text", "c")],
        "~~~\na": [("code", "a")],
    }
    cut = f"import('./page/markdown.js').then(({{ blocks }}) => {json.dumps(list(wanted))}.map(blocks))"
    for text, found in zip(wanted, browser.open(slow_url).run(cut), strict=True):
        assert [(block["kind"], block["text"]) for block in found] == wanted[text], text


def test_tools_are_called_and_answered(browser: Browser, scripted_url: str, scripted: ScriptedEngine) -> None:
    scripted.texts += [CALL, "It is sunny.", CALL, "As you like."]
    tab = browser.open(scripted_url)
    tab.run("$('example').click(); document.querySelector('[name=system]').value = 'Be brief.'")
    ask(tab, "weather?")
    assert tab.text(".call strong") == "Calls get_weather" and json.loads(tab.text(".call pre")) == {"city": "Rome"}
    assert tab.text(".reasoning summary") == "Reasoning" and not tab.run("document.querySelector('.reasoning').open")
    assert tab.run("document.querySelector('.reasoning div').textContent") == "Let me look."
    assert tab.run("document.activeElement.labels[0].innerText").strip() == "Answer of get_weather"
    tab.type("sunny, 20 degrees")
    tab.run("document.querySelector('[name=others]').value = '{'")
    tab.press("Tab")
    tab.press("Enter")
    assert focused(tab) != "stop" and tab.text("#others-problem"), "an answer is not lost to wrong settings"
    tab.run("document.querySelector('[name=others]').value = ''; document.querySelector('.answers button').focus()")
    tab.press("Enter")
    tab.wait("$('stop').disabled && document.querySelectorAll('.assistant').length === 2")
    assert "sunny, 20 degrees" in scripted.prompts[-1] and "Be brief." in scripted.prompts[-1]
    assert '"name": "get_weather"' in scripted.prompts[-1]
    assert tab.run("[...document.querySelectorAll('.rendered')].at(-1).innerText").strip() == "It is sunny."
    ask(tab, "again?")
    assert tab.run("document.querySelectorAll('form.answers').length") == 1
    ask(tab, "never mind")
    assert tab.run("document.querySelectorAll('form.answers').length") == 0, "a message instead of answers"
    assert scripted.prompts[-1].count("sunny, 20 degrees") == 1 and "never mind" in scripted.prompts[-1]
    time.sleep(0.1)
    assert tab.run("document.querySelectorAll('.busy, [aria-busy=true]').length") == 0, "answers that have ended"
    tab.run("$('new').click()")
    assert tab.run("$('log').childNodes.length") == 0 and focused(tab) == "prompt"


def test_errors_are_said(browser: Browser, slow_url: str, slow: FakeAsyncEngine) -> None:
    tab = browser.open(slow_url)
    tab.run("document.querySelector('[name=others]').value = '{\"temperature\": 9'")
    tab.run("$('prompt').value = 'hi'; $('send').click()")
    assert "JSON" in tab.text("#others-problem") and tab.run("document.activeElement.name") == "others"
    assert tab.run("$('log').childNodes.length") == 0 and tab.run("$('prompt').value") == "hi"
    tab.run("document.querySelector('[name=others]').value = '{\"n\": 2}'; $('send').click()")
    assert "one answer" in tab.text("#others-problem")
    tab.run("document.querySelector('[name=others]').value = '{\"temperature\": 999}'; $('prompt').value = ''")
    ask(tab, "hi")
    assert tab.text("#problem").startswith("400: ") and "(field temperature)" in tab.text("#problem")
    tab.run("document.querySelector('[name=others]').value = ''; $('prompt').value = ''")
    ask(tab, "refuse me")
    assert "the chat template refuses the messages: no" in tab.text("#problem")
    assert tab.run("$('prompt').value") == "refuse me" and tab.run("$('log').childNodes.length") == 0, "to be changed"
    tab.run("$('prompt').value = ''; $('model').append(new Option('gone', 'gone', true, true))")
    ask(tab, "hi")
    assert "'gone' does not exist" in tab.text("#problem") and tab.wait("$('model').value === 'toy'")
    tab.run("$('prompt').value = ''; $('key').click()")
    tab.type("ключ")
    tab.press("Enter")
    assert "This is no key" in tab.text("#keys-why") and tab.run("$('keys').open")
    tab.press("Escape")
    slow.is_alive = False
    try:
        ask(tab, "hi")
        assert "the engine has ended" in tab.text("#problem")
    finally:
        slow.is_alive = True


def test_an_answer_may_break_off(browser: Browser, slow_url: str) -> None:
    tab = browser.open(slow_url)
    running = "read('status').then((now) => numbers(now, { ...now, num_running: 1 }, null)[3][1])"
    names = "Promise.all(['panel', 'api'].map((name) => import(`./page/${name}.js`)))"
    assert tab.run(f"{names}.then(([{{ numbers }}, {{ read }}]) => {running})") != "idle", (
        "a long iteration is not idle"
    )
    begin_answer(tab)
    tab.run("$('new').click()")
    assert not tab.run("$('send').disabled") and tab.run("$('log').childNodes.length") == 0, "a new chat can begin"
    begin_answer(tab)
    tab.call("Page.reload")
    tab.wait("document.readyState === 'complete' && document.querySelectorAll('.turn').length === 2")
    assert tab.text(".rendered").startswith("the quick"), "what has come stays"
    tab.run(
        "window.fetch = async () => new Response(new ReadableStream({ pull(to) { to.error(new TypeError('lost')); } }))"
    )
    ask(tab, "hi")
    assert tab.text("#problem") == "the connection ended before the answer did"
    assert tab.run("document.querySelectorAll('.turn').length") == 3, "Retry asks again"
    assert "no whole JSON" in tab.run("import('./page/api.js').then(({ read }) => read('status')).catch(String)")


def begin_answer(tab: Tab) -> None:
    tab.run("$('prompt').value = 'hi'; $('send').click()")
    tab.wait("document.querySelector('.rendered')?.innerText.length > 12")


def test_it_works_behind_a_prefix(browser: Browser) -> None:
    inner = create_app(FakeAsyncEngine(), dataclasses.replace(TOY, served_model_name="inner"))
    with listening(_stripping(inner, "/llm")) as url:
        tab = browser.open(f"{url}/llm/")
        assert tab.wait("$('model').value") == "inner"
        ask(tab, "hi")
        assert tab.text(".rendered").startswith("the quick")
        assert tab.wait("$('numbers').innerText.includes('Generated')") and tab.complaints() == []


def _stripping(app: ASGIApp, prefix: str) -> ASGIApp:
    """What a proxy does that gives the server a part of its paths."""

    async def strip(scope: Scope, receive: Receive, send: Send) -> None:
        inner: dict[str, Any] = dict(scope)
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{prefix}/"), "the proxy sends other paths to other servers"
            inner["path"] = scope["path"].removeprefix(prefix)
            inner["raw_path"] = scope["raw_path"].removeprefix(prefix.encode())
        await app(inner, receive, send)

    return strip
