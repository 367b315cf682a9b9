"""Timelines as an SVG picture: lanes over time, the layers in flight above them, the use of resources below.

The same timelines give the same bytes. Colours are the nano-batches (the palette of Okabe and Ito, which colour-blind
people can read); their opacity is the layer. Light and dark follow the reader's setting. `drawing.py` says what is
shown; `drawing_text.py` draws the same for a terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from nanoflow.graph.operation import Resource
from nanoflow.timeline.drawing import (
    SHARE_LEGEND,
    USE_LEGEND,
    NanoBatch,
    abbreviations,
    check,
    full_s,
    headline,
    label,
    nano_batch,
    nano_batches,
    resources_used,
    ticks_us,
    unit,
    use_steps,
)
from nanoflow.timeline.timeline import Span, Timeline

_PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#808080")
# Opacity of the fill, by layer; text stays readable on all of them, in light and in dark.
_LAYER_DEPTHS = (0.5, 0.32, 0.16)
_RESOURCE_COLOURS = {Resource.COMPUTE: "#d55e00", Resource.MEMORY: "#0072b2", Resource.NETWORK: "#009e73"}

# Lengths are in pixels at the picture's own width.
_WIDTH = 1200.0
_LEFT, _RIGHT = 140.0, 16.0
_PLOT = _WIDTH - _LEFT - _RIGHT
_HEAD, _LAYER_ROW, _LANE_ROW, _CURVE_ROW, _AXIS, _LEGEND_ROW = 30.0, 13.0, 36.0, 34.0, 34.0, 18.0
_GAP = 4.0
_CHARACTER = 6.05
_MOST_TICKS = 11
_HEAD_CHARACTERS, _HEAD_LINE = 132, 18.0
_LANE_CHARACTER = 6.7
_LEGEND_COLUMNS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The area of one timeline: its top edge, and pixels per second."""

    timeline: Timeline
    top: float
    length_s: float
    head: tuple[str, ...]
    layers: tuple[int, ...]
    resources: tuple[Resource, ...]

    def x(self, time_s: float) -> float:
        return _LEFT + time_s / self.length_s * _PLOT

    @property
    def layers_top(self) -> float:
        return self.top + _HEAD + (len(self.head) - 1) * _HEAD_LINE

    @property
    def lanes_top(self) -> float:
        return self.layers_top + len(self.layers) * _LAYER_ROW + _GAP

    @property
    def curves_top(self) -> float:
        return self.lanes_top + len(self.timeline.lanes) * _LANE_ROW + _GAP

    @property
    def axis_top(self) -> float:
        return self.curves_top + len(self.resources) * _CURVE_ROW

    @property
    def bottom(self) -> float:
        return self.axis_top + _AXIS


def svg(timelines: Sequence[Timeline], *, sequential_s: float | None = None) -> str:
    """A picture of timelines, one below the other on the same time scale.

    Args:
        timelines: One, or a predicted and a measured one.
        sequential_s: Time of a layer's operations one after the other, for comparison; None if unknown.

    Returns:
        An SVG document.

    Raises:
        ValueError: There is no timeline, or one has no span longer than 0.
    """
    check(timelines)
    numbers = nano_batches(timelines)
    frames = _frames(timelines, sequential_s)
    keys = list(_keys(frames))
    legend = [*_legend(numbers, frames[-1].bottom), *_sentences(keys, frames[-1].bottom + _legend_height(numbers))]
    height = frames[-1].bottom + _legend_height(numbers) + len(keys) * _LEGEND_ROW
    title = " | ".join(headline(timeline, sequential_s) for timeline in timelines)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(_WIDTH)} {_n(height)}" role="img">',
        f"<title>{escape(title)}</title>",
        _style(),
        f'<rect class="paper" width="{_n(_WIDTH)}" height="{_n(height)}"/>',
        *(line for frame in frames for line in _picture(frame, numbers)),
        *legend,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _frames(timelines: Sequence[Timeline], sequential_s: float | None) -> list[_Frame]:
    resources = tuple(resources_used(timelines))
    frames: list[_Frame] = []
    for timeline in timelines:
        frames.append(
            _Frame(
                timeline=timeline,
                top=frames[-1].bottom if frames else 0.0,
                length_s=full_s(timeline, timelines),
                head=tuple(textwrap.wrap(headline(timeline, sequential_s), _HEAD_CHARACTERS)) or ("",),
                layers=tuple(sorted({span.layer for span in timeline.spans})),
                resources=resources if any(span.resource for span in timeline.spans) else (),
            )
        )
    return frames


