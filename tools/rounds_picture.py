"""Draw conversations of several rounds: time to the first token and prompt tokens computed, by round, as SVG.

    python tools/rounds_picture.py benchmarks/results/rounds_llama-3-8b.json -o docs/pictures/rounds_llama-3-8b.svg
    python tools/rounds_picture.py device=device.json host=host.json -o rounds.svg

A record of `benchmarks.engine.rounds` has a series for each variant. One of `nanoflow bench rounds` is one series,
named before the equals sign or by its file. All must be of the same conversations. Values are medians of the repeats.
The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

Document = dict[str, Any]

# The palette of Okabe and Ito, which colour-blind people can read.
_PALETTE = ("#808080", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")

# Lengths are in pixels at the picture's own width.
_WIDTH, _HEIGHT = 1200.0, 360.0
_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 70.0, 64.0, 510.0, 230.0
_SECOND = 610.0
_LEGEND_WIDTH = 170.0
_MOST_DECADES_IN_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One round of a series: prompt tokens, and seconds to the first token; None where unknown."""

    round: int
    num_asked: float
    num_computed: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One engine under the name that the picture has."""

    name: str
    points: tuple[Point, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the records and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="[NAME=]RECORD.json", help="records to compare")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg", help="file to write")
    args = parser.parse_args(argv)
    try:
        picture = svg([series for text in args.records for series in read_series(text)])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.output.write_text(picture, encoding="utf-8")


def read_series(text: str) -> list[Series]:
    """The series of a record, given as its path or as NAME=PATH.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no record of rounds.
    """
    name, separator, path = text.rpartition("=")
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    if document.get("benchmark") == "rounds":
        return [_series(name or Path(path).stem, document["repeats"])]
    if document.get("benchmark") == "rounds_in_turn" and not separator:
        return in_turn(document)
    if document.get("benchmark") == "rounds_in_turn":
        raise ValueError(f"{path} names its variants itself: leave {name}= out")
    raise ValueError(f"{path} is no record of nanoflow bench rounds or benchmarks.engine.rounds")


def in_turn(document: Document) -> list[Series]:
    """One series for each variant that ran."""
    runs: dict[str, list[Document]] = {}
    for variant in document["variants"]:
        own = [run["metrics"] for run in document["runs"] if run["variant"] == variant["name"]]
        runs |= {variant["name"]: own} if own else {}
    return [_series(name, own) for name, own in runs.items()]


def _series(name: str, repeats: Sequence[Document]) -> Series:
    rounds = [[run["by_round"][place] for run in repeats] for place in range(min(len(r["by_round"]) for r in repeats))]
    return Series(name=name, points=tuple(map(_point, rounds)))


def _point(same: Sequence[Document]) -> Point:
    """The median of one round over the repeats."""
    ttfts = [each["ttft_s"] or {} for each in same]
    return Point(
        round=same[0]["round"],
        num_asked=median(each["prompt"]["num_asked"] for each in same),
        num_computed=_median([each["prompt"]["num_computed"] for each in same]),
        ttft_p50_s=_median([each.get("p50") for each in ttfts]),
        ttft_p99_s=_median([each.get("p99") for each in ttfts]),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def svg(series: Sequence[Series]) -> str:
    """The picture of some series.

    Raises:
        ValueError: They are of different conversations, or nothing is known of the first tokens.
    """
    asked = [(point.round, point.num_asked) for point in series[0].points]
    for each in series[1:]:
        if [(point.round, point.num_asked) for point in each.points] != asked:
            raise ValueError(f"{each.name} asked other prompts than {series[0].name}: compare the same conversations")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(_WIDTH)} {_n(_HEIGHT)}" role="img">',
        f"<title>{escape('Conversations of several rounds: ' + ', '.join(each.name for each in series))}</title>",
        _style(),
        f'<rect class="paper" width="{_n(_WIDTH)}" height="{_n(_HEIGHT)}"/>',
        *_legend(series),
        *_first_tokens(series),
        *_prompts(series),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _style() -> str:
    colours = "".join(f".s{place}{{stroke:{each};fill:{each}}}" for place, each in enumerate(_PALETTE))
    return (
        "<style>text{font:11px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328;stroke:none}"
        ".paper{fill:#fff}.head{font-size:14px;font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}"
        ".faint{fill:#656d76}.grid{stroke:#8c959f;stroke-width:.5;opacity:.5}"
        ".asked{fill:#8c959f;opacity:.25}.line{fill:none;stroke-width:2}.rare{stroke-dasharray:5 4}"
        f"{colours}.line{{fill:none}}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.paper{fill:#0d1117}.faint{fill:#8d96a0}}</style>"
    )


def _legend(series: Sequence[Series]) -> Iterator[str]:
    for place, each in enumerate(series):
        x = _LEFT + place * _LEGEND_WIDTH
        yield f'<rect class="s{place % len(_PALETTE)}" x="{_n(x)}" y="10" width="12" height="12"/>'
        yield f'<text x="{_n(x + 18)}" y="20">{escape(each.name)}</text>'


def _first_tokens(series: Sequence[Series]) -> Iterator[str]:
    """Lines over rounds, on a logarithmic scale: the median and, dashed, the 99th percentile."""
    yield _head(_LEFT, "Time to the first token (ms): median, and 99th percentile dashed")
    known = [
        time_s * 1e3
        for each in series
        for point in each.points
        for time_s in (point.ttft_p50_s, point.ttft_p99_s)
        if time_s
    ]
    if not known:
        raise ValueError("no first token was timed")
    ticks = _ticks(min(known), max(known))
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def y(value_ms: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - (math.log(value_ms) - low) / (high - low))

    for tick in ticks:
        yield _grid(_LEFT, y(tick), f"{tick:,.10g}")
    rounds = [point.round for point in series[0].points]
    yield from _numbers(_LEFT, rounds)
    for place, each in enumerate(series):
        for style, times_s in (
            ("", [point.ttft_p50_s for point in each.points]),
            (" rare", [point.ttft_p99_s for point in each.points]),
        ):
            there = [(_x(_LEFT, spot, len(rounds)), y(time_s * 1e3)) for spot, time_s in enumerate(times_s) if time_s]
            path = "L".join(f"{_n(x)} {_n(top)}" for x, top in there)
            yield f'<path class="s{place % len(_PALETTE)} line{style}" d="M{path}"/>'
            yield from (
                f'<circle class="s{place % len(_PALETTE)}" cx="{_n(x)}" cy="{_n(t)}" r="2.5"/>' for x, t in there
            )


def _prompts(series: Sequence[Series]) -> Iterator[str]:
    """Bars of computed tokens in front of a wide bar of those asked."""
    yield _head(_SECOND + _LEFT, "Prompt tokens computed, in front of those asked (light grey)")
    points = series[0].points
    most = max(point.num_asked for point in points) or 1.0
    for part in range(5):
        value = most * part / 4
        yield _grid(_SECOND + _LEFT, _TOP + _PLOT_HEIGHT * (1 - part / 4), f"{value:,.0f}")
    yield from _numbers(_SECOND + _LEFT, [point.round for point in points])
    slot = _PLOT_WIDTH / len(points)
    bar = slot * 0.8 / len(series)
    for spot, point in enumerate(points):
        start = _SECOND + _LEFT + slot * (spot + 0.1)
        yield _bar("asked", start, slot * 0.8, point.num_asked / most, f"{point.num_asked:,.0f} asked")
        for place, each in enumerate(series):
            computed = each.points[spot].num_computed
            if computed is not None:
                words = f"{each.name}, round {point.round}: {computed:,.0f} of {point.num_asked:,.0f} computed"
                yield _bar(f"s{place % len(_PALETTE)}", start + place * bar + 1, bar - 2, computed / most, words)


def _bar(kind: str, x: float, width: float, part: float, words: str) -> str:
    height = _PLOT_HEIGHT * part
    return (
        f'<rect class="{kind}" x="{_n(x)}" y="{_n(_TOP + _PLOT_HEIGHT - height)}" width="{_n(max(width, 0.5))}" '
        f'height="{_n(height)}" stroke="none"><title>{escape(words)}</title></rect>'
    )


def _head(left: float, words: str) -> str:
    return f'<text class="head" x="{_n(left)}" y="{_n(_TOP - 18)}">{escape(words)}</text>'


def _grid(left: float, y: float, words: str) -> str:
    return (
        f'<path class="grid" d="M{_n(left)} {_n(y)}h{_n(_PLOT_WIDTH)}"/>'
        f'<text class="end faint" x="{_n(left - 8)}" y="{_n(y + 4)}">{words}</text>'
    )


def _numbers(left: float, rounds: Sequence[int]) -> Iterator[str]:
    """The numbers of the rounds below a plot."""
    y = _TOP + _PLOT_HEIGHT + 18
    for spot, number in enumerate(rounds):
        yield f'<text class="mid faint" x="{_n(_x(left, spot, len(rounds)))}" y="{_n(y)}">{number}</text>'
    yield f'<text class="mid faint" x="{_n(left + _PLOT_WIDTH / 2)}" y="{_n(y + 20)}">round</text>'


def _x(left: float, spot: int, count: int) -> float:
    return left + _PLOT_WIDTH * (spot + 0.5) / count


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below the lowest value to above the highest, a few of each decade."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= _MOST_DECADES_IN_STEPS else (1,)
    steps = [digit * 10.0**power for power in range(first, last + 2) for digit in digits]
    start = max(place for place, step in enumerate(steps) if step <= low)
    stop = min(place for place, step in enumerate(steps) if step >= high and place > start)
    return steps[start : stop + 1]


def _n(value: float) -> str:
    """A number of pixels, as short as its tenth allows."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
