"""What Python prints for an exception that nobody catches."""

from __future__ import annotations

import traceback


def is_shown_alone(error: BaseException) -> bool:
    """True if only this exception is printed, without those that it was raised from."""
    return "".join(traceback.format_exception(error)).count("Traceback (most recent call last)") == 1
