"""Runs jobs in processes that can be killed, so that none can block this process, fill its memory or end it.

A process is started when it is first needed, and again after one was killed. It reads jobs and writes answers, a line
of JSON each, and sets itself an alarm that kills it. `template_renderer.py` and `grammar_checks.py` have such jobs.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nanoflow.engine.errors import EngineDeadError

_PATIENCE_S = 0.05


class JobLimitError(ValueError):
    """A job was stopped because it took too long, or its process has ended; one line that goes behind its name."""


class JobCrashError(JobLimitError):
    """A job's process has ended."""


class JobProcesses:
    """Some processes for one kind of job. Methods may be called from several threads.

    Args:
        script: What they run.
        arguments: Its arguments, the time that a job may take first.
        timeout_s: That time in seconds.
        max_processes: Most of them at once; further jobs wait.
    """

    def __init__(self, script: Path, arguments: Sequence[object], *, timeout_s: float, max_processes: int) -> None:
        self._timeout_s = timeout_s
        # -P: do not import from the script's folder.
        self._command = [sys.executable, "-P", str(script), str(timeout_s), *map(str, arguments)]
        self._places = threading.BoundedSemaphore(max_processes)
        # Last in, first out: the process that worked last is still in the processor's caches.
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue()
        self._all: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False
        weakref.finalize(self, _end, self._all)

    def ask(self, job: bytes) -> dict[str, str]:
        """The answer to a job, which is a line of JSON without its end.

        Raises:
            JobLimitError: It takes too long.
            JobCrashError: It ends its process, also by taking too much memory.
            EngineDeadError: The processes were closed.
        """
        with self._process() as process:
            return self._ask(process, job + b"\n")

    def close(self) -> None:
        """End all processes, including those that are working."""
        self._is_closed = True
        _end(self._all)

    @contextmanager
    def _process(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process for one job; it is kept for the next one unless it has ended."""
        with self._places:
            process = self._idle_or_new()
            try:
                yield process
            except BaseException:
                self._all.discard(process)
                _end({process})
                _close_pipes(process)
                raise
            self._idle.put(process)

    def _idle_or_new(self) -> subprocess.Popen[bytes]:
        """An idle process, or a new one. Starting one takes longer than most jobs, so first we wait for an idle one."""
        with suppress(queue.Empty):
            while True:
                process = self._idle.get(timeout=_PATIENCE_S if self._all else 0)
                if process.poll() is None:
                    return process
                self._all.discard(process)
        return self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise EngineDeadError("the engine has been closed")
        # In a session of its own, Ctrl-C in the terminal does not reach it.
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._all.add(process)
        return process

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        reply = process.stdout.readline()
        if not reply.endswith(b"\n"):
            raise self._end_of(process)
        answer: dict[str, str] = json.loads(reply)
        return answer

    def _end_of(self, process: subprocess.Popen[bytes]) -> Exception:
        """Why a process has ended before it answered."""
        if self._is_closed:
            return EngineDeadError("the engine has been closed")
        status = process.wait()
        if status == -signal.SIGALRM:
            return JobLimitError(f"it takes longer than {self._timeout_s:g} s")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return JobCrashError(f"it ended the process that it ran in ({how})")


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # the process has ended before it read everything
                pipe.close()


def _end(processes: set[subprocess.Popen[bytes]]) -> None:
    for process in list(processes):
        process.kill()
        process.wait()
