"""nanoflow: serve large language models at the speed the device allows.

Public names resolve on first use (PEP 562), so that `import nanoflow` and `nanoflow --help` load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanoflow.version import __version__

if TYPE_CHECKING:
    from nanoflow.config import EngineConfig, ServerConfig
    from nanoflow.engine.async_engine import AsyncEngine
    from nanoflow.engine.llm import LLM
    from nanoflow.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
    from nanoflow.request import RequestError, SamplingParams


_HOME = {
    "LLM": "nanoflow.engine.llm",
    "AsyncEngine": "nanoflow.engine.async_engine",
    "SamplingParams": "nanoflow.request",
    "RequestError": "nanoflow.request",
    "EngineConfig": "nanoflow.config",
    "ServerConfig": "nanoflow.config",
    "RequestOutput": "nanoflow.outputs",
    "CompletionOutput": "nanoflow.outputs",
    "Logprob": "nanoflow.outputs",
    "FinishReason": "nanoflow.outputs",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "FinishReason",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ServerConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nanoflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
