"""The engine's process with the fake engine: `python -m tests.fake_engine_process SOCKET`."""

from __future__ import annotations

import sys

from nanoflow.engine.process import serve
from tests.fake_engine import build_fake_engine

if __name__ == "__main__":
    sys.exit(serve(build_fake_engine, sys.argv[1]))
