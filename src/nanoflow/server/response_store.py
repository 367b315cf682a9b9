"""Kept responses, in an SQLite file that all front ends share: their number and their bytes are bounded.

A response is kept with its own input alone; what came before is found by `previous_response_id`, from one to the next.
Going on from a response counts as use of all before it, so those of a conversation that goes on are dropped last.
Every function is short and blocks; callers run them beside the event loop.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from nanoflow.config import ConfigError, ServerConfig
from nanoflow.server.errors import ApiError

logger = logging.getLogger(__name__)

_FILE = "responses.db"
_BUSY_TIMEOUT_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT, previous TEXT, used_ns INTEGER, bytes INTEGER, input TEXT, response TEXT);
CREATE INDEX IF NOT EXISTS by_use ON responses (used_ns);
"""


class KeptResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response as it was answered, with the items of its own input.

    `owner` is a digest of the API key that has made it, and is told to nobody.
    """

    id: str
    owner: str
    previous_id: str | None
    input: list[dict[str, Any]]
    response: dict[str, Any]


@contextmanager
def with_response_folder(config: ServerConfig) -> Iterator[ServerConfig]:
    """The options with a folder for kept responses: a temporary one, if none is given and responses are kept.

    It is made when the first response is kept, and removed at the end of the block.
    """
    if config.response_dir is not None or not config.max_kept_responses:
        yield config
        return
    folder = _temporary()
    try:
        with _removing(folder):
            yield dataclasses.replace(config, response_dir=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary() -> str:
    """A folder that nobody has."""
    return str(Path(tempfile.gettempdir()) / f"nanoflow-responses-{uuid.uuid4().hex}")


@contextmanager
def _removing(folder: str) -> Iterator[None]:
    """A process that removes a folder once this one has ended, also if it is killed in the block: its input ends then.

    Signals to the whole group do not reach it. Without a shell, only an orderly end removes the folder.
    """
    try:
        watch = subprocess.Popen(
            ["sh", "-c", 'read -r _; rm -rf -- "$1"', "sh", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        yield
        return
    try:
        yield
    finally:
        watch.communicate()


class ResponseStore:
    """The file. Each use opens it anew, so it may be used in any thread and by several processes.

    Folder and file are made when the first response is kept.
    """

    def __init__(self, folder: Path, *, max_responses: int, max_bytes: int) -> None:
        self._path = folder / _FILE
        self._max_responses, self._max_bytes = max_responses, max_bytes

    @classmethod
    def open(cls, config: ServerConfig) -> ResponseStore | None:
        """The store of a server; None if it keeps no responses.

        Without a folder in the options the store has a temporary one of its own, which goes with it.

        Raises:
            ConfigError: The folder cannot be used.
        """
        if not config.max_kept_responses:
            return None
        folder = Path(config.response_dir or _temporary()).expanduser()
        store = cls(folder, max_responses=config.max_kept_responses, max_bytes=config.max_kept_response_bytes)
        if config.response_dir is None:
            weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"response_dir {config.response_dir!r} cannot be used: nothing can be written there")
        return store

    def keep(self, kept: KeptResponse) -> bool:
        """Keep a response, and drop those used longest ago as far as there are too many.

        Returns:
            False if it is not kept: it is larger than all may be together, or the disk fails, which is logged.
        """
        inputs, response = (msgspec.json.encode(part).decode() for part in (kept.input, kept.response))
        num_bytes = len(inputs.encode()) + len(response.encode())
        if num_bytes > self._max_bytes:
            return False
        row = (kept.id, kept.owner, kept.previous_id, time.time_ns(), num_bytes, inputs, response)
        try:
            self._make()
            with self._database() as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._drop(database)
        except (OSError, sqlite3.Error) as error:
            logger.error("a response cannot be kept in %s: %s", self._path, error)
            return False
        return True

    def find(self, response_id: str, owner: str) -> KeptResponse | None:
        """A response of an owner."""
        if not self._path.exists():
            return None
        with self._database() as database:
            return _found(database, response_id, owner)

    def delete(self, response_id: str, owner: str) -> bool:
        """Forget a response; False if there is none."""
        if not self._path.exists():
            return False
        with self._database() as database:
            query = "DELETE FROM responses WHERE id = ? AND owner = ?"
            return database.execute(query, (response_id, owner)).rowcount > 0

    def conversation(self, response_id: str, owner: str, *, max_bytes: int) -> list[dict[str, Any]]:
        """The items of a response and of all before it, inputs and outputs, in order; this counts as a use of each.

        Args:
            response_id: The last response.
            owner: Whose all of them are.
            max_bytes: Most bytes of them together.

        Raises:
            ApiError: One is not there (404), or they are too long (413).
        """
        if not self._path.exists():
            raise _unknown_previous(response_id, response_id)
        turns: list[KeptResponse] = []
        place: str | None = response_id
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            num_bytes = 0
            while place is not None:
                found = _found(database, place, owner)
                if found is None:
                    raise _unknown_previous(response_id, place)
                turns.append(found)
                query = "UPDATE responses SET used_ns = ? WHERE id = ? RETURNING bytes"
                (size,) = database.execute(query, (time.time_ns(), place)).fetchone()
                num_bytes += size
                if num_bytes > max_bytes:
                    message = f"previous_response_id: the conversation has more than {max_bytes} bytes"
                    raise ApiError(413, message, param="previous_response_id")
                place = found.previous_id
        return [item for turn in reversed(turns) for item in (*turn.input, *turn.response["output"])]

    def _make(self) -> None:
        """Make folder and file, if they are not there. What is said in them is nobody else's business.

        The file gets its name once it has its table, so no process ever finds it without.
        """
        if self._path.exists():
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unnamed = self._path.with_name(f"{uuid.uuid4().hex}.new")
        unnamed.touch(mode=0o600)
        try:
            with closing(sqlite3.connect(unnamed)) as database:
                database.executescript(_SCHEMA)
            with suppress(FileExistsError):  # another process was faster
                os.link(unnamed, self._path)
        finally:
            unnamed.unlink(missing_ok=True)

    def _drop(self, database: sqlite3.Connection) -> None:
        count, size = database.execute("SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM responses").fetchone()
        if count <= self._max_responses and size <= self._max_bytes:
            return
        oldest = database.execute("SELECT id, bytes FROM responses ORDER BY used_ns, rowid").fetchall()
        dropped = []
        for response_id, num_bytes in oldest:
            if count <= self._max_responses and size <= self._max_bytes:
                break
            dropped.append((response_id,))
            count, size = count - 1, size - num_bytes
        database.executemany("DELETE FROM responses WHERE id = ?", dropped)

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction."""
        with closing(sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level="IMMEDIATE")) as database:
            # What a crash of the machine loses, clients send again.
            database.execute("PRAGMA synchronous = OFF")
            with database:
                yield database


def _found(database: sqlite3.Connection, response_id: str, owner: str) -> KeptResponse | None:
    query = "SELECT previous, input, response FROM responses WHERE id = ? AND owner = ?"
    row = database.execute(query, (response_id, owner)).fetchone()
    if row is None:
        return None
    previous, inputs, response = row
    return KeptResponse(
        id=response_id,
        owner=owner,
        previous_id=previous,
        input=msgspec.json.decode(inputs),
        response=msgspec.json.decode(response),
    )


def _unknown_previous(response_id: str, missing: str) -> ApiError:
    which = "is" if missing == response_id else f"goes on from {missing[:100]!r}, which is"
    message = (
        f"previous_response_id: the response {response_id[:100]!r} {which} not kept here: it never was (store), it was "
        "deleted, or it was dropped for newer ones; send the whole conversation as input"
    )
    return ApiError(404, message, param="previous_response_id", code="previous_response_not_found")
