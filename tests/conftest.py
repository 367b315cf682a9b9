"""Settings that must be in effect before any test module is imported.

Triton decides on import whether to compile or to interpret. Tests send SIGINT to this process and to its children. A
shell that starts this process in the background makes it ignore SIGINT, and children inherit that, so the handler is
restored. Property tests have no deadlines, because the machine may be busy.
Of several workers each begins to import with other files, so that each rewrites the assertions of a part of them and
finds what the others have rewritten of the rest.
Slow tests come first, so that none of them is the last one that a single worker still has to do.
The garbage collector does not look at what imports and collection make, as all of it stays.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

gc.disable()
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ctrl-C interrupts a test, whatever the one before has left; one that leaves it otherwise is named."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        warnings.warn(f"{request.node.nodeid} leaves Ctrl-C handled otherwise", stacklevel=1)


def pytest_collection(session: pytest.Session) -> None:
    worker, root = os.environ.get("PYTEST_XDIST_WORKER"), Path(__file__).parents[1]
    if worker is None or not all(Path(arg).is_dir() for arg in session.config.args):
        return
    place, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for file in sorted(root.glob("tests/*/test_*.py"))[place::count]:
        # What fails is told when it is collected.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            import_module(".".join(file.relative_to(root).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
