"""Take the pictures of docs/page.md: the server's page in a headless Chromium. `python -m tools.page_pictures`.

The first two show a server of the embedded model. The third shows how the page draws a stored plan for an H200: its
server has an engine without a model, and nothing runs there.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from tests.browser import Browser, Tab, chromium, running_browser
from tests.fake_async_engine import FakeAsyncEngine
from tests.fake_server import served
from tests.server_process import running_server

from nanoflow.config import ServerConfig
from nanoflow.engine.messages import EngineStats
from nanoflow.engine.own_book import book_facts
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, load_book
from nanoflow.plan.sequential import sequential_plan

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs/pictures"
BOOK = ROOT / "benchmarks/results/plans_llama-3-8b_h200_1024-512.json"
MAX_BYTES = 150_000
QUESTION = "class Stack:\n    def push(self, item):"


class PlannedEngine(FakeAsyncEngine):
    """Says that the first plan of the stored book runs."""

    def __init__(self) -> None:
        super().__init__()
        graph, entries = fuse_swiglu(build_graph(preset_config("llama-3-8b"), 4096)), load_book(BOOK).entries
        book = PlanBook(fallback=sequential_plan(graph, entries[0].plan.num_tokens), entries=entries)
        self.facts = dataclasses.replace(self.facts, book=book_facts(book, graph))
        self.latest = entries[0].plan.digest

    @property
    def stats(self) -> EngineStats:
        """The state of an engine that has run that plan."""
        return dataclasses.replace(super().stats, latest_plan=self.latest)


def ask(tab: Tab) -> None:
    """Have the model answer, and wait until the panel has shown it."""
    tab.wait("$('model').value")
    tab.run("document.querySelector('[name=max_tokens]').value = 120")
    tab.run("document.querySelector('[name=seed]').value = 3")
    for text in (QUESTION, "    def pop(self):"):
        tab.run("$('prompt').focus()")
        tab.type(text)
        tab.run("$('send').click()")
        tab.wait("!$('send').disabled", timeout_s=60.0)
    tab.run("$('prompt').focus()")


def save(name: str, picture: bytes) -> None:
    """Write a picture, unless it is too large for a repository."""
    if len(picture) > MAX_BYTES:
        raise SystemExit(f"{name} has {len(picture):,} bytes, more than {MAX_BYTES:,}")
    (PICTURES / name).write_bytes(picture)
    print(f"{name}: {len(picture):,} bytes")


def of_the_embedded_model(browser: Browser) -> None:
    """A conversation on a desk, light, and on a phone, dark."""
    with running_server(("default", "--device", "cpu")) as server:
        desk = browser.open(f"{server.root_url}/", width=1100, height=720)
        ask(desk)
        desk.wait("/[0-9] ms/.test($('numbers').innerText)")
        save("page-desk-light.png", desk.picture())
        phone = browser.open(f"{server.root_url}/", width=360, height=640, phone=True, dark=True)
        ask(phone)
        phone.run("document.activeElement.blur()")
        save("page-phone-dark.png", phone.picture())


def of_a_plan(browser: Browser) -> None:
    """The drawing of a plan, in the dark."""
    with served(PlannedEngine(), ServerConfig(served_model_name="llama-3-8b")) as url:
        tab = browser.open(f"{url}/", width=1100, height=720, dark=True)
        tab.wait("document.querySelectorAll('#drawing rect').length > 10")
        box = tab.run("(({x, y, width, height}) => ({x, y, width, height}))($('plan').getBoundingClientRect())")
        around = {"x": box["x"] - 12, "y": box["y"], "width": box["width"] + 24, "height": box["height"]}
        save("page-plan-dark.png", tab.picture(clip={**around, "scale": 1.5}))


def main() -> None:
    """Take all pictures."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    path = chromium()
    if path is None:
        raise SystemExit("there is no Chromium on this machine")
    with running_browser(path) as browser:
        of_the_embedded_model(browser)
        of_a_plan(browser)


if __name__ == "__main__":
    main()
