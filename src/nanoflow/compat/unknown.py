"""What to say of an option that does not exist: where it exists instead, the nearest name, or what there is."""

from __future__ import annotations

from nanoflow.compat.engine_options import ENGINE
from nanoflow.compat.entries import Foreign
from nanoflow.compat.sampling_options import SAMPLING
from nanoflow.compat.server_options import SERVER
from nanoflow.parameters import did_you_mean, nearest

_MAX_LISTED = 16  # options listed in an error message


def unknown_option(name: str, known: list[str]) -> str:
    """One-line error for an unknown option: where it exists instead, the nearest known name, or the known names."""
    return f"unknown option {name!r}{_elsewhere(name) or did_you_mean(name, known) or _others(name, known)}"


def _elsewhere(name: str) -> str | None:
    """End of the message if another table has the option; None if no table has it."""
    bare = name.lstrip("-").replace("-", "_")
    for table in (ENGINE, SERVER, SAMPLING):
        entry = table.entries.get(bare)
        if entry is not None:
            return f": {entry.reason}" if isinstance(entry, Foreign) else f" here: it is one of {table.title}"
    return None


def _others(name: str, known: list[str]) -> str:
    """End of the message that lists the known options."""
    foreign = {entry.name: entry for table in (ENGINE, SERVER, SAMPLING) for entry in table.foreign}
    for near in nearest(name.lstrip("-").replace("-", "_"), foreign):
        return f"; {near}, if that is meant: {foreign[near].reason}"
    return f"; known: {', '.join(known)}" if len(known) <= _MAX_LISTED else "; --help lists all, and docs/ has them"
