"""nanoflow: serve large language models at the speed the device allows.

Public names resolve on first use (PEP 562), so that `import nanoflow` and `nanoflow --help` load no torch.
`compat/imports.py` lists the module that defines each name, and the modules of vLLM that exist under this name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanoflow.compat.finder import fetch, install, missing
from nanoflow.compat.imports import NAMES
from nanoflow.version import __version__

if TYPE_CHECKING:
    from nanoflow.config import EngineConfig, ServerConfig
    from nanoflow.engine.async_engine import AsyncEngine
    from nanoflow.engine.llm import LLM
    from nanoflow.familiar.async_llm import AsyncLLM
    from nanoflow.familiar.async_llm import AsyncLLM as AsyncLLMEngine
    from nanoflow.familiar.engine_args import AsyncEngineArgs, EngineArgs
    from nanoflow.familiar.llm_engine import LLMEngine
    from nanoflow.familiar.prompts import TextPrompt, TokensPrompt
    from nanoflow.outputs import CompletionOutput, EmbeddingRequestOutput, FinishReason, Logprob, RequestOutput
    from nanoflow.request import RequestError, RequestOutputKind, SamplingParams
    from nanoflow.structured import structured_outputs_params as GuidedDecodingParams
    from nanoflow.structured import structured_outputs_params as StructuredOutputsParams

install()

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "FinishReason",
    "GuidedDecodingParams",
    "LLMEngine",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ServerConfig",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return fetch(NAMES[name], name)
    error = missing(name)
    if error is not None:
        raise error
    raise AttributeError(f"module 'nanoflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
