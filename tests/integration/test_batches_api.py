"""/v1/files and /v1/batches through the official client: one answer a line, across restarts, cancels and keys."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest

from nanoflow.batch_files.answers import Answers
from nanoflow.server.batch_store import Batch, BatchStore
from nanoflow.server.gate import Gate, restarting
from tests.batches import CHAT, completion, ended, read, server
from tests.fake_async_engine import FakeAsyncEngine


async def _upload(client: openai.AsyncOpenAI, lines: list[bytes]) -> Any:
    return await client.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")


async def _upload_without_a_length(client: openai.AsyncOpenAI, num_bytes: int) -> httpx.Response:
    """A body whose length the server learns as it comes."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(num_bytes // 1000):
            yield b"a" * 1000
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer: httpx.Response = await client._client.post("http://localhost/v1/files", content=pieces(), headers=headers)
    return answer


def test_a_batch_from_the_upload_to_its_files(tmp_path: Path) -> None:
    async def go() -> None:
        async with server(FakeAsyncEngine(), tmp_path) as client_of:
            client = client_of("none")
            lines = [completion("a"), completion("b", max_tokens=-1), b"nonsense", completion("d", url=CHAT)]
            file = await _upload(client, lines)
            assert (file.filename, file.purpose, file.bytes) == ("in.jsonl", "batch", len(b"\n".join(lines)))
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/completions",
                completion_window="24h",
                metadata={"who": "me"},
            )
            assert batch.status == "validating" and batch.metadata == {"who": "me"}
            batch = await ended(client, batch.id)
            assert batch.status == "completed" and batch.in_progress_at and batch.completed_at
            assert batch.request_counts.model_dump() == {"total": 4, "completed": 1, "failed": 3}
            (good,) = read((await client.files.content(batch.output_file_id)).content)
            bad = read((await client.files.content(batch.error_file_id)).content)
            assert good["custom_id"] == "a" and good["response"]["body"]["choices"][0]["text"] == "th"
            found = {(each["custom_id"], each["response"]["status_code"]) for each in bad}
            assert found == {("b", 400), (None, 400), ("d", 400)}
            assert [each.id for each in (await client.batches.list()).data] == [batch.id]
            assert {each.purpose for each in (await client.files.list()).data} == {"batch", "batch_output"}
            assert [each.id for each in (await client.files.list(purpose="batch")).data] == [file.id]
            (tmp_path / "files" / file.id).unlink()
            with pytest.raises(openai.NotFoundError, match="is gone"):
                await client.files.content(file.id)
            assert (await client.files.delete(file.id)).deleted
            with pytest.raises(openai.NotFoundError, match="there is no file"):
                await client.files.retrieve(file.id)

    asyncio.run(go())


def test_a_batch_goes_on_after_the_server_and_answers_each_line_once(tmp_path: Path) -> None:
    lines = [completion(str(number)) for number in range(40)]

    async def go() -> None:
        async with server(FakeAsyncEngine(step_s=0.03), tmp_path) as client_of:
            client = client_of("none")
            file = await _upload(client, lines)
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            work = BatchStore(tmp_path).work_of(batch.id)
            while not work.exists() or len(read(work)) < 5:
                await asyncio.sleep(0.01)
            with pytest.raises(openai.ConflictError, match="has not ended"):
                await client.files.delete(file.id)
        before = len(read(work))
        assert before < 40
        engine = FakeAsyncEngine()
        async with server(engine, tmp_path) as client_of:
            batch = await ended(client_of("none"), batch.id)
            assert batch.request_counts.completed == 40 and batch.error_file_id is None
            answers = read((await client_of("none").files.content(batch.output_file_id)).content)
        assert Counter(answer["custom_id"] for answer in answers) == Counter(map(str, range(40)))
        assert len(engine.seen_params) <= 40 - before and not list((tmp_path / "work").iterdir())

    asyncio.run(go())


def test_a_batch_waits_while_the_engine_is_started_again(tmp_path: Path) -> None:
    async def go() -> None:
        engine, gate = FakeAsyncEngine(step_s=0.02), Gate()
        async with server(engine, tmp_path, gate=gate) as client_of:
            client = client_of("none")
            file = await _upload(client, [completion(str(number)) for number in range(20)])
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            work = BatchStore(tmp_path).work_of(batch.id)
            while not work.exists() or not read(work):
                await asyncio.sleep(0.01)
            gate.close(restarting(1.0))
            while engine.num_running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # answers of requests that had just ended are written
            num_asked = len(engine.seen_params)
            await asyncio.sleep(0.3)
            assert len(engine.seen_params) == num_asked < 20
            assert (await client.batches.retrieve(batch.id)).status == "in_progress"
            gate.open()
            batch = await ended(client, batch.id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 20)

    asyncio.run(go())


