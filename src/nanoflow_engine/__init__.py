"""The start of the `nanoflow` command: makes sure that the `nanoflow` that would run is this one.

Our distribution is `nanoflow-engine`; the package and the command are `nanoflow`, and so are those of another
distribution of that name. Where both are installed, files of one lie over those of the other. This package has a name
of its own, so that it is there to say so. It knows nothing of what it starts: see `nanoflow/cli/main.py`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "nanoflow-engine"
_OTHER = "nanoflow"
# A file that the other package has and ours has too, and one that only ours has.
_SHARED, _OURS = "nanoflow/__init__.py", "nanoflow/engine/llm.py"
_FIRST_WORDS = b'"""nanoflow: serve large language models'
_ADVICE = f"run `pip uninstall -y {_OTHER} {DISTRIBUTION}`, then `pip install {DISTRIBUTION}`"


def site_problem() -> str | None:
    """What is wrong with this site, in one line; None if all is well."""
    stranger = _stranger()
    if stranger is not None:
        return f"another package is installed that is named nanoflow too ({stranger}), over this one: {_ADVICE}"
    return None if _is_whole() else f"the files of nanoflow are not all there, or another package's: {_ADVICE}"


def main() -> int:
    """Run the `nanoflow` command; refuse in one line, with status 1, where another package would run in its place."""
    problem = site_problem()
    if problem is not None:
        print(f"nanoflow: error: {problem}", file=sys.stderr)
        return 1
    from nanoflow.cli.main import main as run

    return run()


def _stranger() -> str | None:
    """Name and version of a distribution `nanoflow` that is not ours under the name it had; None if there is none."""
    try:
        found = metadata.distribution(_OTHER)
    except metadata.PackageNotFoundError:
        return None
    files = {str(file).replace("\\", "/") for file in found.files or ()}
    return f"{_OTHER} {found.version}" if _SHARED in files and _OURS not in files else None


def _is_whole() -> bool:
    """True if the `nanoflow` that would be imported has our files."""
    from importlib.util import find_spec

    spec = find_spec("nanoflow")
    if spec is None or spec.origin is None:
        return False
    first = Path(spec.origin)
    return (first.parent / "engine" / "llm.py").is_file() and first.read_bytes().startswith(_FIRST_WORDS)