def _style() -> str:
    batches = "".join(f".b{number}{{fill:{colour};stroke:{colour}}}" for number, colour in enumerate(_PALETTE))
    depths = "".join(f".l{number}{{fill-opacity:{depth}}}" for number, depth in enumerate(_LAYER_DEPTHS))
    curves = "".join(f".{name}{{fill:{colour};stroke:{colour}}}" for name, colour in _RESOURCE_COLOURS.items())
    return (
        "<style>text{font:11px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328}"
        ".paper{fill:#fff}.head{font-size:14px;font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}"
        ".inside{font-size:10px}.scale{font-size:9px}.faint{fill:#656d76}.grid{stroke:#8c959f;stroke-width:.5;opacity:.5}"
        ".layer{fill:#8c959f;opacity:.6}.curve{fill-opacity:.35}"
        f"{batches}{depths}{curves}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.faint{fill:#8d96a0}}</style>"
    )


def _picture(frame: _Frame, numbers: dict[NanoBatch, int]) -> Iterator[str]:
    for row, words in enumerate(frame.head):
        y = frame.top + 20 + row * _HEAD_LINE
        yield f'<text class="head" x="{_n(_GAP * 2)}" y="{_n(y)}">{escape(words)}</text>'
    yield from _axis(frame)
    yield from _layers(frame)
    for row, lane in enumerate(frame.timeline.lanes):
        y = frame.lanes_top + row * _LANE_ROW
        share = next(span.share for span in frame.timeline.spans if span.lane == lane)
        yield f'<text class="end" x="{_n(_LEFT - 8)}" y="{_n(y + 15)}"{_squeezed(lane)}>{escape(lane)}</text>'
        if share:
            yield f'<text class="end faint" x="{_n(_LEFT - 8)}" y="{_n(y + 28)}">R {share:.2f}</text>'
        for span in frame.timeline.spans:
            if span.lane == lane:
                yield _block(frame, span, y, numbers[nano_batch(span)])
    for row, resource in enumerate(frame.resources):
        yield from _curve(frame, resource, frame.curves_top + row * _CURVE_ROW)


def _axis(frame: _Frame) -> Iterator[str]:
    """Vertical lines with numbers below, behind everything else."""
    top, bottom = frame.layers_top, frame.axis_top
    ticks = ticks_us(frame.length_s, _MOST_TICKS)
    for tick in ticks:
        x = frame.x(tick * 1e-6)
        yield f'<path class="grid" d="M{_n(x)} {_n(top)}V{_n(bottom + 4)}"/>'
        yield f'<text class="mid faint" x="{_n(x)}" y="{_n(bottom + 16)}">{tick:,.10g}</text>'
    yield f'<text class="end faint" x="{_n(_LEFT - 8)}" y="{_n(bottom + 16)}">{unit(frame.timeline)}</text>'


def _layers(frame: _Frame) -> Iterator[str]:
    """A bar for each layer from its first start to its last end, which shows how many are in flight at once."""
    for row, layer in enumerate(frame.layers):
        y = frame.layers_top + row * _LAYER_ROW
        spans = [span for span in frame.timeline.spans if span.layer == layer]
        start, stop = frame.x(min(span.start_s for span in spans)), frame.x(max(span.stop_s for span in spans))
        yield f'<text class="end faint" x="{_n(_LEFT - 8)}" y="{_n(y + 9)}">layer {layer}</text>'
        yield f'<rect class="layer" x="{_n(start)}" y="{_n(y + 3)}" width="{_n(stop - start)}" height="6"/>'


def _block(frame: _Frame, span: Span, y: float, number: int) -> str:
    x, width = frame.x(span.start_s), (span.stop_s - span.start_s) / frame.length_s * _PLOT
    # A gap between neighbours where there is room for it.
    drawn = max(width - 1.0, min(width, 0.5))
    name = _label(frame, span)
    text = f'<text class="inside" x="{_n(x + 4)}" y="{_n(y + 20)}">{escape(name)}</text>' if name else ""
    shape = f'class="b{number % len(_PALETTE)} l{span.layer % len(_LAYER_DEPTHS)}" x="{_n(x)}" y="{_n(y + 1)}"'
    return (
        f'<g><rect {shape} width="{_n(drawn)}" height="{_n(_LANE_ROW - 4)}"/>{text}'
        f"<title>{escape(_tooltip(span, frame.timeline))}</title></g>"
    )