def test_a_cancelled_batch_has_its_answers_so_far(tmp_path: Path) -> None:
    async def go() -> None:
        engine = FakeAsyncEngine(step_s=0.02)
        async with server(engine, tmp_path) as client_of:
            client = client_of("none")
            file = await _upload(client, [completion(str(number), max_tokens=5) for number in range(50)])
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            work = BatchStore(tmp_path).work_of(batch.id)
            while not work.exists() or not read(work):
                await asyncio.sleep(0.01)
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
            batch = await ended(client, batch.id)
            assert batch.status == "cancelled" and batch.cancelled_at
            answers = read((await client.files.content(batch.output_file_id)).content)
            assert 0 < len(answers) == batch.request_counts.completed < 50
            assert engine.num_running == 0

    asyncio.run(go())


def test_requests_of_batches_get_what_others_leave_unless_they_say_otherwise(tmp_path: Path) -> None:
    engine = FakeAsyncEngine()

    async def go() -> None:
        async with server(engine, tmp_path) as client_of:
            client = client_of("none")
            file = await _upload(client, [completion("a"), completion("b", priority=3), completion("c", priority=None)])
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            assert (await ended(client, batch.id)).request_counts.completed == 3
            assert Counter(map(str, engine.seen_priorities)) == {"batch": 2, "3": 1}

    asyncio.run(go())


