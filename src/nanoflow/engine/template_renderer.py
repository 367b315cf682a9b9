"""Runs chat templates in processes that can be killed, so that no template can block this process or fill its memory.

A process is started when it is first needed, and again after one was killed. The processes run `template_process.py`.
`chat_template.py` prepares messages and interprets the results.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanoflow.engine.errors import EngineDeadError
from nanoflow.request import RequestError

MAX_PROCESSES = 4
_SCRIPT = Path(__file__).with_name("template_process.py")
_PATIENCE_S = 0.05
# Memory for a template's work; the text that it makes is far smaller.
_MEMORY_MIB = 512


class ChatTemplateError(RequestError):
    """A chat template cannot render a conversation; the message is one line that says why."""


class ChatTemplateLimitError(ChatTemplateError):
    """A chat template was stopped because it took too long, or its process has ended."""


class TemplateRenderer:
    """Up to `MAX_PROCESSES` processes that render chat templates. Methods may be called from several threads.

    Args:
        timeout_s: Longest time that a template may take.
        max_chars: Longest text that it may write.
    """

    def __init__(self, *, timeout_s: float, max_chars: int) -> None:
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._places = threading.BoundedSemaphore(MAX_PROCESSES)
        # Last in, first out: the process that worked last is still in the processor's caches.
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue()
        self._all: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False
        weakref.finalize(self, _end, self._all)

    def render(self, job: Mapping[str, Any]) -> str:
        """Text of a conversation.

        Args:
            job: Keyword arguments of the renderer, all JSON values; see `template_process.answer`.

        Raises:
            ChatTemplateError: The template raises an error, or writes too much.
            ChatTemplateLimitError: It takes too long, or ends its process.
            EngineDeadError: The renderer was closed.
        """
        try:
            line = json.dumps(job).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"it takes JSON values only: {error}") from None
        with self._process() as process:
            reply = self._ask(process, line)
        if "error" in reply:
            raise ChatTemplateError(reply["error"])
        return reply["text"]

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
        # In a session of its own, Ctrl-C in the terminal does not reach it. -P: do not import from the script's folder.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(self._timeout_s), str(self._max_chars), str(_MEMORY_MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
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
            return ChatTemplateLimitError(f"it takes longer than {self._timeout_s:g} s")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return ChatTemplateLimitError(f"it ended the process that it ran in ({how})")


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # the process has ended before it read everything
                pipe.close()


def _end(processes: set[subprocess.Popen[bytes]]) -> None:
    for process in list(processes):
        process.kill()
        process.wait()
