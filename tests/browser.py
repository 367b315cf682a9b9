"""A headless Chromium, driven through its DevTools protocol over two pipes; it needs no package beside the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VARIABLE = "NANOFLOW_CHROMIUM"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"),
    "--disable-features=Translate,OptimizationHints,MediaRouter",
)
# The browser reads commands from descriptor 3 and writes answers to 4. Others are moved out of the way first.
_START = """
import fcntl, os, sys
moved = [fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3]]
for number, wanted in zip(moved, (3, 4)):
    os.dup2(number, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""
# For scripts of tests: $("id") is an element. Names of ids alone do not do, as some are functions of every window.
_SHORT = "window.$ = (id) => document.getElementById(id)"
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}


def chromium() -> str | None:
    """Path of a Chromium on this machine, that of the variable NANOFLOW_CHROMIUM first; None if there is none."""
    found = (shutil.which(name) for name in (os.environ.get(VARIABLE, ""), *NAMES) if name)
    return next((path for path in found if path is not None), None)


class BrowserError(Exception):
    """A command or a script in a page has failed."""


@dataclass(slots=True)
class Browser:
    """A running browser.

    Attributes:
        commands, answers: Descriptors to write to and to read from.
    """

    commands: int
    answers: int
    _rest: bytes = b""
    _number: int = 0
    events: list[Any] = field(default_factory=list)

    def call(self, method: str, session: str | None = None, timeout_s: float = 20.0, **params: Any) -> Any:
        """Send a command and return its result; events that come before it are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        command |= {} if session is None else {"sessionId": session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        deadline_s = time.monotonic() + timeout_s
        while True:
            message = self._message(deadline_s)
            if message.get("id") != self._number:
                self.events.append(message)
            elif "error" in message:
                raise BrowserError(f"{method}: {message['error']['message']}")
            else:
                return message["result"]

    def _message(self, deadline_s: float) -> Any:
        while b"\0" not in self._rest:
            if not select.select([self.answers], [], [], max(deadline_s - time.monotonic(), 0.0))[0]:
                raise BrowserError("the browser does not answer")
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise BrowserError("the browser has ended")
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def open(self, url: str, *, width: int = 1100, height: int = 760, dark: bool = False, phone: bool = False) -> Tab:
        """Open a page in a tab of its own, which shares nothing with others. In scripts $("id") is an element."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        tab = Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        scale = 2 if phone else 1
        tab.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        if phone:
            tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=_SHORT)
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete'")
        return tab


@dataclass(slots=True)
class Tab:
    """A page that is open."""

    browser: Browser
    session: str

    def call(self, method: str, **params: Any) -> Any:
        """Send a command about this page."""
        return self.browser.call(method, self.session, **params)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(f"{script}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def wait(self, script: str, timeout_s: float = 15.0) -> Any:
        """Wait until an expression is true; return its value."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            if time.monotonic() > deadline_s:
                raise BrowserError(f"waited too long for {script}; the page has: {self.run('document.body.innerText')}")
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """The visible text of the first element that a selector finds; empty if there is none."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key of the keyboard."""
        about = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
        written = {"Enter": "\r", " ": " "}.get(key)
        down = {**about, "type": "keyDown" if written else "rawKeyDown"} | ({"text": written} if written else {})
        self.call("Input.dispatchKeyEvent", **down)
        self.call("Input.dispatchKeyEvent", **about, type="keyUp")

    def picture(self, clip: dict[str, float] | None = None) -> bytes:
        """What is seen as PNG, or a rectangle of it (x, y, width, height, scale)."""
        part = {} if clip is None else {"clip": clip}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **part)["data"])

    def complaints(self) -> list[str]:
        """Errors of scripts, and what the content policy refused, so far."""
        own = [event for event in self.browser.events if event.get("sessionId") == self.session]
        thrown = [str(e["params"]["exceptionDetails"]) for e in own if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in own if e["method"] == "Log.entryAdded"]
        return thrown + [f"{e['text']} {e.get('url', '')}" for e in entries if e["level"] == "error"]


@contextmanager
def running_browser(path: str) -> Iterator[Browser]:
    """Start a browser; it is ended, and its files are removed, at the end."""
    (theirs, commands), (answers, ours) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        start = (sys.executable, "-S", "-c", _START, str(theirs), str(ours))
        process = subprocess.Popen(
            (*start, path, *_FLAGS, f"--user-data-dir={folder}"),
            pass_fds=(theirs, ours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": folder},
        )
        os.close(theirs)
        os.close(ours)
        browser = Browser(commands, answers)
        try:
            yield browser
            browser.call("Browser.close")
        finally:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(commands)
            os.close(answers)
