"""`LLMEngine`: an engine in this process that its user drives step by step, with vLLM's interface.

For prompts that are all known in advance, `LLM` does the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nanoflow.compat.calls import ENGINE_CALLS, METHODS, pass_over
from nanoflow.engine.llm import LLM
from nanoflow.engine.prompts import PromptInput
from nanoflow.familiar.engine_args import EngineArgs
from nanoflow.familiar.snapshots import Snapshots
from nanoflow.outputs import RequestOutput
from nanoflow.priorities import Priority
from nanoflow.request import RequestOutputKind, SamplingParams


class LLMEngine:
    """A loaded model with requests that advance at each `step`.

    Args:
        engine_args: Options of the engine.

    Raises:
        ConfigError, ModelError, TokenizerError: As for `LLM`.
    """

    def __init__(self, engine_args: EngineArgs) -> None:
        self._llm = LLM.from_engine_args(engine_args)
        self._requests: dict[str, tuple[RequestOutput, Snapshots, RequestOutputKind]] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **others: Any) -> LLMEngine:
        """An engine with these options."""
        pass_over(ENGINE_CALLS, "from_engine_args", others)
        return cls(engine_args)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"LLMEngine has no {name}" + METHODS.ending(name))

    def add_request(
        self,
        request_id: str,
        prompt: PromptInput,
        params: SamplingParams,
        *,
        priority: Priority | None = None,
        **others: Any,
    ) -> None:
        """Add a request; `priority` as for `LLM.generate`.

        Raises:
            RequestError: It is invalid, or its id is that of an unfinished request.
        """
        pass_over(ENGINE_CALLS, "add_request", others)
        output = self._llm.add(request_id, prompt, params, priority)
        self._requests[request_id] = (output, Snapshots(params.output_kind), params.output_kind)

    def step(self) -> list[RequestOutput]:
        """Run one iteration; returns copies of the outputs that changed, as `output_kind` says."""
        grown = []
        for output in self._llm.step():
            held = self._requests.get(output.request_id)
            if held is None:
                continue
            if output.finished:
                del self._requests[output.request_id]
            elif held[2] is RequestOutputKind.FINAL_ONLY:
                continue
            grown.append(held[1].take(output))
        return grown

    def has_unfinished_requests(self) -> bool:
        """True while a request is unfinished."""
        return bool(self._requests)

    def get_num_unfinished_requests(self) -> int:
        """Number of unfinished requests."""
        return len(self._requests)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Drop requests; unknown ids are ignored."""
        for name in (request_ids,) if isinstance(request_ids, str) else list(request_ids):
            if self._requests.pop(name, None) is not None:
                self._llm.abort(name)

    def get_tokenizer(self) -> Any:
        """As for `LLM.get_tokenizer`."""
        return self._llm.get_tokenizer()

    def shutdown(self) -> None:
        """Free the model."""
        self._llm.close()
