"""Files and batches of the server, in a folder that outlives it: SQLite for what they are, a file for what they have.

    batches.db         one row a file, one row a batch
    files/ID           the content of a file: uploaded, or the answers of a batch
    worker.lock        held by the process that runs batches
    work/ID.jsonl      the answers so far of a batch that runs (`batch_files/answers.py`)

All front ends use it at once. Every function is short and blocks; callers run them beside the event loop. A file has
its row only once it is whole on the disk. What a crash leaves without a row is removed when the folder is opened.
"""

from __future__ import annotations

import errno
import fcntl
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from nanoflow.config import ConfigError

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
# Rows that there may be of each table.
MAX_ROWS = 100_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT, created_at INTEGER, bytes INTEGER, filename TEXT, purpose TEXT);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT, created_at INTEGER, status TEXT, input_file_id TEXT, record TEXT);
CREATE INDEX IF NOT EXISTS open_batches ON batches (status, created_at);
"""
_BUSY_TIMEOUT_S = 10.0
# Longest time that an upload may take.
_UPLOAD_S = 24 * 3600.0


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file; `created_at` is in seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str


class Batch(msgspec.Struct, kw_only=True):
    """A batch, with the fields of OpenAI's `Batch` that change; times are in seconds since 1970.

    `owner` is a digest of the API key that has made it, and is told to nobody.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: str = "validating"
    metadata: dict[str, str] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] = msgspec.field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    times: dict[str, int] = msgspec.field(default_factory=dict)

    def enter(self, status: str) -> None:
        """Change the status, and note when."""
        self.status = status
        self.times.setdefault(f"{status}_at", int(time.time()))


