"""Runs the batches of the server in the background, one after the other, the oldest first.

One process does that, the main front end. The requests of a batch go through the application's own routes
(`inside.py`), a bounded number at a time and with the priority "batch": they get what other calls leave. What was
answered is in the batch's work file at once, so a batch goes on after the server was stopped or killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nanoflow.batch_files.answers import Answers, Identity, beside_of
from nanoflow.batch_files.lines import answered
from nanoflow.batch_files.requests import Counts, Requests, UnavailableError
from nanoflow.batch_files.source import Line, Scan, read_lines, scan
from nanoflow.priorities import BATCH
from nanoflow.server.app import Application
from nanoflow.server.batch_store import Batch, BatchStore, StoredFile, is_disk_full
from nanoflow.server.files import ANSWERS
from nanoflow.server.gate import Gate
from nanoflow.server.inside import InsideCalls

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_SAVE_S = 1.0
_CLAIM_S = 2.0
_DISK_S = 5.0


@dataclass(slots=True, kw_only=True)
class BatchWorker:
    """Runs batches until it is cancelled.

    Attributes:
        app: Answers the requests.
        store: The batches.
        gate: Closed while the engine is started again, and when the server stops.
        num_at_once: Most requests of batches that are under way.
        max_lines: Most requests of a batch.
    """

    app: Application
    store: BatchStore
    gate: Gate
    num_at_once: int
    max_lines: int

    async def run(self) -> None:
        """Run every batch that there is and that comes, once no other server runs those of this folder.

        Where the disk is full or the database cannot be written, all of them wait until it can: no batch fails, and
        no answer is lost.
        """
        try:
            is_claimed = False
            while True:
                try:
                    is_claimed = is_claimed or await self._claimed()
                    if not is_claimed:
                        await asyncio.sleep(_CLAIM_S)
                    elif not await self._run_next():
                        await asyncio.sleep(_POLL_S)
                except (OSError, sqlite3.Error) as error:
                    logger.warning("batches wait, and try again in %d s: %s", _DISK_S, error)
                    await asyncio.sleep(_DISK_S)
        finally:
            self.store.release()

    async def _claimed(self) -> bool:
        """Become the process that runs batches; False if another one is."""
        if not self.store.claim():
            return False
        await asyncio.to_thread(self.store.sweep)
        return True

    async def _run_next(self) -> bool:
        """Run the oldest batch that has not ended; False if there is none that may run now."""
        batch = await asyncio.to_thread(self.store.next_open) if self.gate.closed is None else None
        if batch is None:
            return False
        try:
            await _Running(worker=self, batch=batch).run()
        except UnavailableError as error:
            logger.warning("batch %s waits: %s", batch.id, error)
            await asyncio.sleep(_SAVE_S)
        except Exception as error:
            if is_disk_full(error) or isinstance(error, sqlite3.Error):
                raise
            logger.exception("batch %s has failed", batch.id)
            await self.fail(batch, "internal_error", f"the batch cannot be run: {type(error).__name__}")
        return True

    async def fail(self, batch: Batch, code: str, message: str) -> None:
        """End a batch that cannot be run."""
        batch.errors = [{"code": code, "message": message, "param": None, "line": None}]
        batch.enter("failed")
        await asyncio.to_thread(self.store.save, batch)


@dataclass(slots=True, kw_only=True)
class _Running:
    """One batch while it runs.

    Attributes:
        worker: Who runs it.
        batch: The batch; saved every second.
        counts: Of the answers since the server started.
    """

    worker: BatchWorker
    batch: Batch
    counts: Counts = field(default_factory=Counts)

    async def run(self) -> None:
        """From wherever the batch is to its end."""
        store, batch = self.worker.store, self.batch
        source = store.path_of(batch.input_file_id)
        if not source.exists():
            await self.worker.fail(batch, "file_not_found", "the input file is gone")
            return
        most = self.worker.max_lines
        known = await asyncio.to_thread(scan, source, max_lines=most)
        if not 0 < known.num_lines <= most:
            message = f"a batch has 1 to {most} requests, and this file has {'more' if known.num_lines else 'none'}"
            await self.worker.fail(batch, "invalid_file", message)
            return
        batch.total = known.num_lines
        if batch.status == "validating":
            batch.enter("in_progress")
            await asyncio.to_thread(store.save, batch)
        if batch.status == "cancelled":  # before it began
            return
        if batch.status != "finalizing":
            await self._answer(source, known)
        is_cancelled = batch.status == "cancelling"
        if not is_cancelled:
            batch.enter("finalizing")
            await asyncio.to_thread(store.save, batch)
        await asyncio.to_thread(self._finish)
        batch.enter("cancelled" if is_cancelled else "completed")
        await asyncio.to_thread(store.save, batch)
        work = store.work_of(batch.id)
        for path in (work, beside_of(work)):
            path.unlink(missing_ok=True)
        logger.info("batch %s: %s, %d answered, %d errors", batch.id, batch.status, batch.completed, batch.failed)

    async def _answer(self, source: Path, known: Scan) -> None:
        """Answer the requests that have no answer yet, unless the batch is cancelled."""
        worker, batch = self.worker, self.batch
        owner = {"authorization": f"Batch {batch.owner}"}
        work = worker.store.work_of(batch.id)
        with await asyncio.to_thread(Answers.open, work, Identity.of(known, ""), known.num_numbers) as answers:
            requests = Requests(
                call=InsideCalls(worker.app, owner, priority=BATCH).post,
                sink=answers,
                repeated=known.repeated,
                num_at_once=min(worker.num_at_once, known.num_lines),
                urls=(batch.endpoint,),
                counts=self.counts,
            )
            lines = _unanswered(source, known, answers)
            task = asyncio.create_task(requests.run(lines))
            try:
                while batch.status != "cancelling" and not task.done():
                    await asyncio.wait((task,), timeout=_SAVE_S if answers.done else _POLL_S)
                    if worker.gate.closed is not None and not task.done():
                        raise UnavailableError(worker.gate.closed.message)
                    batch.completed, batch.failed = len(answers.done) - answers.num_failed, answers.num_failed
                    await asyncio.to_thread(worker.store.save, batch)  # learns whether it is to be cancelled
                if task.done():
                    task.result()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            batch.completed, batch.failed = len(answers.done) - answers.num_failed, answers.num_failed

    def _finish(self) -> None:
        """Make files of the answers: those with status 200, and the errors."""
        store, batch = self.worker.store, self.batch
        work = store.work_of(batch.id)
        if not work.exists():
            return
        # The same ids if this is done again after a crash.
        stem = batch.id.removeprefix("batch_")
        ids = {True: f"file-{stem}-output", False: f"file-{stem}-errors"}
        with ExitStack() as stack:
            lines = stack.enter_context(work.open("rb"))
            targets = {
                is_good: stack.enter_context(store.path_of(file_id).open("wb")) for is_good, file_id in ids.items()
            }
            for line in lines:
                targets[answered(line)[1]].write(line)
            for target in targets.values():
                _write_out(target)
        batch.output_file_id = self._kept(ids[True], "output")
        batch.error_file_id = self._kept(ids[False], "errors")

    def _kept(self, file_id: str, what: str) -> str | None:
        """The id of a file with answers; None if there are none."""
        store, batch = self.worker.store, self.batch
        path = store.path_of(file_id)
        size = path.stat().st_size
        if not size:
            path.unlink()
            return None
        file = StoredFile(
            id=file_id,
            bytes=size,
            created_at=int(time.time()),
            filename=f"{batch.id}_{what}.jsonl",
            purpose=ANSWERS,
        )
        store.add_file(file, batch.owner)
        return file_id


def _unanswered(source: Path, known: Scan, answers: Answers) -> Iterator[Line]:
    return (line for line in read_lines(source, known) if line.number not in answers.done)


def _write_out(target: BinaryIO) -> None:
    target.flush()
    os.fsync(target.fileno())
