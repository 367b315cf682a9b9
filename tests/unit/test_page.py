"""The page of the server: its files keep to the content policy, who may read it, and what it reads of the server."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient
from starlette.types import Scope

from nanoflow.config import ServerConfig
from nanoflow.engine.messages import EngineStats, Ready
from nanoflow.engine.own_book import book_facts
from nanoflow.graph.fuse import fuse_swiglu
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, PlanEntry, load_book
from nanoflow.plan.dependencies import waits_in_period
from nanoflow.plan.sequential import sequential_plan
from nanoflow.server.app import create_app
from nanoflow.server.page import FOLDER, PATHS, is_of_page
from tests.fake_async_engine import FakeAsyncEngine
from tests.fake_server import complete, error_of
from tests.plans import resource_plan

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
HTML = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
KEYED = ServerConfig(served_model_name="toy", api_key="key-1")
GRAPH = build_graph(preset_config("llama-3.2-1b"), 512)
SEQUENTIAL, SPLIT = sequential_plan(GRAPH, 256), resource_plan(GRAPH, 256, 128)


class PlanningEngine(FakeAsyncEngine):
    """Has a book of two plans, of which the second one has run last."""

    latest: str | None = SPLIT.digest

    def __init__(self) -> None:
        super().__init__()
        entry = PlanEntry(plan=SPLIT, min_tokens=1, max_tokens=256)
        self.facts = dataclasses.replace(
            self.facts, book=book_facts(PlanBook(fallback=SEQUENTIAL, entries=(entry,)), GRAPH)
        )

    @property
    def stats(self) -> EngineStats:
        tiers = {"host": TierCounts(queries=8, hits=4, capacity_bytes=100, used_bytes=25)}
        return dataclasses.replace(
            super().stats, latest_plan=self.latest, iteration=7, iterations_s=0.5, tiers=tiers, num_waiting=3
        )


@pytest.fixture(scope="module")
def engine() -> PlanningEngine:
    return PlanningEngine()


@pytest.fixture(scope="module")
def http(engine: PlanningEngine) -> Iterator[Any]:
    with client(engine, ServerConfig(served_model_name="toy")) as opened:
        yield opened


def client(engine: FakeAsyncEngine, config: ServerConfig) -> Any:
    """Asks the application without a socket."""
    return TestClient(create_app(engine, config), base_url="http://127.0.0.1")


# Files


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for name, text in FILES.items():
        urls = set(re.findall(r"https?://[^\s\"'`)]+", text.replace("http://www.w3.org/2000/svg", "")))
        assert not urls, f"{name} names {urls}"
        assert "@import" not in text and "url(" not in text, name
    assert sum(map(len, FILES.values())) < 64 * 1024


def test_no_text_becomes_markup() -> None:
    for name, text in SCRIPTS.items():
        found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", text)
        assert not found, f"{name} has {found}"
    page = FILES["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|javascript:", page), "the policy forbids it"


def test_every_file_that_is_named_is_there_and_relative() -> None:
    named = re.findall(r"(?:src|href)=\"([^\"#]+)\"", FILES["index.html"])
    assert {f"/{name}" for name in named if name.startswith("page/")} == {
        "/page/app.js",
        "/page/icon.svg",
        "/page/style.css",
    }
    assert set(named) - {"docs", "metrics"} == {name for name in named if f"/{name}" in PATHS}
    imported = {name for text in SCRIPTS.values() for name in re.findall(r"from \"\./([\w.]+)\"", text)}
    assert imported == SCRIPTS.keys() - {"app.js"}
    for text in SCRIPTS.values():
        assert not re.findall(r"(?:read|ask|fetch)\([\"'`]/", text), "behind a prefix only relative paths lead anywhere"


def test_every_element_that_scripts_name_is_in_the_page() -> None:
    ids = set(re.findall(r"\bid=\"([\w-]+)\"", FILES["index.html"]))
    named = {name for text in SCRIPTS.values() for name in re.findall(r"byId\(\"([\w-]+)\"\)", text)}
    assert named <= ids, named - ids
    labelled = re.findall(r"(?:for|aria-(?:labelledby|describedby))=\"([\w-]+)\"", FILES["index.html"])
    assert set(labelled) <= ids and labelled


def contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG 2, from 1 to 21; a text of usual size needs 4.5."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_the_light_and_in_the_dark() -> None:
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in FILES["style.css"].split("@media (prefers-color")
    ]
    texts = {"ink": "back panel own", "soft": "back panel", "main": "panel back", "on-main": "main", "bad": "bad-back"}
    texts |= {"panel": "compute memory network unknown"}
    assert len(schemes) == 2
    for colours in schemes:
        for text, backs in texts.items():
            low = {back for back in backs.split() if contrast(colours[text], colours[back]) < 4.5}
            assert not low, f"{text} on {low}"


def test_a_wheel_has_the_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "server/page_files/*" in project["tool"]["setuptools"]["package-data"]["nanoflow"]


# Routes


@pytest.mark.parametrize("path", PATHS)
def test_a_browser_gets_the_page_and_its_files(http: Any, path: str) -> None:
    answer = http.get(path, headers=HTML)
    assert answer.status_code == 200 and answer.text == FILES[PATHS[path]]
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert (
        policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
    )
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
    kind = {"": "text/html", "html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].startswith(kind[PATHS[path].rpartition(".")[2]])


def test_programs_get_json_at_the_root(http: Any) -> None:
    for accept in ("*/*", "application/json", "text/htmlx"):
        answer = http.get("/", headers={"accept": accept})
        assert answer.json()["model"] == "toy" and answer.headers["vary"] == "accept"
    for path in ("/page/nothing.js", "/page/..%2fpage.py", "/page/%2e%2e/page.py"):
        assert http.get(path).status_code == 404


def test_the_page_can_be_switched_off() -> None:
    config = dataclasses.replace(KEYED, disable_page=True)
    http = client(FakeAsyncEngine(), config)
    assert {http.get(path, headers=HTML).status_code for path in PATHS} == {401}
    key = {"authorization": "Bearer key-1", **HTML}
    assert http.get("/", headers=key).json()["name"] == "nanoflow"
    assert http.get("/page/app.js", headers=key).status_code == 404


def test_the_page_needs_no_key_and_everything_else_does() -> None:
    http = client(FakeAsyncEngine(), KEYED)
    assert {http.get(path, headers=HTML).status_code for path in PATHS} == {200}
    assert http.head("/", headers=HTML).status_code == 200
    assert "toy" not in http.get("/", headers=HTML).text
    for path in ("/status", "/plan", "/metrics", "/v1/models", "/page/none.js", "/page", "/page/"):
        assert http.get(path, headers=HTML).status_code == 401, path
    assert http.get("/").status_code == 401, "a program at / is told the model's name"
    assert http.get("/status", headers={"authorization": "Bearer key-1"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "raw_path", "method"),
    [
        ("/page/app.js", b"/page/%61pp.js", "GET"),
        ("/page/app.js", b"/x/../page/app.js", "GET"),
        ("/page/app.js", b"/page/app.js", "POST"),
        ("/page/app.js/", b"/page/app.js/", "GET"),
        ("//", b"//", "GET"),
        ("/v1/models", b"/", "GET"),
    ],
)
def test_only_the_exact_path_is_open(path: str, raw_path: bytes, method: str) -> None:
    scope: Scope = {"type": "http", "path": path, "raw_path": raw_path, "method": method}
    assert not is_of_page({**scope, "headers": [(b"accept", b"text/html")]})
    assert is_of_page({**scope, "path": "/page/app.js", "raw_path": b"/page/app.js", "method": "GET", "headers": []})


def test_status_says_what_runs_now(http: Any) -> None:
    before = http.get("/status").json()
    complete(http, max_tokens=5)
    now = http.get("/status").json()
    assert (now["object"], now["model"], now["num_waiting"]) == ("status", "toy", 3)
    assert now["generation_tokens"] - before["generation_tokens"] == 5
    assert now["prompt_tokens"] - before["prompt_tokens"] == 4 and now["time_s"] > before["time_s"]
    assert (now["iterations"], now["iterations_s"], now["plan"]) == (7, 0.5, SPLIT.digest)
    assert now["tiers"] == {"host": {"used_bytes": 25, "capacity_bytes": 100, "queries": 8, "hits": 4}}
    assert [plan["digest"] for plan in now["plans"]] == [SEQUENTIAL.digest, SPLIT.digest]


def test_the_plan_that_runs_is_told_as_a_whole(http: Any, engine: PlanningEngine) -> None:
    plan = http.get("/plan").json()
    assert (plan["digest"], plan["is_latest"], plan["num_tokens"]) == (SPLIT.digest, True, 256)
    assert len(plan["nano_operations"]) == len(SPLIT.nano_operations) > len(GRAPH.layer)
    resources = {operation.name: operation.resource.value for operation in GRAPH.layer}
    for told, nano in zip(plan["nano_operations"], SPLIT.nano_operations, strict=True):
        assert (told["operation"], told["start"], told["stop"]) == (nano.operation, nano.start, nano.stop)
        assert all(place < plan["nano_operations"].index(told) for place in told["waits"])
        assert told["resource"] == resources[nano.operation] and told["lane"] in {
            lane["name"] for lane in plan["lanes"]
        }
    other = http.get(f"/plan?digest={SEQUENTIAL.digest}").json()
    assert (other["name"], other["is_latest"]) == (SEQUENTIAL.name, False)
    missing = http.get("/plan?digest=none")
    assert (missing.status_code, error_of(missing)["param"], error_of(missing)["code"]) == (
        404,
        "digest",
        "plan_not_found",
    )
    engine.latest = None
    try:
        assert http.get("/plan").json()["digest"] == SEQUENTIAL.digest, "nothing has run: the fallback"
    finally:
        del engine.latest


def test_an_engine_without_plans_has_none() -> None:
    http = client(FakeAsyncEngine(), ServerConfig(served_model_name="toy"))
    assert error_of(http.get("/plan"))["code"] == "plan_not_found"
    assert http.get("/status").json()["plans"] == []


def test_plans_reach_every_front_end(engine: PlanningEngine) -> None:
    document = msgspec.msgpack.encode(Ready(facts=engine.facts))
    book = msgspec.msgpack.decode(document, type=Ready).facts.book
    assert book is not None and [plan.digest for plan in book.contents] == [SEQUENTIAL.digest, SPLIT.digest]


def test_what_a_nano_operation_waits_for_in_its_period() -> None:
    """One of the stored plans: attention of a nano-batch runs inside products of the other, of the layer before."""
    path = ROOT / "benchmarks/results/plans_llama-3-8b_h200_1024-512.json"
    plan = load_book(path).entries[0].plan
    waits = waits_in_period(plan, fuse_swiglu(build_graph(preset_config("llama-3-8b"), 2048)))
    names = [nano.operation for nano in plan.nano_operations]
    first = names.index("decode_attention")
    waiting = [names[place] for place, found in enumerate(waits) if first in found]
    assert waiting[0] == "attn_norm" and "o_proj" in waiting, "by the plan, and by its result"
    assert names[5:0:-1][:2] == ["attn_norm", "down_proj"] and 4 in waits[5], "of the layer before, and of its tokens"
    assert all(early < late for late, found in enumerate(waits) for early in found)