def test_nobody_sees_the_files_of_another_key(tmp_path: Path) -> None:
    async def go() -> None:
        async with server(FakeAsyncEngine(), tmp_path, keys=("mine", "yours")) as client_of:
            mine, yours = client_of("mine"), client_of("yours")
            file = await _upload(mine, [completion("a")])
            batch = await mine.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            batch = await ended(mine, batch.id)
            assert batch.status == "completed"
            assert not (await yours.files.list()).data and not (await yours.batches.list()).data
            for call in (
                yours.files.retrieve(file.id),
                yours.files.content(batch.output_file_id),
                yours.files.delete(file.id),
                yours.batches.retrieve(batch.id),
                yours.batches.cancel(batch.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call
            with pytest.raises(openai.BadRequestError, match="there is no such file"):
                await yours.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            with pytest.raises(openai.AuthenticationError):
                await client_of("else").files.list()

    asyncio.run(go())


def test_what_is_refused(tmp_path: Path) -> None:
    async def go() -> None:
        options: dict[str, Any] = {"max_file_bytes": 20_000, "max_open_batches": 1, "batch_dir_gib": 2e-5}
        async with server(FakeAsyncEngine(step_s=0.05), tmp_path, **options) as client_of:
            client = client_of("none")
            with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
                await client.files.create(file=("a", b"a"), purpose="vision")
            with pytest.raises(openai.BadRequestError, match="it is empty"):
                await client.files.create(file=("a", b""), purpose="batch")
            with pytest.raises(openai.APIStatusError, match="at most 20000 bytes"):
                await client.files.create(file=("a", b"a" * 20_001), purpose="batch")
            with pytest.raises(openai.APIStatusError, match="at most 85536 bytes"):
                await client.files.create(file=("a", b"a" * 90_000), purpose="batch")
            answer = await _upload_without_a_length(client, 90_000)
            assert answer.status_code == 413 and "at most 85536 bytes" in answer.text
            answer = await _upload_without_a_length(client, 1000)
            assert answer.status_code == 200 and answer.json()["bytes"] == 1000
            await client.files.delete(answer.json()["id"])
            assert not list((tmp_path / "files").iterdir())
            many = await _upload(client, [completion(str(number)) for number in range(51)])
            with pytest.raises(openai.BadRequestError, match="endpoint must be"):
                await client.batches.create(input_file_id=many.id, endpoint="/v1/models", completion_window="24h")
            failed = await client.batches.create(
                input_file_id=many.id, endpoint="/v1/completions", completion_window="24h"
            )
            failed = await ended(client, failed.id)
            assert (
                failed.status == "failed"
                and "1 to 50 requests, and this file has more" in failed.errors.data[0].message
            )
            few = await _upload(client, [completion(str(number), max_tokens=40) for number in range(8)])
            await client.batches.create(input_file_id=few.id, endpoint="/v1/completions", completion_window="24h")
            with pytest.raises(openai.RateLimitError, match="not ended"):
                await client.batches.create(input_file_id=few.id, endpoint="/v1/completions", completion_window="24h")
            await _upload(client, [b"a" * 19_000])
            with pytest.raises(openai.APIStatusError, match="delete some"):
                await _upload(client, [b"b"])

    asyncio.run(go())


def test_without_a_folder_the_way_to_turn_them_on_is_said() -> None:
    async def go() -> None:
        async with server(FakeAsyncEngine(), None) as client_of:
            client = client_of("none")
            for call in (client.batches.list(), client.files.content("x"), _upload(client, [b"a"])):
                with pytest.raises(openai.NotFoundError, match="--batch-dir FOLDER"):
                    await call

    asyncio.run(go())


def test_one_process_runs_the_batches_of_a_folder(tmp_path: Path) -> None:
    one, other = BatchStore.open(str(tmp_path)), BatchStore.open(str(tmp_path))
    assert one.claim() and one.claim() and not other.claim()
    one.release()
    assert other.claim()
    other.release()


@pytest.mark.parametrize(("before", "after"), [("validating", "cancelled"), ("in_progress", "cancelling")])
def test_a_wish_to_cancel_outlives_what_the_worker_saves(tmp_path: Path, before: str, after: str) -> None:
    store = BatchStore.open(str(tmp_path))
    batch = Batch(
        id="batch_1", owner="", endpoint="e", input_file_id="f", completion_window="24h", created_at=1, total=3
    )
    batch.enter(before)
    store.save(batch)
    assert store.cancel("batch_1", "another") is None
    cancelled = store.cancel("batch_1", "")
    assert cancelled is not None and cancelled.status == after
    batch.enter("in_progress")
    store.save(batch)
    assert batch.status == after and "cancelling_at" in json.dumps(batch.times)
    assert (found := store.batch("batch_1")) is not None and found.status == after


def test_batches_of_one_second_keep_their_order_while_they_run(tmp_path: Path) -> None:
    store = BatchStore.open(str(tmp_path))
    batches = [
        Batch(id=name, owner="", endpoint="e", input_file_id="f", completion_window="24h", created_at=1)
        for name in "abc"
    ]
    for batch in (*batches, batches[0]):
        store.save(batch)
    assert [batch.id for batch in store.batches("", None, 9)] == ["c", "b", "a"]
    assert (first := store.next_open()) is not None and first.id == "a"


def test_a_batch_that_waits_behind_another_is_cancelled_at_once(tmp_path: Path) -> None:
    async def go() -> None:
        engine = FakeAsyncEngine(step_s=0.05)
        async with server(engine, tmp_path) as client_of:
            client = client_of("none")
            files = [await _upload(client, [completion(name, max_tokens=4)] * 20) for name in "ab"]
            first, second = [
                await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
                for file in files
            ]
            assert (await client.batches.cancel(second.id)).status == "cancelled"
            assert (await client.files.delete(files[1].id)).deleted
            assert (await client.batches.cancel(first.id)).status in ("cancelling", "cancelled")
            assert (await ended(client, first.id)).status == "cancelled"
            assert (await client.batches.retrieve(second.id)).status == "cancelled"

    asyncio.run(go())


def test_a_full_disk_stops_batches_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an answer nor the state of a batch can be written for a while; no batch fails, and the worker lives."""
    num_left = {"append": 3, "save": 3}

    def full(name: str, real: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            is_full = num_left[name] > 0 and (name == "append" or args[1].status == "in_progress")
            if is_full:
                num_left[name] -= 1
                raise error
            return real(*args)

        return call

    no_room = sqlite3.OperationalError("database or disk is full")
    no_room.sqlite_errorcode = sqlite3.SQLITE_FULL
    monkeypatch.setattr(Answers, "append", full("append", Answers.append, OSError(errno.ENOSPC, "no space")))
    monkeypatch.setattr(BatchStore, "save", full("save", BatchStore.save, no_room))
    monkeypatch.setattr("nanoflow.server.batch_worker._DISK_S", 0.01)

    async def go() -> None:
        async with server(FakeAsyncEngine(), tmp_path) as client_of:
            client = client_of("none")
            file = await _upload(client, [completion(str(number)) for number in range(5)])
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            batch = await ended(client, batch.id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 5)
            assert num_left == {"append": 0, "save": 0}
            for wrong in (OSError(errno.ENOSPC, "no space"), no_room):
                monkeypatch.setattr(BatchStore, "add_file", Mock(side_effect=wrong))
                with pytest.raises(openai.InternalServerError, match="disk is full") as caught:
                    await _upload(client, [b"a"])
                assert caught.value.status_code == 507

    asyncio.run(go())
