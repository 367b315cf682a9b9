"""The input file of a batch: read once as a whole to know it, then line by line, in bounded memory.

`scan` reads the file from its beginning to its end: a digest that identifies it, the number of its lines, and which of
them repeat a custom_id. That takes 16 bytes of memory a line while it runs, and a bit a line afterwards. `read_lines`
reads it again, lazily.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from nanoflow.batch_files.lines import custom_id_of
from nanoflow.option import ConfigError

Stamp = tuple[int, int]
MAX_LINE_BYTES = 9 * 2**20
_DIGEST_BYTES = 16


class Places:
    """A set of line numbers, one bit each.

    Args:
        size: Largest number that it can hold.
    """

    def __init__(self, size: int) -> None:
        self._bits = bytearray(size // 8 + 1)
        self.size = size
        self.count = 0

    def __contains__(self, number: int) -> bool:
        return bool(self._bits[number >> 3] & (1 << (number & 7)))

    def __len__(self) -> int:
        return self.count

    def add(self, number: int) -> bool:
        """Add a number from 0 to `size`; False if it was there before."""
        if number in self:
            return False
        self._bits[number >> 3] |= 1 << (number & 7)
        self.count += 1
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What is known of an input file after it was read once.

    Attributes:
        sha256: Digest of its bytes, in hexadecimal.
        num_bytes: Its length.
        num_lines: Lines that are not blank: those that get an answer.
        num_numbers: Lines, blank ones too: the largest number of a line.
        repeated: Numbers of the lines whose custom_id a line before them has.
        stamp: Size and time of the last change when it was opened; another one means that it has changed since.
    """

    sha256: str
    num_bytes: int
    num_lines: int
    num_numbers: int
    repeated: Places
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input: its number, from 1, and its text without its end; None if it is longer than it may be."""

    number: int
    text: bytes | None


def scan(path: Path, max_line_bytes: int = MAX_LINE_BYTES, max_lines: int | None = None) -> Scan:
    """Read a file as a whole, in bounded memory; one with more lines than `max_lines` only up to one more.

    Raises:
        OSError: It cannot be read.
        ConfigError: It is no file, and so cannot be read again.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file: a batch is read twice, and again when it goes on after an interruption")
    whole, digests, numbers = hashlib.sha256(), bytearray(), array("Q")
    num_bytes = num_lines = last = 0
    with path.open("rb") as file:
        stamp = _stamp(file)
        for line, raw in _lines(file, max_line_bytes):
            if line is not None:
                last = line.number
                if line.text is None or line.text.strip():
                    num_lines += 1
                custom_id = None if line.text is None else custom_id_of(line.text)
                if custom_id is not None:
                    digests += hashlib.blake2b(custom_id.encode(), digest_size=_DIGEST_BYTES).digest()
                    numbers.append(line.number)
            whole.update(raw)
            num_bytes += len(raw)
            if max_lines is not None and num_lines > max_lines:
                break
    repeated = Places(last)
    for number in _repeated(digests, np.frombuffer(numbers, dtype=np.uint64)):
        repeated.add(int(number))
    return Scan(
        sha256=whole.hexdigest(),
        num_bytes=num_bytes,
        num_lines=num_lines,
        num_numbers=last,
        repeated=repeated,
        stamp=stamp,
    )


def read_lines(path: Path, known: Scan, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a file that are not blank, in order, read as they are asked for.

    Raises:
        ConfigError: It has changed since it was scanned, so that its lines are not those that are known.
    """
    with path.open("rb") as file:
        for line, _ in _lines(file, max_line_bytes):
            _check_unchanged(file, path, known)
            if line is not None and (line.text is None or line.text.strip()):
                yield line
        _check_unchanged(file, path, known)  # it may have become shorter


def _check_unchanged(file: BinaryIO, path: Path, known: Scan) -> None:
    if _stamp(file) != known.stamp:
        raise ConfigError(
            f"{path} has changed while it was answered: the answers so far are those of its earlier content; put that "
            "back to go on, or give another output"
        )


def _stamp(file: BinaryIO) -> Stamp:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[Line | None, bytes]]:
    """Lines with the bytes that they are made of; a line that is too long comes in pieces, first without a line."""
    number, is_long = 0, False
    while raw := file.readline(most + 1):
        if not raw.endswith(b"\n") and len(raw) > most:
            is_long = True
            yield None, raw
            continue
        number += 1
        text = raw.rstrip(b"\r\n")
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        yield Line(number, None if is_long else text), raw
        is_long = False
    if is_long:
        yield Line(number + 1, None), b""


def _repeated(digests: bytearray, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers of the lines with a digest that an earlier line has."""
    if not len(numbers):
        return numbers
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    # Stable: among equal digests the first line stays first.
    order = np.lexsort((halves[:, 0], halves[:, 1]))
    ordered = halves[order]
    is_again = np.concatenate(([False], (ordered[1:] == ordered[:-1]).all(axis=1)))
    return np.sort(numbers[order[is_again]])
