"""Timelines as text for a terminal: a row for each lane and each resource, a column for each interval of time.

A block begins with the letter of its nano-batch, and has its operation's name if there is room. The fill of the rest
shows the layer. `drawing.py` says what is shown; `drawing_svg.py` draws the same as SVG.
"""

from __future__ import annotations

import bisect
import string
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    shares,
    ticks_us,
    unit,
    use_steps,
)
from nanoflow.timeline.timeline import Span, Timeline

_LETTERS = string.ascii_uppercase + string.ascii_lowercase
# Backgrounds of the 256-colour palette close to those of the SVG; black text is readable on all of them.
_BACKGROUNDS = (75, 214, 79, 182, 117, 209, 227, 250)
_LEAST_PLOT = 20
_MARGIN = 2
# Characters of a block before the name: letter and colon.
_BESIDE_NAME = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marks:
    """Characters: fills of the layers, heights of a curve from 0 to 1, and an empty column."""

    fills: str
    levels: str
    empty: str


_UNICODE = _Marks(fills="░▒▓", levels=" ▁▂▃▄▅▆▇█", empty="·")
_ASCII = _Marks(fills="-=#", levels=" .:-=+*#@", empty=".")


def text(
    timelines: Sequence[Timeline],
    *,
    width: int,
    sequential_s: float | None = None,
    colour: bool = False,
    is_ascii: bool = False,
) -> str:
    """Timelines one below the other on the same time scale.

    Args:
        timelines: One, or a predicted and a measured one.
        width: Columns of the terminal.
        sequential_s: Time of a layer's operations one after the other, for comparison; None if unknown.
        colour: Whether nano-batches have background colours (ANSI sequences).
        is_ascii: For terminals that cannot show block characters.

    Returns:
        Lines of at most `width` characters (headlines may be longer).

    Raises:
        ValueError: There is nothing to draw, or the width is too small.
    """
    check(timelines)
    resources = resources_used(timelines)
    names = [lane for timeline in timelines for lane in timeline.lanes] + [str(resource) for resource in resources]
    names += [unit(timeline) for timeline in timelines]
    margin = max(len(name) for name in names) + _MARGIN
    if width - margin < _LEAST_PLOT:
        raise ValueError(f"a width of {width} columns is too small, it takes at least {margin + _LEAST_PLOT}")
    sheet = _Sheet(
        margin=margin,
        columns=width - margin,
        numbers=nano_batches(timelines),
        marks=_ASCII if is_ascii else _UNICODE,
        has_colour=colour,
    )
    lines: list[str] = []
    for timeline in timelines:
        lines += [
            headline(timeline, sequential_s),
            *sheet.picture(timeline, full_s(timeline, timelines), resources),
            "",
        ]
    lines += sheet.legend(timelines)
    lines += sheet.keys(timelines, resources)
    return "\n".join(line.rstrip() for line in lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """Layout of a picture: columns of the plot, the margin before it, and the numbers of nano-batches."""

    margin: int
    columns: int
    numbers: dict[NanoBatch, int]
    marks: _Marks
    has_colour: bool

    def picture(self, timeline: Timeline, length_s: float, resources: Sequence[Resource]) -> Iterator[str]:
        """Lanes, curves and axis."""
        for lane in timeline.lanes:
            yield self._row(lane) + self._lane([span for span in timeline.spans if span.lane == lane], length_s)
        if any(span.resource is not None for span in timeline.spans):
            for resource in resources:
                yield self._row(resource) + self._curve(timeline, resource, length_s)
        yield self._row(unit(timeline)) + self._axis(length_s)

    def legend(self, timelines: Sequence[Timeline]) -> Iterator[str]:
        """Lines that explain letters (nano-batches), fills (layers) and abbreviations."""
        layers = sorted({span.layer for timeline in timelines for span in timeline.spans})
        entries = [
            f"{self._painted(_letter(number), number)} tokens {start}:{stop}"
            for (start, stop), number in self.numbers.items()
        ]
        yield from self._wrapped(entries)
        yield from self._wrapped([f"{self._fill(layer) * 2} layer {layer}" for layer in layers])
        drawn = {name: operation for timeline in timelines for name, operation in self._labels(timeline, timelines)}
        short = [f"{name} {operation}" for name, operation in abbreviations(drawn).items()]
        if short:
            yield from self._wrapped(short)

    def keys(self, timelines: Sequence[Timeline], resources: Sequence[Resource]) -> Iterator[str]:
        """Lines that explain the share of a lane and the scale of the resources' rows."""
        given = shares(timelines)
        if given:
            parts = ", ".join(f"{lane} R {share:.2f}" for lane, share in given.items())
            yield from self._sentence(f"{parts} ({SHARE_LEGEND})")
        if resources:
            names, levels = ", ".join(map(str, resources)), self.marks.levels
            scale = f"{levels[1]} little, {levels[len(levels) // 2]} half, {levels[-1]} all of it"
            yield from self._sentence(f"{names}: {USE_LEGEND}: {scale}")

    def _sentence(self, words: str) -> list[str]:
        return textwrap.wrap(words, self.margin + self.columns)

    def _labels(self, timeline: Timeline, timelines: Sequence[Timeline]) -> Iterator[tuple[str, str]]:
        """The labels of a timeline's blocks, each with its operation."""
        length_s = full_s(timeline, timelines)
        for lane in timeline.lanes:
            owners = self._owners([span for span in timeline.spans if span.lane == lane], length_s)
            for span, width in _runs(owners):
                if span is not None:
                    yield label(span.operation, width - _BESIDE_NAME), span.operation

    def _wrapped(self, entries: Sequence[str]) -> Iterator[str]:
        """Entries in columns of equal width, that of the widest entry without colour sequences."""
        width = max(_visible(entry) for entry in entries) + 3
        per_line = max((self.margin + self.columns) // width, 1)
        for first in range(0, len(entries), per_line):
            yield "".join(entry + " " * (width - _visible(entry)) for entry in entries[first : first + per_line])

    def _row(self, name: str) -> str:
        return name.ljust(self.margin)

    def _lane(self, spans: Sequence[Span], length_s: float) -> str:
        return "".join(self._block(span, width) for span, width in _runs(self._owners(spans, length_s)))

    def _owners(self, spans: Sequence[Span], length_s: float) -> list[Span | None]:
        """The span of each column. A span shorter than a column gets it unless an earlier span has it."""
        owners: list[Span | None] = [None] * self.columns
        for span in spans:
            first, stop = self._column(span.start_s / length_s), self._column(span.stop_s / length_s)
            for column in range(first, max(stop, min(first + 1, self.columns))):
                owners[column] = owners[column] or span
        return owners

    def _column(self, part: float) -> int:
        # The small term keeps rounding errors from moving a time across the edge of a column.
        return int(part * self.columns + 1e-6)

    def _block(self, span: Span | None, width: int) -> str:
        if span is None:
            return self.marks.empty * width
        number = self.numbers[nano_batch(span)]
        name = label(span.operation, width - _BESIDE_NAME)
        shown = _letter(number) + (f":{name}" if name else "")
        return self._painted(shown.ljust(width, self._fill(span.layer)), number)

    def _fill(self, layer: int) -> str:
        return self.marks.fills[layer % len(self.marks.fills)]

    def _painted(self, shown: str, number: int) -> str:
        if not self.has_colour:
            return shown
        return f"\x1b[30;48;5;{_BACKGROUNDS[number % len(_BACKGROUNDS)]}m{shown}\x1b[0m"

    def _curve(self, timeline: Timeline, resource: Resource, length_s: float) -> str:
        """The mean use of the resource in each column; use above zero is never shown as zero."""
        highest = len(self.marks.levels) - 1
        use = _Integral(use_steps(timeline, resource))
        column_s = length_s / self.columns
        means = [(use(column_s * (column + 1)) - use(column_s * column)) / column_s for column in range(self.columns)]
        heights = [min(round(mean * highest), highest) if mean > 0 else 0 for mean in means]
        return "".join(
            self.marks.levels[max(height, 1) if mean > 1e-6 else 0] for mean, height in zip(means, heights, strict=True)
        )

    def _axis(self, length_s: float) -> str:
        """Numbers that start at their column; the last ones are left out if they do not fit."""
        line = ""
        for tick in ticks_us(length_s, max(self.columns // 12, 2)):
            place = round(tick * 1e-6 / length_s * self.columns)
            number = f"{tick:,.10g}"
            if place + len(number) <= self.columns and place >= len(line):
                line = line.ljust(place) + number + " "
        return line


class _Integral:
    """Integral of a step function from 0 to any time."""

    def __init__(self, steps: Sequence[tuple[float, float]]) -> None:
        self._times_s = [time_s for time_s, _ in steps]
        self._levels = [level for _, level in steps]
        self._sums = [0.0]
        for place in range(1, len(steps)):
            elapsed_s = self._times_s[place] - self._times_s[place - 1]
            self._sums.append(self._sums[-1] + elapsed_s * self._levels[place - 1])

    def __call__(self, time_s: float) -> float:
        place = bisect.bisect_right(self._times_s, time_s) - 1
        return self._sums[place] + (time_s - self._times_s[place]) * self._levels[place]


def _runs(owners: Sequence[Span | None]) -> Iterator[tuple[Span | None, int]]:
    """Runs of columns with the same span (or None), and the length of each."""
    first = 0
    for column in range(1, len(owners) + 1):
        if column == len(owners) or owners[column] is not owners[first]:
            yield owners[first], column - first
            first = column


def _letter(number: int) -> str:
    return _LETTERS[number % len(_LETTERS)]


def _visible(entry: str) -> int:
    """Number of characters without colour sequences, which end with an m."""
    return len("".join(part.partition("m")[2] if place else part for place, part in enumerate(entry.split("\x1b["))))
