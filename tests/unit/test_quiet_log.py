"""A log that nobody reads stops nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

from nanoflow.engine.quiet_log import QuietHandler


def logger_of(handler: QuietHandler) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def test_lines_are_written_in_their_order() -> None:
    read, write = os.pipe()
    handler = QuietHandler(write)
    logger = logger_of(handler)
    for number in range(100):
        logger.warning("line %d \ud800", number)
    handler.flush()
    lines = os.read(read, 1 << 16).decode().splitlines()
    assert lines == [f"line {number} \\ud800" for number in range(100)]
    assert handler.num_dropped == 0


def test_what_nobody_reads_is_dropped_and_counted() -> None:
    read, write = os.pipe()
    handler = QuietHandler(write, max_waiting=10)
    logger = logger_of(handler)
    begin_s = time.monotonic()
    for _ in range(3000):
        logger.warning("x" * 100)
    assert time.monotonic() - begin_s < 5.0
    assert handler.num_dropped > 1000
    text = b""
    while b"were dropped" not in text:
        text += os.read(read, 1 << 16)
    assert b"lines of the log were dropped" in text


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    handler = QuietHandler(write)
    logger_of(handler).warning("hello")
    handler.flush()


def test_a_process_ends_though_its_log_is_stuck() -> None:
    program = (
        "import logging; from nanoflow.engine.quiet_log import log_quietly; log_quietly('p')\n"
        "for _ in range(5000): logging.warning('x' * 200)\n"
        "print('done', flush=True)"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"done\n", 0)
    os.close(read)
