"""The folder of one store of pages: found or made in the user's folder, locked, and private to the user.

The user's folder may have stores of several models, and several of one model if several processes serve it: each
process takes one that no other has, so that each finds pages again after a restart. What is not made by this file is
left alone. The store's own file holds the lock, and the number below which all segments have been forgotten.

Everything is done relative to a descriptor of the folder: a folder that is moved stays the same store, and one that is
removed is not replaced by somebody else's. What a segment is stands in `segments.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from nanoflow.kvcache.segments import VERSION

logger = logging.getLogger(__name__)

_MAX_STORES = 64
_LOCK_NAME = "store"
_STORE = re.compile(r"v\d+-[0-9a-f]{16}(-\d+)?")
_SEGMENT = re.compile(r"segment-(\d{12})")
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_LOCK_TRIES, _LOCK_PAUSE_S = 3, 0.05
_IN_USE = (errno.EWOULDBLOCK, errno.EACCES)


class DiskError(Exception):
    """The folder cannot be used: one line that says why, and what to do."""


class StoreFolder:
    """A folder with segments that this process alone uses; made by `open`.

    Attributes:
        path: Where it is, for people.
        descriptor: Of the folder.
        fingerprint: SHA-256 of the text that stands for the model.
        first_number: Segments with lower numbers have been forgotten.
    """

    def __init__(self, parent: Path, name: str, text: str) -> None:
        self.path = parent / name
        self.fingerprint = hashlib.sha256(_encoded(text)).digest()
        self._parent, self._text = parent, text
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        self.descriptor = _open_own_folder(self.path)
        try:
            self._lock = os.open(
                _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self.descriptor
            )
        except OSError:
            os.close(self.descriptor)
            raise
        try:
            _lock(self._lock, tries=_LOCK_TRIES)
            self.forget_below(self._read_first_number())
        except OSError:
            self.close()
            raise

    @classmethod
    def open(cls, parent: Path, text: str) -> StoreFolder:
        """The first store of a model that no other process uses and that belongs to this user; made if need be.

        Args:
            parent: The user's folder.
            text: Stands for the model: stores of other texts are other stores.

        Raises:
            DiskError: The folder cannot be used.
        """
        base = f"v{VERSION}-{hashlib.sha256(_encoded(text)).hexdigest()[:16]}"
        taken = None
        try:
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for number in range(1, _MAX_STORES + 1):
                name = base if number == 1 else f"{base}-{number}"
                try:
                    store = cls(parent, name, text)
                except _TakenError as error:
                    taken = taken or error
                    continue
                if taken is not None:
                    logger.warning("%s: %s; this process keeps its KV pages in %s", parent / base, taken, store.path)
                return store
        except FileExistsError:
            raise DiskError(f"{parent} is not a folder: name a folder for KV pages, or one to be made") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise DiskError(f"{parent}: {reason}: name a folder for KV pages that can be written and locked") from error
        raise DiskError(f"{parent}: all {_MAX_STORES} stores of this model are in use: name another folder")

    def segments(self) -> Iterator[tuple[int, str]]:
        """Number and name of the files that are named like segments and belong to this user, lowest first."""
        yield from sorted((number, name) for number, name, _ in _segments(self.descriptor))

    def size_of(self, name: str) -> int:
        """Bytes of a file; 0 if it is gone."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def forget_below(self, number: int) -> None:
        """After any end of the process or the machine, segments with lower numbers have been forgotten."""
        line = f"nanoflow KV pages, version {VERSION}, segments from {number:012d}"
        data = _encoded(f"{line} {zlib.crc32(line.encode()):08x}\n{self._text}\n")
        # One call, and the same length whenever the folder is the same: it is written as a whole or not at all.
        if os.pwrite(self._lock, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fdatasync(self._lock)
        self.first_number = number

    def free_bytes(self) -> int:
        """What the file system has left for this user."""
        found = os.fstatvfs(self.descriptor)
        return found.f_bavail * found.f_frsize

    def idle_segments(self) -> list[tuple[float, int, Path]]:
        """Segments of other stores in the user's folder that no process uses: last write, bytes, path; oldest first."""
        found = list[tuple[float, int, Path]]()
        with contextlib.suppress(OSError):
            for path in [path for path in self._parent.iterdir() if _STORE.fullmatch(path.name)]:
                if path.name != self.path.name:
                    with contextlib.suppress(OSError), _idle(path) as folder:
                        found += [(state.st_mtime, state.st_size, path / name) for _, name, state in _segments(folder)]
        return sorted(found)

    def remove_idle(self, path: Path) -> bool:
        """Remove a segment of another store, unless a process uses it now."""
        with contextlib.suppress(OSError), _idle(path.parent) as folder:
            os.unlink(path.name, dir_fd=folder)
            return True
        return False

    def close(self) -> None:
        """Others may use it."""
        os.close(self._lock)
        os.close(self.descriptor)

    def _read_first_number(self) -> int:
        """The number that the store's own file has; if it has none, any segment may have been forgotten."""
        line = os.pread(self._lock, 4096, 0).partition(b"\n")[0]
        text, _, check = line.rpartition(b" ")
        number = text.rpartition(b" ")[2]
        if number.isdigit() and check == f"{zlib.crc32(text):08x}".encode():
            return int(number)
        return 1 + max((number for number, _ in self.segments()), default=0)


class _TakenError(OSError):
    """A store of another process, or what has the name of a store and is not this user's folder."""


def _encoded(text: str) -> bytes:
    """Of a text that may have the name of a file in it, which need not be UTF-8."""
    return text.encode(errors="backslashreplace")


def _open_own_folder(path: Path) -> int:
    """A descriptor of a folder of this user, which nobody else can look into from now on."""
    try:
        folder = os.open(path, _FOLDER_FLAGS)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise _TakenError("it is not a folder of this user") from None
        raise
    state = os.fstat(folder)
    if state.st_uid != os.geteuid():
        os.close(folder)
        raise _TakenError("it belongs to another user")
    if stat.S_IMODE(state.st_mode) != 0o700:
        os.fchmod(folder, 0o700)
    return folder


def _lock(file: int, *, tries: int) -> None:
    """Lock a file; who looks for room in idle stores has it locked for a moment, so that is tried again."""
    for left in range(tries - 1, -1, -1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _IN_USE:
                raise
            if not left:
                raise _TakenError("another process uses it") from None
            time.sleep(_LOCK_PAUSE_S)


@contextlib.contextmanager
def _idle(path: Path) -> Iterator[int]:
    """A descriptor of a store's folder while no process uses it; OSError if one does, or if it is not this user's."""
    with contextlib.ExitStack() as stack:
        folder = os.open(path, _FOLDER_FLAGS)
        stack.callback(os.close, folder)
        if os.fstat(folder).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        lock = os.open(_LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
        stack.callback(os.close, lock)
        _lock(lock, tries=1)
        yield folder


def _segments(folder: int) -> Iterator[tuple[int, str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _SEGMENT.fullmatch(entry.name)
            with contextlib.suppress(FileNotFoundError):
                if match and entry.is_file(follow_symlinks=False):
                    state = entry.stat(follow_symlinks=False)
                    if state.st_uid == os.geteuid():
                        yield int(match[1]), entry.name, state
