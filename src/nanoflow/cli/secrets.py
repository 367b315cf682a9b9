"""Keys on the command line: once read, they are not left where `ps` shows them to every user of the machine.

A file or an environment variable is better still: between the start and here the key can be seen. Which options hold
keys is the commands' to know.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

# Fields of /proc/self/stat, counted after the name of the process: where the arguments begin and end in memory.
_ARG_START, _ARG_END = 45, 46
_MAX_ARGUMENT_BYTES = 1 << 22


def hide_arguments(secrets: Iterable[str]) -> None:
    """Overwrite texts in this process's command line, as the system shows it; without effect where that cannot be.

    Args:
        secrets: Texts that stand there as arguments, or behind the "=" of one.
    """
    hidden = [secret.encode() for secret in secrets if secret]
    if not hidden or sys.platform != "linux":
        return
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        line = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return
    # Where both agree it is the memory that is shown.
    if not start or len(line) != end - start or len(line) > _MAX_ARGUMENT_BYTES:
        return
    position = 0
    for argument in line.split(b"\0"):
        for secret in hidden:
            if argument == secret or argument.endswith(b"=" + secret):
                ctypes.memset(start + position + len(argument) - len(secret), ord("*"), len(secret))
        position += len(argument) + 1