class BatchStore:
    """The folder. Each use opens the database anew, so it may be used in any thread and by several processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._claim: IO[str] | None = None

    @classmethod
    def open(cls, folder: str) -> BatchStore:
        """Make the folder if there is none, and its tables.

        Raises:
            ConfigError: It cannot be used.
        """
        store = cls(Path(folder).expanduser())
        try:
            for part in ("files", "work"):
                (store._folder / part).mkdir(parents=True, exist_ok=True)
            with store._database() as database:
                database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"batch_dir {folder!r} cannot be used: {error}") from None
        return store

    def sweep(self) -> None:
        """Remove what a crash has left: old contents without a row, and the work of batches that have ended."""
        with self._database() as database:
            files = {name for (name,) in database.execute("SELECT id FROM files")}
            batches = {name for (name,) in database.execute(f"SELECT id FROM batches WHERE status IN {OPEN}")}
        for path in (self._folder / "files").iterdir():
            # A young one may be an upload to another process.
            if path.name not in files and time.time() - path.stat().st_mtime > _UPLOAD_S:
                path.unlink(missing_ok=True)
        for path in (self._folder / "work").iterdir():
            if path.name.partition(".")[0] not in batches:
                path.unlink(missing_ok=True)

    def claim(self) -> bool:
        """Become the one process that runs the batches of this folder, until it ends; False if another one is."""
        if self._claim is None:
            claim = (self._folder / "worker.lock").open("w")
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                claim.close()
                return False
            self._claim = claim
        return True

    def release(self) -> None:
        """Let another process run the batches."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def path_of(self, file_id: str) -> Path:
        """Where the content of a file is."""
        return self._folder / "files" / file_id

    def work_of(self, batch_id: str) -> Path:
        """Where the answers of a running batch are."""
        return self._folder / "work" / f"{batch_id}.jsonl"

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, and of the answers of batches that run."""
        with self._database() as database:
            (size,) = database.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()
        return int(size) + sum(path.stat().st_size for path in (self._folder / "work").glob("*.jsonl"))

    def add_file(self, file: StoredFile, owner: str) -> None:
        """Keep a file, whose content is on the disk."""
        with self._database() as database:
            database.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
                (file.id, owner, file.created_at, file.bytes, file.filename, file.purpose),
            )

    def file(self, file_id: str, owner: str) -> StoredFile | None:
        """A file of an owner."""
        found = self._files("id = ? AND owner = ?", (file_id, owner))
        return found[0] if found else None

    def files(self, owner: str, purpose: str | None = None) -> list[StoredFile]:
        """All files of an owner, the newest first."""
        more, values = ("", (owner,)) if purpose is None else (" AND purpose = ?", (owner, purpose))
        return self._files(f"owner = ?{more}", values)

    def delete_file(self, file_id: str) -> None:
        """Remove a file."""
        with self._database() as database:
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def counts(self) -> tuple[int, int, int]:
        """How many files, batches, and batches that have not ended there are."""
        with self._database() as database:
            (files,) = database.execute("SELECT COUNT(*) FROM files").fetchone()
            (batches,) = database.execute("SELECT COUNT(*) FROM batches").fetchone()
            (waiting,) = database.execute(f"SELECT COUNT(*) FROM batches WHERE status IN {OPEN}").fetchone()
        return files, batches, waiting

    def uses(self, file_id: str) -> str | None:
        """A batch that has not ended and reads this file."""
        with self._database() as database:
            query = f"SELECT id FROM batches WHERE input_file_id = ? AND status IN {OPEN}"
            found = database.execute(query, (file_id,)).fetchone()
        return None if found is None else str(found[0])

    def save(self, batch: Batch) -> None:
        """Keep a batch as it is now. A wish to cancel it, which came from elsewhere, stays until it is cancelled."""
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            found = database.execute("SELECT record FROM batches WHERE id = ?", (batch.id,)).fetchone()
            before = None if found is None else _batch(found[0])
            is_early = batch.status in ("validating", "in_progress")
            if before is not None and (before.status == "cancelled" or (before.status == "cancelling" and is_early)):
                batch.status, batch.errors = before.status, before.errors
                batch.times |= before.times
            # Not REPLACE, which gives the row a new place among those of the same second.
            database.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET status = excluded.status, record = excluded.record",
                (
                    *(batch.id, batch.owner, batch.created_at, batch.status, batch.input_file_id),
                    msgspec.json.encode(batch).decode(),
                ),
            )

    def cancel(self, batch_id: str, owner: str) -> Batch | None:
        """Wish that a batch ends, which is done at once if it has not begun.

        One that has ended, or is about to, stays as it is.
        """
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            query = "SELECT record FROM batches WHERE id = ? AND owner = ?"
            found = database.execute(query, (batch_id, owner)).fetchone()
            if found is None:
                return None
            batch = _batch(found[0])
            if batch.status in ("validating", "in_progress"):
                has_begun = batch.status == "in_progress"
                batch.enter("cancelling")
                if not has_begun:
                    batch.enter("cancelled")
                database.execute(
                    "UPDATE batches SET status = ?, record = ? WHERE id = ?",
                    (batch.status, msgspec.json.encode(batch).decode(), batch.id),
                )
            return batch

    def batch(self, batch_id: str, owner: str | None = None) -> Batch | None:
        """A batch, of an owner if one is given."""
        with self._database() as database:
            found = database.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
        batch = None if found is None else _batch(found[0])
        return None if batch is None or (owner is not None and batch.owner != owner) else batch

    def batches(self, owner: str, after: str | None, limit: int) -> list[Batch]:
        """Batches of an owner, the newest first, after one of them."""
        with self._database() as database:
            query = "SELECT record FROM batches WHERE owner = ? ORDER BY created_at DESC, rowid DESC"
            found = [_batch(record) for (record,) in database.execute(query, (owner,))]
        ids = [batch.id for batch in found]
        start = ids.index(after) + 1 if after in ids else 0
        return found[start : start + limit]

    def next_open(self) -> Batch | None:
        """The oldest batch that has not ended."""
        with self._database() as database:
            query = f"SELECT record FROM batches WHERE status IN {OPEN} ORDER BY created_at, rowid LIMIT 1"
            found = database.execute(query).fetchone()
        return None if found is None else _batch(found[0])

    def _files(self, where: str, values: tuple[str, ...]) -> list[StoredFile]:
        columns = "id, bytes, created_at, filename, purpose"
        with self._database() as database:
            rows = database.execute(
                f"SELECT {columns} FROM files WHERE {where} ORDER BY created_at DESC, rowid DESC", values
            ).fetchall()
        return [StoredFile(**dict(zip(columns.split(", "), row, strict=True))) for row in rows]

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction, which is on the disk at the end of the block."""
        path = self._folder / "batches.db"
        with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level="IMMEDIATE")) as database:
            database.execute("PRAGMA synchronous = FULL")
            with database:
                yield database


def new_id(kind: str) -> str:
    """An id of a file or a batch, such as "file-5f..."."""
    return f"{kind}{uuid.uuid4().hex}"


def _batch(record: str) -> Batch:
    return msgspec.json.decode(record, type=Batch)


def is_disk_full(error: BaseException) -> bool:
    """True if something could not be kept because there is no room on the disk."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def error_list(batch: Batch) -> Mapping[str, Any] | None:
    """The errors of a batch that has failed, as OpenAI has them."""
    return {"object": "list", "data": batch.errors} if batch.errors else None
