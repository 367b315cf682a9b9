"""The output file of a batch: every answer is appended as a whole line, and what is there already stays.

A file beside it (`OUTPUT.batch`) says of which input it has the answers. It is written before the first answer, so that
answers to two inputs are never mixed. It is also locked while a process appends.

A process that is killed leaves at most one line that is cut off; `Answers.open` removes it. Every line is handed to the
operating system at once. It is written to the disk (fsync) every second and at the end: if the machine itself fails,
the answers of the last second may be lost, and are computed again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nanoflow.batch_files.lines import OK, AnswerLine, answered
from nanoflow.batch_files.source import Places, Scan
from nanoflow.option import ConfigError

SYNC_S = 1.0
_PIECE_BYTES = 1 << 16
_BEGINNING = b'{"sha256":"'


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What an output file has the answers of: the input, and the model that answers."""

    sha256: str
    num_bytes: int
    num_lines: int
    model: str
    version: int = 1

    @classmethod
    def of(cls, scan: Scan, model: str) -> Identity:
        """That of an input file that was read."""
        return cls(sha256=scan.sha256, num_bytes=scan.num_bytes, num_lines=scan.num_lines, model=model)


class Answers:
    """An open output file, to be used by one thread. Close it, or leave its `with` block.

    Attributes:
        done: Numbers of the input's lines that are answered.
        num_failed: How many of them with another status than 200.
        num_cut: Bytes of a line that was cut off, and removed.
    """

    def __init__(self, descriptor: int, lock: int, found: _Found) -> None:
        self.done = found.done
        self.num_failed = found.num_failed
        self.num_cut = found.num_cut
        self._file, self._lock = descriptor, lock
        self._size = os.fstat(descriptor).st_size
        self._synced_s = time.monotonic()
        self._is_synced = True

    @classmethod
    def open(cls, path: Path, identity: Identity, num_numbers: int) -> Answers:
        """Open an output file, which may have answers to the same input.

        Args:
            path: The file.
            identity: Of which input, by which model.
            num_numbers: The largest number of a line of the input.

        Raises:
            ConfigError: It has something else, or another process appends to it; nothing is changed then.
            OSError: It cannot be written.
        """
        beside = beside_of(path)
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no file: answers are read again when a batch goes on after an interruption")
        if _has_content(path) and not beside.exists():
            raise ConfigError(f"{path} exists and has no {beside.name} beside it: it is not from a batch; give another")
        lock = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process writes answers to {path}") from None
            _identify(lock, beside, path, identity)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                found = _read(file, path, num_numbers)
                _sync_folder(path.parent)
                return cls(file, lock, found)
            except BaseException:
                os.close(file)
                raise
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, number: int, line: AnswerLine) -> bool:
        """Append the answer to a line of the input; False, and nothing is written, if that line has one.

        Raises:
            OSError: It cannot be written, as on a full disk. Nothing of the line is left then.
        """
        if number in self.done:
            return False
        data = memoryview(line.encode())
        try:
            rest = data
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self.done.add(number)
        self._size += len(data)
        self.num_failed += line.response is None or line.response.status_code != OK
        self._is_synced = False
        if time.monotonic() - self._synced_s >= SYNC_S:
            self.sync()
        return True

    def sync(self) -> None:
        """Wait until all answers are on the disk."""
        if not self._is_synced:
            os.fsync(self._file)
            self._is_synced = True
        self._synced_s = time.monotonic()

    def close(self) -> None:
        """Write everything to the disk and close the file."""
        try:
            self.sync()
        finally:
            os.close(self._file)
            os.close(self._lock)


def beside_of(path: Path) -> Path:
    """The file that says of which input an output file has the answers."""
    return path.with_name(f"{path.name}.batch")


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _identify(lock: int, beside: Path, path: Path, identity: Identity) -> None:
    """Compare with what the file beside the output says, or write it if there is no answer yet.

    A file of somebody else with that name, which may be the input, is never written to. What was cut off while it was
    written is ours.
    """
    told = os.pread(lock, _PIECE_BYTES, 0)
    if told[: len(_BEGINNING)] != _BEGINNING[: len(told)]:
        raise ConfigError(f"{beside} is needed beside {path}, and has something else; give another output")
    try:
        found = msgspec.json.decode(told, type=Identity)
    except msgspec.DecodeError:
        found = None
    if found == identity:
        return
    if not _has_content(path):
        # Nothing is lost: there is no answer yet.
        os.ftruncate(lock, 0)
        os.pwrite(lock, msgspec.json.encode(identity) + b"\n", 0)
        os.fsync(lock)
        return
    if found is None:
        raise ConfigError(f"{beside} cannot be read, so nobody knows what {path} answers; give another output")
    raise ConfigError(f"{path} has answers {_difference(found, identity)}; give another output, or delete it")


def _difference(found: Identity, wanted: Identity) -> str:
    if found.sha256 != wanted.sha256:
        return f"to another input, of {found.num_lines:,} lines and {found.num_bytes:,} bytes"
    return f"of another model, {found.model!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What an output file has; attributes as of `Answers`."""

    done: Places
    num_failed: int
    num_cut: int


def _read(file: int, path: Path, num_numbers: int) -> _Found:
    """Read the answers; a last line without an end is cut off."""
    done, end, num_failed = Places(num_numbers), 0, 0
    with open(os.dup(file), "rb") as reader:  # noqa: PTH123, a file that is open already
        reader.seek(0)
        for count, line in enumerate(_whole_lines(reader), 1):
            try:
                number, is_good = answered(line)
                if not 0 < number <= num_numbers:
                    raise ValueError(f"it answers line {number}, and the input has {num_numbers}")
                if not done.add(number):
                    raise ValueError(f"line {number} of the input is answered twice")
            except ValueError as problem:
                raise ConfigError(f"line {count} of {path}: {problem}") from None
            num_failed += not is_good
            end += len(line)
    size = os.fstat(file).st_size
    if size > end:
        os.ftruncate(file, end)
    return _Found(done=done, num_failed=num_failed, num_cut=size - end)


def _whole_lines(reader: Any) -> Iterable[bytes]:
    for line in reader:
        if line.endswith(b"\n"):
            yield line


def _sync_folder(folder: Path) -> None:
    """Write the names of new files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
