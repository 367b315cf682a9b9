"""Words in pictures of plans: no name is cut; abbreviations, shares and scales are explained. Else: test_drawing.py."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from nanoflow.plan.sequential import nanobatch_plan
from nanoflow.timeline.drawing import abbreviation, label, order_timeline
from nanoflow.timeline.drawing_svg import svg
from nanoflow.timeline.drawing_text import text
from nanoflow.timeline.timeline import Timeline
from tests.unit.test_drawing import GRAPH, SVG, boxes, number, span, two_lanes


def test_no_name_is_cut_and_what_is_abbreviated_is_explained() -> None:
    plan = nanobatch_plan(GRAPH, 2048, [512, 1024, 1536], name="n")
    timeline = order_timeline(plan, GRAPH, 3)
    names = {op.name for op in GRAPH.layer}
    short = {abbreviation(name) for name in names}
    assert len(short) == len(names), "no two have one abbreviation"
    for width in (60, 120, 900):
        lines = text([timeline], width=width).splitlines()
        drawn = set(re.findall(r"[A-D]:([a-z_]+)", lines[1]))
        assert drawn <= names | short
        explained = set(re.findall(r"(\w+) (\w+)", " ".join(lines[2:])))
        assert all((name, full) in explained for name in drawn - names for full in names if abbreviation(full) == name)
        assert drawn or width < 900
    for document in (svg([order_timeline(plan, GRAPH, 1)]), svg([two_lanes()])):
        written = {box.findtext(f"{SVG}text") for box in boxes(document)} - {None}
        assert written and written <= names | short
        plain = [element.text or "" for element in ET.fromstring(document).iter(f"{SVG}text")]
        for name in written - names:
            assert any(f"{name} " in words for words in plain)


@pytest.mark.parametrize(
    ("operation", "room", "shown"),
    [
        ("gate_up_proj", 12, "gate_up_proj"),
        ("gate_up_proj", 11, "gup"),
        ("gate_up_proj", 3, "gup"),
        ("gate_up_proj", 2, ""),
        ("activation", 9, "act"),
        ("o_proj", -1, ""),
    ],
)
def test_a_name_is_whole_or_abbreviated_or_left_out(operation: str, room: int, shown: str) -> None:
    assert label(operation, room) == shown


def test_a_picture_says_what_its_shares_and_curves_mean() -> None:
    plain = [element.text for element in ET.fromstring(svg([two_lanes()])).iter(f"{SVG}text")]
    assert "R 0.60" in plain and "R: part of the device that a lane is given" in plain
    assert plain.count("100 %") == plain.count("0") - 1 == 2, "a scale for each resource; the axis begins with 0 too"
    heights = {
        words: [
            number(each, "y") for each in ET.fromstring(svg([two_lanes()])).iter(f"{SVG}text") if each.text == words
        ]
        for words in ("100 %", "0")
    }
    assert [low - high for high, low in zip(heights["100 %"], heights["0"][-2:], strict=True)] == [25.0, 25.0]
    whole = Timeline(name="", spans=(span(0, 10, lane="a lane with a name of forty characters ok"),), period_s=1e-5)
    document = svg([whole])
    assert "a lane with a name of forty characters ok</text>" in document and "textLength" in document
