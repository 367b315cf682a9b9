"""Stop strings: what is found and shown does not depend on the pieces, and costs no more for long strings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.engine import stop
from nanoflow.engine.stop import StopFilter, StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(text=st.text("abc", max_size=30), stops=STOPS, cuts=st.lists(st.integers(0, 30)), keeps=st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_same_is_found_wherever_the_pieces_end(text: str, stops: list[str], cuts: list[int], keeps: bool) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop_filter, shown = StopFilter(StopStrings(stops), keeps_stop=keeps), ""
    for start, end in itertools.pairwise(borders):
        shown += stop_filter.push(text[start:end])
        assert keeps or not any(stop in shown for stop in stops)
        if stop_filter.found:
            break
    shown += stop_filter.flush()
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        assert (shown, stop_filter.found) == (text, None)
        return
    end, length = min(ends)[0], -min(ends)[1]
    assert stop_filter.found == text[end - length : end]
    assert shown == text[: end if keeps else end - length]


def brute_force(pieces: Iterable[tuple[str, bool]], stops: list[str], keeps: bool) -> Iterator[tuple[str, str | None]]:
    """What each piece shows and which stop string it completes, by looking at everything each time."""
    text, num_shown = "", 0
    for piece, may_stop in pieces:
        before, text = len(text), text + piece
        found = [(i, stop) for i in range(before + 1, len(text) + 1) for stop in stops if text[:i].endswith(stop)]
        if found and may_stop:
            end, length = min((i, -len(stop)) for i, stop in found)
            yield text[num_shown : end if keeps else max(end + length, num_shown)], text[end + length : end]
            return
        beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
        num_held = max(len(beginning) for beginning in beginnings if text.endswith(beginning))
        yield text[num_shown : len(text) - num_held], None
        num_shown = len(text) - num_held


@given(
    pieces=st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=12), stops=STOPS, keeps=st.booleans()
)
@settings(max_examples=600, deadline=None)
def test_each_piece_shows_what_brute_force_shows(pieces: list[tuple[str, bool]], stops: list[str], keeps: bool) -> None:
    """Also where some pieces may not stop, as before `min_tokens`."""
    stop_filter = StopFilter(StopStrings(stops), keeps_stop=keeps)
    for (piece, may_stop), expected in zip(pieces, brute_force(pieces, stops, keeps), strict=False):
        assert (stop_filter.push(piece, may_stop=may_stop), stop_filter.found) == expected


def test_part_of_a_stop_string_is_never_shown() -> None:
    stop_filter = StopFilter(StopStrings(["</end>"]))
    assert [stop_filter.push(char) for char in "a</enx</end>"] == ["a", *[""] * 4, "</enx", *[""] * 6]
    assert stop_filter.found == "</end>"


def test_requests_share_the_tree_but_not_the_place_in_it() -> None:
    stops = StopStrings(["abc"])
    first, second = StopFilter(stops), StopFilter(stops)
    assert (first.push("ab"), second.push("c"), first.push("c")) == ("", "c", "")
    assert (first.found, second.found) == ("abc", None)


def test_a_long_stop_string_costs_as_much_as_is_found_of_it() -> None:
    long = "ab" * 500_000
    stops = StopStrings([long, "b" + long])
    assert _num_nodes(stops) == 3
    stop_filter = StopFilter(stops)
    assert stop_filter.push("abababx") == "abababx"
    assert _num_nodes(stops) < 20


def test_work_is_linear_in_the_text() -> None:
    """Counted in nodes looked at: one and a way back for each character, where a restart would look at 1,000."""
    looked_at = 0

    class Counted(dict[str, stop._Node]):
        def get(self, char: str, default: object = None) -> stop._Node | None:  # type: ignore[override]
            nonlocal looked_at
            looked_at += 1
            return super().get(char)

    stops = StopStrings(["a" * 1000 + "b"])
    StopFilter(stops).push("a" * 1001)
    node = stops.root
    while True:
        node.children = Counted(node.children)
        if not node.children:
            break
        node = next(iter(node.children.values()))
    looked_at = 0
    stop_filter = StopFilter(stops)
    shown = "".join(stop_filter.push("a" * 7) for _ in range(1000))
    assert (len(shown), looked_at) == (6000, 2 * 7000 - 1000)
    shown = "".join(stop_filter.push("aaaaaac") for _ in range(1000))
    assert looked_at < 5 * 14_000 and len(shown) == 8000


def _num_nodes(stops: StopStrings) -> int:
    waiting, number = [stops.root], 0
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        number += 1
    return number
