"""Imports that users of vLLM write, under our name: thin names on what exists, or one line of why there is none."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.machinery import PathFinder
from typing import Any

import pytest

import nanoflow
from nanoflow.compat.calls import METHODS
from nanoflow.compat.finder import FamiliarFinder, install
from nanoflow.compat.imports import MISSING, MISSING_MODULES, MODULES, NAMES

WORK = [
    "from nanoflow import LLM, SamplingParams",
    "from nanoflow import AsyncLLMEngine, AsyncEngineArgs, EngineArgs, LLMEngine",
    "from nanoflow import AsyncLLM, TokensPrompt, TextPrompt, RequestOutput, CompletionOutput, RequestOutputKind",
    "from nanoflow.sampling_params import SamplingParams, RequestOutputKind",
    "from nanoflow.outputs import RequestOutput, CompletionOutput",
    "from nanoflow.inputs import TokensPrompt, TextPrompt, PromptType",
    "from nanoflow.logprobs import Logprob",
    "from nanoflow.sequence import Logprob",
    "from nanoflow.engine.arg_utils import EngineArgs, AsyncEngineArgs",
    "from nanoflow.engine.async_llm_engine import AsyncLLMEngine",
    "from nanoflow.engine.llm_engine import LLMEngine",
    "from nanoflow.v1.engine.async_llm import AsyncLLM",
    "from nanoflow.v1.metrics.reader import Counter, Gauge, Metric",
    "from nanoflow.entrypoints.llm import LLM",
    "from nanoflow.utils import random_uuid, FlexibleArgumentParser",
    "from nanoflow.utils.argparse_utils import FlexibleArgumentParser",
    "import nanoflow.sampling_params",
    "from nanoflow.sampling_params import GuidedDecodingParams, StructuredOutputsParams",
]
DO_NOT = [
    ("from nanoflow import PoolingParams", "nanoflow has no PoolingParams: models generate text"),
    ("from nanoflow.sampling_params import BeamSearchParams", "there is no beam search"),
    ("from nanoflow.lora.request import LoRARequest", "there are no LoRA adapters: merge"),
    ("from nanoflow.multimodal.utils import fetch_image", "there is no nanoflow.multimodal: models take text"),
    ("from nanoflow.distributed import parallel_state", "there is no nanoflow.distributed: one GPU"),
    ("from nanoflow.entrypoints.openai.api_server import run_server", "`nanoflow serve` is the server"),
    ("import nanoflow.model_executor.models", "models are `nanoflow.models`"),
    ("from nanoflow import Fresh", "cannot import name 'Fresh'"),
    ("from nanoflow.sampling_params import Fresh", "cannot import name 'Fresh'"),
    ("import nanoflow.fresh", "No module named 'nanoflow.fresh'"),
]


@pytest.mark.parametrize("line", WORK)
def test_imports_that_work(line: str) -> None:
    names: dict[str, Any] = {}
    exec(line, names)
    assert all(value is not None for name, value in names.items() if not name.startswith("__"))


@pytest.mark.parametrize(("line", "message"), DO_NOT)
def test_imports_that_say_why_not(line: str, message: str) -> None:
    with pytest.raises(ImportError) as problem:
        exec(line, {})
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_every_name_of_the_tables_is_there() -> None:
    for name in NAMES:
        assert getattr(nanoflow, name) is not None
    for module, names in MODULES.items():
        found = importlib.import_module(module)
        assert found.__all__ == sorted(names)
        assert all(getattr(found, name) is not None for name in names)
    assert set(nanoflow.__all__) - {"__version__"} == set(NAMES)
    assert not set(MISSING) & set(NAMES)


def test_modules_of_the_tables_have_no_files() -> None:
    folders = list(nanoflow.__path__)
    for name in (*MODULES, *MISSING_MODULES):
        if name.count(".") == 1:
            assert PathFinder.find_spec(name, folders) is None, f"{name} is a real module: it hides the table's"


def test_the_same_objects_under_all_names() -> None:
    from nanoflow.engine.async_llm_engine import AsyncLLMEngine  # type: ignore[import-not-found]
    from nanoflow.sampling_params import SamplingParams  # type: ignore[import-not-found]

    assert AsyncLLMEngine is nanoflow.AsyncLLM and SamplingParams is nanoflow.SamplingParams
    assert nanoflow.TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}


def test_the_finder_stands_once_and_last() -> None:
    install()
    kinds = [finder if isinstance(finder, type) else type(finder) for finder in sys.meta_path]
    assert kinds.count(FamiliarFinder) == 1 and kinds.index(PathFinder) < kinds.index(FamiliarFinder)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, nanoflow; nanoflow.SamplingParams; nanoflow.EngineArgs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "zmq", "fastapi"} & set(done.stdout.split())


def test_methods_that_there_are_not_say_what_there_is() -> None:
    llm = object.__new__(nanoflow.LLM)
    for name in ("encode", "beam_search", "sleep", "llm_engine"):
        with pytest.raises(AttributeError, match=f"^LLM has no {name}: "):
            getattr(llm, name)
    with pytest.raises(AttributeError, match=r"^LLM has no fresh$"):
        llm.fresh  # noqa: B018
    assert METHODS.ending("fresh") == ""
