"""What can go wrong with an engine as a whole.

A problem of one request is a `RequestError` (`nanoflow.request`), or the `error` of its output.
"""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine cannot start, or has died; the message is one line for people."""


class EngineDeadError(EngineError):
    """The engine has died or was closed: it answers neither running nor new requests."""
