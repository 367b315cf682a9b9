"""The process in which chat templates run, since an untrusted template may loop or fill the memory.

`template_renderer.py` runs it as a script. A job is a line of JSON. Its answer is a line of JSON too, with a `text` or
an `error`. The operating system kills the process when a job takes too long, whatever the template is doing.
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
        line: Keyword arguments of `render`, as JSON.
        max_chars: Longest text that is returned.
    """
    try:
        job: dict[str, Any] = json.loads(line)
        text = render(job.pop("messages"), job.pop("chat_template"), **job)
    except MemoryError:
        return {"error": "it takes too much memory"}
    # Any exception of a template concerns this job alone.
    except BaseException as error:
        return {"error": one_line(error)}
    if len(text) > max_chars:
        return {"error": f"it writes {len(text)} characters, and {max_chars} are the most"}
    return {"text": text}


def limit_memory(num_bytes: int) -> None:
    """Limit the process to this much more memory than it has now, on systems that support it."""
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
