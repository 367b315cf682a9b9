"""Files of batches: lines, the input, the output that goes on after anything, and the answers of a run."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from benchmarks.robustness import batch_kills

from nanoflow.batch_files import look_ahead
from nanoflow.batch_files.answers import Answers, Identity, beside_of
from nanoflow.batch_files.lines import Answer, AnswerLine, LineError, answer_line, answered, custom_id_of, read_request
from nanoflow.batch_files.order import RequestCost
from nanoflow.batch_files.requests import Counts, Requests, UnavailableError
from nanoflow.batch_files.source import Line, Places, read_lines, scan
from nanoflow.option import ConfigError
from tests.batches import completion, read, write

OK = Answer(status_code=200, request_id="r", body=msgspec.Raw(b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}'))


def answer_of(status: int, code: str | None = None) -> Answer:
    body = msgspec.json.encode({"error": {"message": "why", "code": code}})
    return Answer(status_code=status, request_id="r", body=msgspec.Raw(body))


@pytest.mark.parametrize(
    ("text", "says", "custom_id"),
    [
        (b"nonsense", "not valid JSON", None),
        (b'{"custom_id":"a","url":"/v1/completions","body":{}', "not valid JSON", None),
        (b"\xff\xfe", "not valid JSON", None),
        (b'{"custom_id":"\xff","url":"/v1/completions","body":{}}', "not valid JSON", None),
        (b"[1]", "is no request", None),
        (b'{"custom_id":5,"url":"/v1/completions","body":{}}', "is no request", None),
        (b'{"custom_id":"a","body":{}}', "`url`", "a"),
        (b'{"custom_id":"a","url":"/v1/completions"}', "`body`", "a"),
        (b'{"custom_id":"","url":"/v1/completions","body":{}}', "1 to 512 characters", None),
        (completion("x" * 513), "1 to 512 characters", None),
        (
            completion("a", url="/v1/models"),
            "url must be /v1/chat/completions or /v1/completions or /v1/embeddings",
            "a",
        ),
        (completion("a").replace(b"POST", b"GET"), "method must be POST", "a"),
        (b'{"custom_id":"a","url":"/v1/completions","body":[1]}', "body must be a JSON object", "a"),
        (b'{"custom_id":"a","body":' + b"[" * 100_000, "not valid JSON", None),
    ],
)
def test_a_line_that_is_no_request_says_why(text: bytes, says: str, custom_id: str | None) -> None:
    with pytest.raises(LineError) as error:
        read_request(text)
    assert says in str(error.value)
    assert (error.value.custom_id or custom_id_of(text)) == custom_id


def test_a_request_keeps_its_body_as_it_was_written() -> None:
    request = read_request(b'{"body": {"prompt" : "\\u00e9", "n": 1.0}, "url":"/v1/completions","custom_id":"a"}')
    assert bytes(request.body) == b'{"prompt" : "\\u00e9", "n": 1.0}' and request.custom_id == "a"


def test_the_input_is_counted_and_repeated_ids_are_found(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + completion("a"), b"", completion("b"), b"nonsense", completion("a"), completion("a")]
    path = write(tmp_path / "in", lines)
    path.write_bytes(path.read_bytes() + b"x" * 2000 + b"\r\n" + completion("c", prompt="y" * 500))  # no end of line
    found = scan(path, 1000)
    assert (found.num_lines, found.num_numbers, found.num_bytes) == (7, 8, path.stat().st_size)
    assert [number for number in range(1, 9) if number in found.repeated] == [5, 6]
    assert scan(path, 1000, max_lines=3).num_lines == 4 and scan(path, 1000, max_lines=7).sha256 == found.sha256
    read_again = list(read_lines(path, found, 1000))
    assert [line.number for line in read_again] == [1, 3, 4, 5, 6, 7, 8]
    assert [line.text is None for line in read_again] == [False] * 5 + [True, False]
    assert read_request(read_again[0].text or b"").custom_id == "a"


def test_a_long_line_without_an_end_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(completion("a") + b"\n" + b"x" * 5000)
    known = scan(path, 1000)
    assert known.num_lines == 2 and [line.text is None for line in read_lines(path, known, 1000)] == [False, True]


@pytest.mark.parametrize("size", [0, 50, 5000])
def test_an_input_that_changes_while_it_is_answered_ends_the_run(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "in", [completion("a" * 400, prompt="b" * 10_000)] * 2)
    known = scan(path)
    lines = read_lines(path, known)
    assert next(lines).number == 1
    os.truncate(path, size)
    sink = Sink()

    async def call(_: str, __: bytes) -> Answer:
        return OK

    with pytest.raises(ConfigError, match="has changed while it was answered"):
        asyncio.run(Requests(call=call, sink=sink, repeated=Places(2), num_at_once=3).run(lines))
    assert not sink.lines


def test_an_input_that_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no file"):
        scan(tmp_path / "pipe")


def opened(folder: Path, *, model: str = "m", text: bytes = b"one\ntwo\nthree\n") -> Answers:
    (folder / "in").write_bytes(text)
    known = scan(folder / "in")
    return Answers.open(folder / "out", Identity.of(known, model), known.num_numbers)


def test_the_output_goes_on_after_a_cut_at_any_byte(tmp_path: Path) -> None:
    with opened(tmp_path) as answers:
        assert answers.append(2, answer_line(2, "b", OK)) and answers.append(1, answer_line(1, "a", answer_of(400)))
        assert not answers.append(2, answer_line(2, "b", OK))
    whole = (tmp_path / "out").read_bytes()
    first = whole.index(b"\n") + 1
    for size in sorted({*range(0, len(whole), 17), first - 1, first, first + 1, len(whole) - 1, len(whole)}):
        (tmp_path / "out").write_bytes(whole[:size])
        with opened(tmp_path) as answers:
            expected = (size >= first) + (size == len(whole))
            assert (len(answers.done), answers.num_failed) == (expected, int(size == len(whole)))
            assert (2 in answers.done) == (size >= first)
            answers.append(3, answer_line(3, None, OK))
        assert len(read(tmp_path / "out")) == expected + 1


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "in").write_bytes(b"other\n"), "answers to another input"),
        (lambda folder: beside_of(folder / "out").unlink(), "not from a batch"),
        (lambda folder: beside_of(folder / "out").write_bytes(b"{"), "cannot be read"),
        (lambda folder: beside_of(folder / "out").write_bytes(b"mine"), "has something else"),
        (lambda folder: (folder / "out").open("ab").write(b"hello\n"), "line 2 of .*no answer"),
        (lambda folder: (folder / "out").open("ab").write(b'{"id":"batch_req_9"}\n'), "it answers line 9"),
        (lambda folder: (folder / "out").open("ab").write(b'{"id":"batch_req_0"}\n'), "it answers line 0"),
        (lambda folder: (folder / "out").open("ab").write(b'{"id":"batch_req_1"}\n'), "answered twice"),
        (lambda folder: (folder / "out").open("ab").write(b'{"id":"chatcmpl-1"}\n'), "its id is"),
    ],
)
def test_an_output_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, harm: Callable[[Path], Any], says: str
) -> None:
    with opened(tmp_path) as answers:
        answers.append(1, answer_line(1, "a", OK))
    harm(tmp_path)
    before = (tmp_path / "out").read_bytes()
    text = (tmp_path / "in").read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match=says):
            opened(tmp_path, text=text)
    assert (tmp_path / "out").read_bytes() == before


def test_a_file_that_is_not_from_a_batch_is_never_written_over(tmp_path: Path) -> None:
    """Where the output is, or the file beside it; the input itself may be there."""
    path = write(tmp_path / "jobs.batch", [completion("a")])
    before, known = path.read_bytes(), scan(path)
    with pytest.raises(ConfigError, match="and has something else"):
        Answers.open(tmp_path / "jobs", Identity.of(known, "m"), known.num_numbers)
    assert path.read_bytes() == before
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is no file"):
        Answers.open(tmp_path / "pipe", Identity.of(known, "m"), known.num_numbers)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["jobs.batch", "pipe"]
    beside_of(tmp_path / "out").write_bytes(b'{"sha256":"46')  # cut off by a kill
    Answers.open(tmp_path / "out", Identity.of(known, "m"), known.num_numbers).close()


def test_another_model_and_another_process_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as answers:
        answers.append(1, answer_line(1, "a", OK))
        with pytest.raises(ConfigError, match="another process"):
            opened(tmp_path)
    with pytest.raises(ConfigError, match="of another model, 'm'"):
        opened(tmp_path, model="other")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as answers:
        answers.append(1, answer_line(1, "a", OK))
        real = os.write

        def full(file: int, data: Any) -> int:
            if len(data) < 60:
                raise OSError("No space left on device")
            return real(file, data[:50])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            answers.append(2, answer_line(2, "b", OK))
        assert 2 not in answers.done
        monkeypatch.undo()
    assert [answered(line) for line in (tmp_path / "out").read_bytes().splitlines()] == [(1, True)]


class Sink:
    def __init__(self) -> None:
        self.lines: dict[int, Any] = {}

    def append(self, number: int, line: AnswerLine) -> bool:
        assert number not in self.lines
        self.lines[number] = json.loads(line.encode())
        return True


def lines_of(count: int) -> list[Line]:
    return [Line(number, completion(str(number))) for number in range(1, count + 1)]


def test_no_more_requests_are_under_way_than_allowed_and_each_is_answered() -> None:
    running, most, seen = 0, 0, list[str]()

    async def call(url: str, body: bytes) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        seen.append(url)
        await asyncio.sleep(0)
        running -= 1
        return OK

    sink, told = Sink(), list[int]()
    requests = Requests(
        call=call,
        sink=sink,
        repeated=Places(100),
        num_at_once=7,
        on_answer=lambda counts: told.append(counts.num_answered),
    )
    asyncio.run(requests.run(iter(lines_of(100))))
    assert most == 7 and sorted(sink.lines) == list(range(1, 101)) and told == list(range(1, 101))
    assert requests.counts == Counts(num_completed=100, num_prompt_tokens=300, num_completion_tokens=200)


def test_bad_lines_are_answered_and_stop_nothing() -> None:
    calls = list[bytes]()

    async def call(_: str, body: bytes) -> Answer:
        calls.append(body)
        return OK if b"good" in body else answer_of(404)

    lines = [
        Line(1, completion("a", "good")),
        Line(2, b"nonsense"),
        Line(3, completion("a")),
        Line(4, None),
        Line(5, completion("s", stream=True)),
        Line(6, completion("b", "bad")),
    ]
    sink, repeated = Sink(), Places(6)
    repeated.add(3)
    requests = Requests(call=call, sink=sink, repeated=repeated, num_at_once=2)
    asyncio.run(requests.run(iter(lines)))
    statuses = {number: (line["custom_id"], line["response"]["status_code"]) for number, line in sink.lines.items()}
    assert statuses == {1: ("a", 200), 2: (None, 400), 3: ("a", 400), 4: (None, 413), 5: ("s", 400), 6: ("b", 404)}
    assert all(line["id"] == f"batch_req_{number}" and line["error"] is None for number, line in sink.lines.items())
    assert sink.lines[3]["response"]["body"]["error"]["code"] == "duplicate_custom_id"
    assert len(calls) == 2 and (requests.counts.num_completed, requests.counts.num_failed) == (1, 5)


def test_a_call_without_room_is_made_again_and_a_dead_engine_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [answer_of(429), answer_of(503, "overloaded"), OK, answer_of(503, "engine_dead")]
    monkeypatch.setattr("nanoflow.batch_files.requests._FIRST_WAIT_S", 0.0)

    async def call(_: str, __: bytes) -> Answer:
        return replies.pop(0)

    sink = Sink()
    requests = Requests(call=call, sink=sink, repeated=Places(9), num_at_once=1)
    with pytest.raises(UnavailableError, match="why"):
        asyncio.run(requests.run(iter(lines_of(3))))
    assert sorted(sink.lines) == [1] and not replies


def test_long_lines_are_held_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.batch_files.requests.MAX_HELD_BYTES", 150)
    running, most = 0, 0

    async def call(_: str, __: bytes) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return OK

    lines = [Line(number, completion(str(number), "x" * 100)) for number in range(1, 9)]
    asyncio.run(Requests(call=call, sink=Sink(), repeated=Places(9), num_at_once=8).run(iter(lines)))
    assert most == 1


def test_every_line_of_a_look_ahead_is_sent_once_within_its_bounds() -> None:
    cost = RequestCost(token_s=1e-5, key_s=1e-8)
    lines = [Line(number, completion(str(number), "ab"[number % 2] * 300)) for number in range(1, 21)]
    lines[3] = Line(4, None)
    pulled = list[int]()

    def pull() -> Any:
        for line in lines:
            pulled.append(line.number)
            yield line

    ordered = look_ahead.throughput(cost, 5)(pull())
    first = [next(ordered).number for _ in range(5)]
    assert sorted(first) == [1, 2, 3, 4, 5] and len(pulled) == 5
    assert sorted(line.number for line in ordered) == list(range(6, 21))
    assert [line.number for line in look_ahead.throughput(cost, 5, max_bytes=1)(iter(lines))] == list(range(1, 21))


@pytest.mark.parametrize(
    ("body", "num_prompt", "num_output", "prefix"),
    [
        ({"prompt": "x" * 400, "max_tokens": 7, "n": 3}, 100, 21, b"x" * 400),
        ({"prompt": [1, 2, 3]}, 3, 16, b"1 2 3"),
        ({"prompt": ["ab" * 8, "cd"]}, 4, 16, b"ab" * 8 + b"\ncd"),
        (
            {"messages": [{"role": "user", "content": "hallo" * 8}], "max_completion_tokens": 9},
            11,
            9,
            b"user\n" + b"hallo" * 8,
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, 1, 256, b"user\nhi"),
        ({"prompt": 5, "max_tokens": "x"}, 1, 16, b""),
    ],
)
def test_what_is_known_of_a_request_before_it_runs(
    body: dict[str, Any], num_prompt: int, num_output: int, prefix: bytes
) -> None:
    found = look_ahead.outline(Line(1, json.dumps({"custom_id": "a", "body": body}).encode()))
    assert (found.length.num_prompt_tokens, found.length.num_output_tokens) == (num_prompt, num_output)
    assert found.prefix == prefix


def test_a_process_that_is_killed_answers_every_line_once(tmp_path: Path) -> None:
    found = batch_kills.kill_repeatedly(tmp_path, num_lines=1500, num_kills=12)
    assert (found.num_answers, found.num_missing, found.num_twice, found.num_wrong) == (1500, 0, 0, 0)
    assert found.num_amid >= 1, "no kill came before the last answer"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    found = batch_kills.watch_memory(tmp_path, num_lines=10_000)
    assert found.input_bytes > 2**21 and found.rss_peak_mib - found.rss_before_mib < 16
