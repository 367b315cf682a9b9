"""Pictures of timelines: what is where, that it is one document, escaped, small, and the same every time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from nanoflow.graph.operation import Resource
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from nanoflow.timeline.drawing import TOKEN_S, headline, order_timeline, ticks_us, use_steps
from nanoflow.timeline.drawing_svg import svg
from nanoflow.timeline.drawing_text import text
from nanoflow.timeline.timeline import Span, Timeline

GRAPH = build_graph(preset_config("llama-3-8b"), None)
SVG = "{http://www.w3.org/2000/svg}"


def span(
    start_us: float,
    stop_us: float,
    *,
    operation: str = "qkv_proj",
    layer: int = 0,
    tokens: tuple[int, int] = (0, 512),
    lane: str = "gemm",
    resource: Resource | None = Resource.COMPUTE,
    share: float = 0.6,
) -> Span:
    return Span(
        operation=operation,
        layer=layer,
        start_token=tokens[0],
        stop_token=tokens[1],
        lane=lane,
        resource=resource,
        share=share,
        start_s=start_us * 1e-6,
        stop_s=stop_us * 1e-6,
    )


def two_lanes(name: str = "overlapped") -> Timeline:
    attention = {"operation": "decode_attention", "lane": "attention", "resource": Resource.MEMORY, "share": 0.4}
    return Timeline(
        name=name,
        spans=(
            span(0, 40),
            span(40, 80, tokens=(512, 1024)),
            span(50, 100, **attention),  # type: ignore[arg-type]
            span(80, 100, operation="o_proj", layer=1),
        ),
        period_s=80e-6,
    )


def boxes(document: str) -> list[ET.Element]:
    """The boxes of nano-operations: groups of a rectangle, perhaps a name, and a tooltip."""
    return list(ET.fromstring(document).iter(f"{SVG}g"))


def tooltip(box: ET.Element) -> str:
    return box.findtext(f"{SVG}title") or ""


def number(element: ET.Element | None, attribute: str) -> float:
    assert element is not None
    return float(element.attrib[attribute])


# --- what both show --------------------------------------------------------------------------------------------------


def test_use_is_the_sum_of_the_shares_that_run() -> None:
    timeline = two_lanes()
    assert use_steps(timeline, Resource.COMPUTE) == [
        (0.0, 0.6),
        (pytest.approx(40e-6), 0.6),
        (pytest.approx(80e-6), 0.6),
        (pytest.approx(100e-6), 0.0),
    ]
    assert use_steps(timeline, Resource.MEMORY) == [(0.0, 0.0), (pytest.approx(50e-6), 0.4), (pytest.approx(1e-4), 0.0)]
    both = Timeline(name="", spans=(span(0, 10, share=0.3), span(5, 10, share=0.3)))
    assert [level for _, level in use_steps(both, Resource.COMPUTE)] == [0.3, 0.6, 0.0]


def test_the_headline_compares_with_the_sequential_makespan() -> None:
    assert headline(two_lanes(), None) == "overlapped: 80.0 us a layer"
    assert (
        headline(two_lanes(), 100e-6)
        == "overlapped: 80.0 us a layer, 25.0 % faster than one after the other (100.0 us)"
    )
    assert headline(replace(two_lanes(), period_s=None), 100e-6) == "overlapped"


@pytest.mark.parametrize(("length_us", "most"), [(100, 11), (812.3, 11), (0.7, 5), (36864, 2), (1e7, 30)])
def test_ticks_are_round_and_few(length_us: float, most: int) -> None:
    ticks = ticks_us(length_us * 1e-6, most)
    assert ticks[0] == 0 and ticks[-1] <= length_us and 1 <= len(ticks) <= most
    assert all(re.fullmatch(r"[125]0*e[+-]\d+", f"{ticks[1]:.0e}") for _ in ticks[1:2])
    assert len(ticks) >= min(most // 3, 2)


def test_an_order_is_as_wide_as_its_tokens_and_respects_lanes_and_the_graph() -> None:
    plan = nanobatch_plan(GRAPH, 512, [128])
    timeline = order_timeline(plan, GRAPH, num_layers=2)
    assert timeline.period_s is None and "order only" in timeline.name
    assert len(timeline.spans) == 2 * len(plan.nano_operations)
    # One lane: no gap, no overlap.
    assert timeline.duration_s == pytest.approx(2 * len(GRAPH.layer) * 512 * TOKEN_S)
    first, second = timeline.spans[:2]
    assert first.start_token == 0 and first.stop_s == second.start_s == pytest.approx(128e-6)
    assert {s.resource for s in timeline.spans} == {Resource.COMPUTE, Resource.MEMORY}
    assert {s.resource for s in order_timeline(plan, None, 1).spans} == {None}


def lanes_of_two(waits: tuple[int, ...] = ()) -> PipelinePlan:
    """Norm on one lane, its product on another."""
    return PipelinePlan(
        name="two",
        num_tokens=8,
        lanes=(Lane(name="a", share=0.5), Lane(name="b", share=0.5)),
        nano_operations=(
            NanoOperation(operation="attn_norm", start=0, stop=8, lane="a"),
            NanoOperation(operation="qkv_proj", start=0, stop=8, lane="b", waits=waits),
        ),
    )


def test_an_order_waits_for_what_the_plan_or_the_graph_says() -> None:
    starts = {
        known: [s.start_s for s in order_timeline(plan, graph, 1).spans]
        for known, plan, graph in (
            ("nothing", lanes_of_two(), None),
            ("waits", lanes_of_two(waits=(0,)), None),
            ("graph", lanes_of_two(), GRAPH),
        )
    }
    assert starts["nothing"] == [0, 0]
    assert starts["waits"] == starts["graph"] == [0, pytest.approx(8e-6)]


def test_predictions_in_the_plan_are_drawn_layer_after_layer() -> None:
    plan = PipelinePlan(
        name="found",
        num_tokens=8,
        lanes=(Lane(name="a"),),
        nano_operations=(
            NanoOperation(operation="x", start=0, stop=8, lane="a", predicted_start_s=0.0, predicted_end_s=3e-6),
            NanoOperation(
                operation="y", start=0, stop=8, lane="a", stage=1, predicted_start_s=3e-6, predicted_end_s=5e-6
            ),
        ),
        predicted_makespan_s=5e-6,
    )
    timeline = order_timeline(plan, None, num_layers=2)
    assert timeline.period_s == 5e-6 and "predicted" in timeline.name
    placed = [(s.operation, s.layer, round(s.start_s * 1e6, 6)) for s in timeline.spans]
    assert placed == [("x", 0, 0), ("x", 1, 5), ("y", 0, 8), ("y", 1, 13)]
    without = replace(plan, predicted_makespan_s=None)
    assert order_timeline(without, None, 2).period_s is None


def test_nothing_to_draw_is_refused() -> None:
    for timelines in ([], [Timeline(name="empty", spans=())], [Timeline(name="instant", spans=(span(1, 1),))]):
        with pytest.raises(ValueError, match="nothing to draw"):
            svg(timelines)
        with pytest.raises(ValueError, match="nothing to draw"):
            text(timelines, width=80)


# --- SVG -------------------------------------------------------------------------------------------------------------


def test_boxes_stand_at_their_times_on_their_lanes() -> None:
    first, second, o_proj, attention = boxes(svg([two_lanes()]))
    assert tooltip(first) == "qkv_proj, layer 0, tokens 0:512, compute-bound, R 0.60, from 0.0 us for 40.0 us"
    assert tooltip(attention).startswith("decode_attention, layer 0, tokens 0:512, memory-bound, R 0.40")
    rects = [box.find(f"{SVG}rect") for box in (first, second, o_proj, attention)]
    x = [number(rect, "x") for rect in rects]
    width = [number(rect, "width") for rect in rects]
    assert x[1] - x[0] == pytest.approx(2 * (x[3] - x[1]) * 2, abs=0.5)
    assert x[0] + width[0] == pytest.approx(x[1], abs=1.1)
    y = [number(rect, "y") for rect in rects]
    assert y[0] == y[1] == y[2] < y[3]
    classes = [str(rect.attrib["class"]) for rect in rects if rect is not None]
    assert classes == ["b0 l0", "b1 l0", "b0 l1", "b0 l0"]
    assert first.findtext(f"{SVG}text") == "qkv_proj"


def test_names_are_left_out_where_there_is_no_room() -> None:
    timeline = Timeline(name="", spans=(span(0, 1), span(1, 1000)), period_s=1e-3)
    short, long = boxes(svg([timeline]))
    assert short.find(f"{SVG}text") is None and long.findtext(f"{SVG}text") == "qkv_proj"
    assert "qkv_proj" in tooltip(short)


def test_two_timelines_have_one_scale_and_the_legend_stands_once() -> None:
    slower = Timeline(name="measured", spans=(span(0, 200),), period_s=200e-6)
    document = svg([two_lanes(), slower], sequential_s=100e-6)
    assert "overlapped: 80.0 us" in document and "50.0 % slower than one after" in document
    rects = [box.find(f"{SVG}rect") for box in boxes(document)]
    assert number(rects[-1], "width") == pytest.approx(5 * number(rects[0], "width"), rel=0.01)
    assert document.count("tokens 0:512</text>") == 1
    # Tokens and microseconds have nothing in common.
    order = Timeline(name="order", spans=(span(0, 4096),))
    mixed = [box.find(f"{SVG}rect") for box in boxes(svg([order, slower]))]
    assert number(mixed[0], "width") == number(mixed[1], "width")


def test_curves_are_drawn_of_what_is_used_and_known() -> None:
    def curves(timeline: Timeline) -> list[str]:
        return re.findall(r'<path class="(\w+) curve"', svg([timeline]))

    assert curves(two_lanes()) == ["compute", "memory"]
    reduce = span(0, 10, operation="all_reduce", resource=Resource.NETWORK)
    assert curves(Timeline(name="", spans=(reduce,))) == ["compute", "memory", "network"]
    assert curves(Timeline(name="", spans=(span(0, 10, resource=None),))) == []


def test_names_are_escaped() -> None:
    timeline = Timeline(name="<b>&", spans=(span(0, 10, operation="a<b", lane="x&y"),), period_s=1e-5)
    document = svg([timeline])
    assert "<b>" not in document
    assert "<b>&: 10.0 us a layer" in [element.text for element in ET.fromstring(document).iter(f"{SVG}text")]
    assert tooltip(boxes(document)[0]).startswith("a<b, layer 0")


def test_three_layers_of_forty_nano_operations_twice_are_small_and_always_the_same() -> None:
    plan = nanobatch_plan(GRAPH, 2048, [512, 1024, 1536])
    timeline = order_timeline(plan, GRAPH, num_layers=3)
    assert len(timeline.spans) >= 120
    documents = {svg([timeline, replace(timeline, name="again")]) for _ in range(3)}
    assert len(documents) == 1
    assert len(documents.pop().encode()) <= 100_000


def test_light_and_dark() -> None:
    assert "prefers-color-scheme:dark" in svg([two_lanes()])


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_cell_is_a_moment() -> None:
    lines = text([two_lanes()], width=111).splitlines()
    assert lines[0] == "overlapped: 80.0 us a layer"
    # 100 us in 100 columns after the lane's name.
    margin = len("attention") + 2
    assert lines[1] == "gemm".ljust(margin) + "A:qkv_proj".ljust(40, "░") + "B:qkv_proj".ljust(40, "░") + (
        "A:o_proj".ljust(20, "▒")
    )
    assert lines[2] == "attention".ljust(margin) + "·" * 50 + "A:decode_attention".ljust(50, "░")
    assert lines[3] == "compute".ljust(margin) + "▅" * 100
    assert lines[4] == "memory".ljust(margin) + " " * 50 + "▃" * 50
    assert lines[5].split()[:3] == ["us", "0", "20"] and lines[5].index("20") == margin + 20
    assert lines[7:] == [
        "A tokens 0:512      B tokens 512:1024",
        "░░ layer 0   ▒▒ layer 1",
        "gemm R 0.60, attention R 0.40 (R: part of the device that a lane is given)",
        "compute, memory: sum of the parts of the device that are in use by operations which it bounds: ▁ little, ▄",
        "half, █ all of it",
    ]


def test_ascii_where_the_terminal_has_nothing_else() -> None:
    shown = text([two_lanes(), two_lanes("measured")], width=80, is_ascii=True)
    assert shown.isascii() and "A:qkv_proj---" in shown and "measured" in shown


def test_colours_change_no_character() -> None:
    plain = text([two_lanes()], width=100)
    coloured = text([two_lanes()], width=100, colour=True)
    assert "\x1b[" in coloured and "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


@pytest.mark.parametrize("width", [40, 77, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    plan = nanobatch_plan(GRAPH, 2048, [512, 1024, 1536], name="n")
    lines = text([order_timeline(plan, GRAPH, 3)], width=width).splitlines()
    assert max(len(line) for line in lines[1:]) <= width
    with pytest.raises(ValueError, match="too small"):
        text([order_timeline(plan, GRAPH, 3)], width=20)


def test_short_blocks_leave_a_mark() -> None:
    timeline = Timeline(name="", spans=(span(0, 500), span(500, 500.5, tokens=(0, 9)), span(600, 1000)), period_s=1e-3)
    lane = text([timeline], width=60).splitlines()[1]
    assert lane.count("A") == 1 and lane.count("B") == 2
    assert re.search(r"B:qkv_proj░+A·+B:qkv_proj", lane)


def test_a_sequential_plan_of_one_layer() -> None:
    shown = text([order_timeline(sequential_plan(GRAPH, 64), None, 1)], width=200)
    assert "A:gate_up_proj" in shown and "compute" not in shown


def test_lanes_with_short_names_do_not_move_the_axis() -> None:
    timeline = Timeline(name="", spans=(span(0, 10, lane="a"),))
    lane, axis = text([timeline], width=60).splitlines()[1:6:3]
    assert lane.index("A") == axis.index("0")
