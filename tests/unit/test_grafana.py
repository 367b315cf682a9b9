"""The dashboard for Grafana: it is up to date, and every metric and label in it is one that the server has."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nanoflow.engine.book_facts import BookFacts, PlanName
from nanoflow.engine.messages import EngineStats
from nanoflow.kvcache.tier_counts import TierCounts
from nanoflow.server.metrics import ServerMetrics
from tests.fake_async_engine import FakeAsyncEngine

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = json.loads((ROOT / "deploy/grafana/nanoflow.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in WRITTEN["panels"] for target in panel.get("targets", ())]


class TieredEngine(FakeAsyncEngine):
    @property
    def stats(self) -> EngineStats:
        return dataclasses.replace(super().stats, tiers={"host": TierCounts()})


def samples() -> dict[str, set[str]]:
    """The labels of each series of a server with plans and tiers, by its name; `instance` is Prometheus' own."""
    engine = TieredEngine()
    book = BookFacts(digest="b", plans=(PlanName(name="sequential", digest="d"),))
    engine.facts = dataclasses.replace(engine.facts, book=book)
    text = ServerMetrics(engine, prefix="nanoflow", model_name="toy").render().decode()
    return {
        sample.name: {*sample.labels, "instance"}
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_file_is_what_the_table_says() -> None:
    dashboard = runpy.run_path(str(ROOT / "tools/grafana_dashboard.py"))["dashboard"]
    assert dashboard() == WRITTEN, "python -m tools.grafana_dashboard"


def test_every_metric_and_label_is_there() -> None:
    there = samples()
    named = {name for line in EXPRESSIONS for name in re.findall(r"nanoflow:\w+", line)}
    assert named <= there.keys(), named - there.keys()
    assert len(named) > 25 and not any("{M}" in line for line in EXPRESSIONS)
    for panel in WRITTEN["panels"]:
        for target in panel.get("targets", ()):
            line = target["expr"]
            wanted = set(re.findall(r"(\w+)=~", line)) | set(re.findall(r"by \((\w+)\)", line))
            wanted |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for name in re.findall(r"nanoflow:\w+", line):
                assert wanted <= there[name], f"{panel['title']}: {name} has no {wanted - there[name]}"
            assert line.count("(") == line.count(")") and line.count("{") == line.count("}")
    variables = [each["query"]["query"] for each in WRITTEN["templating"]["list"] if each["type"] == "query"]
    for query in variables:
        found = re.fullmatch(r"label_values\((\S+), (\w+)\)", query)
        assert found is not None and found[2] in there[found[1]]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in WRITTEN["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in WRITTEN["panels"]]
    assert len(set(ids)) == len(ids)
