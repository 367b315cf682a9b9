"""Checks the shapes that requests ask for before the engine hears of them: a bad or hostile one is a RequestError.

A grammar is compiled once in a process that can be killed (`grammar_process.py`), with bounds on time and memory. What
has passed there takes the engine about as long, in a thread beside its loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanoflow.engine.job_processes import JobCrashError, JobLimitError, JobProcesses
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.request import RequestError, SamplingParams
from nanoflow.structured import Structured

MAX_PROCESSES = 2
TIMEOUT_S = 3.0
_MEMORY_MIB = 512
_SCRIPT = Path(__file__).with_name("grammar_process.py")
# Results that are kept, those used last.
_NUM_KEPT = 512
_NAME = "structured_outputs"
# What users call a shape of a kind, where it has another name.
_KINDS: Mapping[str, str] = {"json": "schema", "choice": "list of choices"}


class GrammarChecks:
    """Checks grammars, and remembers the results. Methods may be called from several threads.

    Args:
        tokenizer: Has the special tokens that a grammar may name; None if there are none.
        timeout_s: Longest time that compiling a grammar may take.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self._tokenizer = tokenizer
        self._processes = JobProcesses(_SCRIPT, (_MEMORY_MIB,), timeout_s=timeout_s, max_processes=MAX_PROCESSES)
        self._pool = ThreadPoolExecutor(MAX_PROCESSES, "nanoflow-grammar-check")
        self._lock = threading.Lock()
        self._results: OrderedDict[Structured, Structured | str] = OrderedDict()

    def checked(self, params: SamplingParams) -> SamplingParams:
        """Parameters whose shape can be used: as they are, or with a grammar that was converted to Lark's format.

        Raises:
            RequestError: The shape cannot be used.
            EngineDeadError: The checks were closed.
        """
        return params if (structured := _shape_of(params)) is None else _with(params, self._result(structured))

    async def checked_aside(self, params: SamplingParams) -> SamplingParams:
        """`checked`, with what takes time in a thread, so that the event loop is not blocked."""
        structured = _shape_of(params)
        if structured is None:
            return params
        result = self._known(structured)
        if result is None:
            result = await asyncio.get_running_loop().run_in_executor(self._pool, self._result, structured)
        return _with(params, result)

    def close(self) -> None:
        """End all processes, including those that are working."""
        self._processes.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _known(self, structured: Structured) -> Structured | str | None:
        with self._lock:
            result = self._results.get(structured)
            if result is not None:
                self._results.move_to_end(structured)
            return result

    def _result(self, structured: Structured) -> Structured | str:
        """The shape to use, without its parts, or why there is none."""
        result = self._known(structured)
        if result is None:
            result = self._check(structured)
            with self._lock:
                self._results[structured] = result
                while len(self._results) > _NUM_KEPT:
                    self._results.popitem(last=False)
        return result

    def _job(self, structured: Structured) -> dict[str, Any]:
        job: dict[str, Any] = {"kind": structured.kind, "text": structured.text}
        if structured.kind == "grammar" and self._tokenizer is not None:
            job |= {"special": dict(self._tokenizer.mark_names), "vocab_size": self._tokenizer.vocab_size}
        return job

    def _check(self, structured: Structured) -> Structured | str:
        # First the parts: of them it can be said what is wrong in the words of the request.
        for part in structured.parts:
            if isinstance(result := self._result(part), str):
                return result
        try:
            reply = self._processes.ask(json.dumps(self._job(structured)).encode())
        except JobCrashError:
            reply = {"error": "it is nested too deeply, or takes too much memory"}
        except JobLimitError as error:
            reply = {"error": str(error)}
        if "error" in reply:
            return f"the {_KINDS.get(structured.kind, structured.kind)} cannot be used: {reply['error']}"
        return Structured(kind=structured.kind, text=reply["text"])


def _shape_of(params: SamplingParams) -> Structured | None:
    """The shape that parameters ask for; whatever is wrong with other parameters is found later."""
    if not isinstance(params, SamplingParams) or params.structured_outputs is None:
        return None
    return params.snapshot().structured_outputs


def _with(params: SamplingParams, result: Structured | str) -> SamplingParams:
    if isinstance(result, str):
        raise RequestError(result, param=_NAME)
    return params if result == params.structured_outputs else dataclasses.replace(params, structured_outputs=result)
