"""`LLMEngine`: an engine in this process that its user drives step by step, as users of vLLM know it.

`LLM` does the same for prompts that are all there at once.
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
from nanoflow.request import RequestOutputKind, SamplingParams


class LLMEngine:
    """A loaded model, and requests that move on with each `step`.

    Args:
        engine_args: What to load and how.

    Raises:
        ConfigError, ModelError, TokenizerError: As of `LLM`.
    """

    def __init__(self, engine_args: EngineArgs) -> None:
        self._llm = LLM.from_engine_args(engine_args)
        self._requests: dict[str, tuple[RequestOutput, Snapshots, RequestOutputKind]] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **others: Any) -> LLMEngine:
        """An engine of these options."""
        pass_over(ENGINE_CALLS, "from_engine_args", others)
        return cls(engine_args)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"LLMEngine has no {name}" + METHODS.ending(name))

    def add_request(self, request_id: str, prompt: PromptInput, params: SamplingParams, **others: Any) -> None:
        """Take a request.

        Raises:
            RequestError: It cannot be served, or its id is that of one that has not ended.
        """
        pass_over(ENGINE_CALLS, "add_request", others)
        output = self._llm.add(request_id, prompt, params)
        self._requests[request_id] = (output, Snapshots(params.output_kind), params.output_kind)

    def step(self) -> list[RequestOutput]:
        """Run one iteration; copies of the outputs that grew or ended, as `output_kind` says."""
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
        """True while there is something to do."""
        return bool(self._requests)

    def get_num_unfinished_requests(self) -> int:
        """How many requests have not ended."""
        return len(self._requests)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        for name in (request_ids,) if isinstance(request_ids, str) else list(request_ids):
            if self._requests.pop(name, None) is not None:
                self._llm.abort(name)

    def get_tokenizer(self) -> Any:
        """As `LLM.get_tokenizer`."""
        return self._llm.get_tokenizer()

    def shutdown(self) -> None:
        """Free the model."""
        self._llm.close()
