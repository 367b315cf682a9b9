"""Removes API keys from this process's command line, which `ps` shows to every user of the machine.

A key is visible from the start of the process until then, so a file or an environment variable is safer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

# Indices in /proc/self/stat, counted after the process name, of the addresses where arguments begin and end.
_ARG_START, _ARG_END = 45, 46
_MAX_ARGUMENT_BYTES = 1 << 22


def hide_arguments(secrets: Iterable[str]) -> None:
    """Overwrite texts in the command line of this process; does nothing where the system does not allow it.

    Args:
        secrets: Texts that are arguments, or follow the "=" of one.
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
    # If both lengths agree, this memory is what the system shows.
    if not start or len(line) != end - start or len(line) > _MAX_ARGUMENT_BYTES:
        return
    position = 0
    for argument in line.split(b"\0"):
        for secret in hidden:
            if argument == secret or argument.endswith(b"=" + secret):
                ctypes.memset(start + position + len(argument) - len(secret), ord("*"), len(secret))
        position += len(argument) + 1