def _label(frame: _Frame, span: Span) -> str:
    """The text in a block."""
    return label(span.operation, int(((span.stop_s - span.start_s) / frame.length_s * _PLOT - 7) / _CHARACTER))


def _squeezed(lane: str) -> str:
    """A lane's name, compressed horizontally if it would not fit."""
    room = _LEFT - 12
    return "" if len(lane) * _LANE_CHARACTER <= room else f' textLength="{_n(room)}" lengthAdjust="spacingAndGlyphs"'


def _tooltip(span: Span, timeline: Timeline) -> str:
    bound = "" if span.resource is None else f", {span.resource}-bound"
    start, length = span.start_s * 1e6, (span.stop_s - span.start_s) * 1e6
    when = "" if timeline.period_s is None else f", from {start:.1f} us for {length:.1f} us"
    return f"{span.operation}, layer {span.layer}, tokens {span.start_token}:{span.stop_token}{bound}, " + (
        f"R {span.share:.2f}{when}"
    )


def _curve(frame: _Frame, resource: Resource, top: float) -> Iterator[str]:
    """An area of steps: the sum of the shares that run; full height is the whole device."""
    floor, height = top + _CURVE_ROW - 3, _CURVE_ROW - 9
    steps = use_steps(frame.timeline, resource)
    path = f"M{_n(_LEFT)} {_n(floor)}"
    for time_s, level in steps:
        path += f"H{_n(frame.x(time_s))}V{_n(floor - min(level, 1.0) * height)}"
    yield f'<text class="end" x="{_n(_LEFT - 42)}" y="{_n(floor - 6)}">{resource}</text>'
    for part, y in (("100 %", floor - height), ("0", floor)):
        yield f'<text class="end faint scale" x="{_n(_LEFT - 6)}" y="{_n(y + 3)}">{part}</text>'
        yield f'<path class="grid" d="M{_n(_LEFT - 3)} {_n(y)}H{_n(_LEFT + _PLOT)}"/>'
    yield f'<path class="{resource} curve" d="{path}V{_n(floor)}Z"/>'


def _legend(numbers: dict[NanoBatch, int], top: float) -> Iterator[str]:
    """Colour and tokens of each nano-batch."""
    for (start, stop), number in numbers.items():
        row, column = divmod(number, _LEGEND_COLUMNS)
        x, y = _LEFT + column * _PLOT / _LEGEND_COLUMNS, top + row * _LEGEND_ROW
        yield f'<rect class="b{number % len(_PALETTE)} l0" x="{_n(x)}" y="{_n(y)}" width="12" height="12"/>'
        yield f'<text x="{_n(x + 18)}" y="{_n(y + 10)}">tokens {start}:{stop}</text>'


def _keys(frames: Sequence[_Frame]) -> Iterator[str]:
    """Sentences below the picture: abbreviations, the meaning of R, and the scale of the curves."""
    drawn = {_label(frame, span): span.operation for frame in frames for span in frame.timeline.spans}
    short = ", ".join(f"{name} {operation}" for name, operation in abbreviations(drawn).items())
    if short:
        yield short
    if any(span.share for frame in frames for span in frame.timeline.spans):
        yield SHARE_LEGEND
    named = ", ".join(map(str, dict.fromkeys(resource for frame in frames for resource in frame.resources)))
    if named:
        yield f"{named}: {USE_LEGEND}"


def _sentences(keys: Sequence[str], top: float) -> Iterator[str]:
    for row, words in enumerate(keys):
        y = top + row * _LEGEND_ROW + 10
        yield f'<text class="faint" x="{_n(_LEFT)}" y="{_n(y)}">{escape(words)}</text>'


def _legend_height(numbers: dict[NanoBatch, int]) -> float:
    return -(-len(numbers) // _LEGEND_COLUMNS) * _LEGEND_ROW + _GAP


def _n(value: float) -> str:
    """A coordinate rounded to a tenth of a pixel, in its shortest form."""
    return f"{value:.1f}".removesuffix(".0")
