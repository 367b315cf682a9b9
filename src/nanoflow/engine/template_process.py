"""The process in which chat templates run: a template is somebody's program, which may loop or fill the memory.

It is run as a script by `template_renderer.py`, which see. A job is a line of JSON, and so is its answer: `text`, or
the `error`. A job that takes too long ends the process: the kernel does it, whatever the template is at.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoflow.engine.template_environment import render
from nanoflow.errors import one_line

_MIB = 1 << 20


def answer(line: bytes, max_chars: int) -> dict[str, str]:
    """Render a conversation.

    Args:
        line: Keyword arguments of `render`, those for the template among them.
        max_chars: Longest text that is given back.
    """
    try:
        job: dict[str, Any] = json.loads(line)
        text = render(job.pop("messages"), job.pop("chat_template"), **job)
    except MemoryError:
        return {"error": "it takes too much memory"}
    # Whatever a template raises is about this job alone.
    except BaseException as error:
        return {"error": one_line(error)}
    if len(text) > max_chars:
        return {"error": f"it writes {len(text)} characters, and {max_chars} are the most"}
    return {"text": text}


def limit_memory(num_bytes: int) -> None:
    """Let the process have this much more memory than it has now, where the system can say and do so."""
    with suppress(OSError, ValueError):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes,) * 2)


def main() -> None:
    """Answer jobs until standard input ends."""
    timeout_s, max_chars, memory_mib = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit_memory(memory_mib * _MIB)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        reply = json.dumps(answer(line, max_chars)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
