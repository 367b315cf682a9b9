"""From the engine's step outputs to what users read: text, log probabilities, finish reasons, times.

`OutputProcessor` keeps the living requests of a front end: it fans a prompt out into `n` requests of the engine and
brings their tokens back together. Results grow in place. An iteration costs little here: its tokens are only noted, and
become text when somebody reads it (`refresh`) or at the end. Only requests with stop strings need their text at every
iteration. It is not known here where the engine runs: `llm.py` and `async_engine.py` carry requests there and step
outputs back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from nanoflow.engine.completion import Completion
from nanoflow.engine.detokenize import make_detokenizer
from nanoflow.engine.messages import EngineFacts, Finished, PlaceLogprobs, StepOutput
from nanoflow.engine.observer import FinishedRequest, Observer
from nanoflow.engine.prompts import Prompt, make_requests
from nanoflow.engine.stop import StopFilter, StopStrings
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import (
    CompletionOutput,
    FinishReason,
    LogprobRows,
    RequestMetrics,
    RequestOutput,
    TokenText,
    position_logprobs,
)
from nanoflow.request import Request, SamplingParams

# Different lists of stop strings of which the search trees are kept.
_NUM_STOP_LISTS = 64


@dataclass(slots=True, kw_only=True)
class _Living:
    """A request of a user that has not ended.

    Attributes:
        running: Its completions that have not ended, by the engine's id.
        prompt_scores: Log probabilities of its prompt that nobody has read yet.
    """

    output: RequestOutput
    metrics: RequestMetrics
    params: SamplingParams
    running: dict[int, Completion] = field(default_factory=dict)
    prompt_scores: list[PlaceLogprobs] = field(default_factory=list)


class OutputProcessor:
    """The living requests of one front end.

    Args:
        facts: The engine's.
        tokenizer: None serves requests without text only.
        seed: From it requests without a seed draw theirs.
        clock: Seconds, monotonic.

    Attributes:
        observer: Told of times and counts; None tells nobody.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tokenizer: Tokenizer | None,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.observer: Observer | None = None
        self._facts = facts
        self._tokenizer = tokenizer
        own_eos_token_ids = tokenizer.eos_token_ids if tokenizer else ()
        self._eos_token_ids = tuple(dict.fromkeys((*facts.eos_token_ids, *own_eos_token_ids)))
        self._random = random.Random(seed)
        self._clock = clock
        self._next_engine_id = 0
        self._living: dict[str, _Living] = {}
        self._completions: dict[int, Completion] = {}
        self._stopped: list[int] = []
        self._stop_strings = lru_cache(_NUM_STOP_LISTS)(StopStrings)

    def __len__(self) -> int:
        """Number of requests that have not ended."""
        return len(self._living)

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> tuple[RequestOutput, list[Request]]:
        """Take a request.

        Returns:
            Its output, which grows in place from now on, and the `params.n` requests to hand to the engine.

        Raises:
            ValueError: The id is that of a living request, the prompt does not fit, or a token id does not exist.
        """
        if request_id in self._living:
            raise ValueError(f"a request with id {request_id!r} is already there")
        if params.detokenize and self._tokenizer is None:
            raise ValueError("this model has no tokenizer: set detokenize=False")
        arrival_s = self._clock()
        requests = make_requests(
            prompt,
            params,
            facts=self._facts,
            first_id=self._next_engine_id,
            first_seed=self._random.getrandbits(64) if params.seed is None else params.seed,
            eos_token_ids=self._eos_token_ids,
            arrival_s=arrival_s,
        )
        self._next_engine_id += params.n
        metrics = RequestMetrics(arrival_s=arrival_s)
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids,
            outputs=[CompletionOutput(index=index) for index in range(params.n)],
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(prompt.token_ids),
            metrics=metrics,
        )
        living = self._living[request_id] = _Living(output=output, metrics=metrics, params=params)
        for request, completion in zip(requests, output.outputs, strict=True):
            living.running[request.request_id] = self._new_completion(request, living, completion)
        self._completions.update(living.running)
        return output, requests

    def abort(self, request_id: str) -> list[int]:
        """End a request with reason "abort"; return what the engine must forget, nothing for an unknown id."""
        living = self._living.get(request_id)
        if living is None:
            return []
        engine_ids = sorted(living.running)
        for completion in list(living.running.values()):
            self._finish(completion, Finished(reason=FinishReason.ABORT), self._clock())
        return engine_ids

    def abort_all(self) -> list[int]:
        """`abort` every living request."""
        return [engine_id for request_id in list(self._living) for engine_id in self.abort(request_id)]

    def take_stopped(self) -> list[int]:
        """Requests of the engine that ended here since the last call, by a stop string: it must forget them."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def process(self, step: StepOutput) -> list[RequestOutput]:
        """Take in what an iteration gave.

        Returns:
            The outputs that grew or ended, each once. Those that are `finished` are complete; the text of the others,
            and the log probabilities of their prompts, lag behind until `refresh`.
        """
        now_s = self._clock()
        self._note_progress(step, now_s)
        grown: dict[str, RequestOutput] = {}
        searched: dict[int, Completion] = {}
        gaps_s: list[float] = []
        find = self._completions.get
        # Once a token, and therefore short: what only some tokens need is done after it.
        for engine_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
            completion = find(engine_id)
            if completion is None:
                continue
            completion.token_ids.append(token_id)
            last_s = completion.last_token_s
            if last_s is not None:
                gaps_s.append(now_s - last_s)
            elif completion.metrics.first_token_s is None:
                self._note_first_token(completion, now_s)
            completion.last_token_s = completion.metrics.last_token_s = now_s
            if completion.stops is not None:
                searched[engine_id] = completion
            grown[completion.name] = completion.request_output
        stopped = [completion for i, completion in searched.items() if completion.find_stop(step.finished.get(i))]
        for engine_id, scores in step.logprobs.items():
            completion = find(engine_id)
            if completion is not None:
                completion.add_scores(scores)
        for completion in stopped:
            self._finish(completion, Finished(reason=FinishReason.STOP), now_s)
        self._stopped += [c.engine_id for c in stopped if c.engine_id not in step.finished]
        for engine_id, end in step.finished.items():
            completion = find(engine_id)
            if completion is not None:
                self._finish(completion, end, now_s)
                grown[completion.name] = completion.request_output
        if self.observer is not None and gaps_s:
            self.observer.observe_next_tokens(gaps_s)
        return list(grown.values())

    def refresh(self, output: RequestOutput) -> None:
        """Bring the text of an output up to its tokens; call it before the output is shown.

        All that waits is made in one go. Nothing happens if nothing waits.
        """
        living = self._living.get(output.request_id)
        # Another request may have taken over the name of one that has ended.
        if living is None or living.output is not output:
            return
        for completion in living.running.values():
            completion.refresh()
        if living.prompt_scores:
            self._read_prompt_scores(living)

    def _new_completion(self, request: Request, living: _Living, output: CompletionOutput) -> Completion:
        params, detokenizer = living.params, None
        if params.detokenize and self._tokenizer is not None:
            detokenizer = make_detokenizer(self._tokenizer, request.prompt_token_ids, params.skip_special_tokens)
        stops = None
        if params.stop:
            keeps_stop = params.include_stop_str_in_output
            stops = StopFilter(self._stop_strings(tuple(params.stop)), keeps_stop=keeps_stop)
        rows = None
        if params.logprobs is not None:
            rows = output.logprobs = LogprobRows(self._token_text(params))
            output.cumulative_logprob = 0.0
        return Completion(
            engine_id=request.request_id,
            request_output=living.output,
            metrics=living.metrics,
            output=output,
            params=params,
            detokenizer=detokenizer,
            stops=stops,
            logprobs=rows,
        )

    def _token_text(self, params: SamplingParams) -> TokenText:
        return self._tokenizer.token_text if self._tokenizer is not None and params.detokenize else _no_text

    def _note_progress(self, step: StepOutput, now_s: float) -> None:
        """Everything of a step that is neither a token nor an end."""
        if self.observer is not None and step.stats.iteration_tokens > 0:
            self.observer.observe_step(step.stats)
        for engine_id in step.scheduled:
            if engine_id in self._completions:
                metrics = self._completions[engine_id].metrics
                metrics.first_scheduled_s = now_s if metrics.first_scheduled_s is None else metrics.first_scheduled_s
        for engine_id in step.preempted:
            if engine_id in self._completions:
                self._completions[engine_id].metrics.num_preemptions += 1
        for engine_id, scores in step.prompt_logprobs.items():
            if engine_id in self._completions:
                self._living[self._completions[engine_id].name].prompt_scores.append(scores)

    def _note_first_token(self, completion: Completion, now_s: float) -> None:
        metrics = completion.metrics
        metrics.first_token_s = now_s
        if self.observer is not None:
            num_prompt_tokens = len(completion.request_output.prompt_token_ids)
            self.observer.observe_first_token(now_s - metrics.arrival_s, num_prompt_tokens)

    def _read_prompt_scores(self, living: _Living) -> None:
        positions, waiting = living.output.prompt_logprobs, living.prompt_scores
        living.prompt_scores = []
        if positions is not None:
            token_text = self._token_text(living.params)
            for scores in waiting:
                rows = zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True)
                for place, row in enumerate(rows, start=scores.first_position):
                    positions[place] = position_logprobs(*row, token_text)

    def _finish(self, completion: Completion, end: Finished, now_s: float) -> None:
        """End a completion, and its request if it was the last."""
        completion.finish(end)
        living = self._living[completion.name]
        living.output.error = end.error or living.output.error
        del self._completions[completion.engine_id], living.running[completion.engine_id]
        if not living.running:
            self._finish_request(living, end.reason, now_s)

    def _finish_request(self, living: _Living, reason: FinishReason, now_s: float) -> None:
        self._read_prompt_scores(living)
        living.metrics.finished_s = now_s
        living.output.finished = True
        del self._living[living.output.request_id]
        if self.observer is not None:
            self.observer.observe_finished(_summary(living, reason, now_s))


def _no_text(_token_id: int) -> None:
    return None


def _summary(living: _Living, reason: FinishReason, now_s: float) -> FinishedRequest:
    metrics, params = living.metrics, living.params
    lengths = [len(completion.token_ids) for completion in living.output.outputs]
    decode_s = _span_s(metrics.first_token_s, metrics.last_token_s)
    return FinishedRequest(
        reason=reason,
        num_prompt_tokens=len(living.output.prompt_token_ids),
        num_generated_tokens=sum(lengths),
        longest_completion_tokens=max(lengths),
        n=params.n,
        max_tokens=params.max_tokens,
        num_preemptions=metrics.num_preemptions,
        queue_s=_span_s(metrics.arrival_s, metrics.first_scheduled_s),
        prefill_s=_span_s(metrics.first_scheduled_s, metrics.first_token_s),
        decode_s=decode_s,
        inference_s=_span_s(metrics.first_scheduled_s, metrics.last_token_s),
        tpot_s=decode_s / (max(lengths) - 1) if decode_s is not None and max(lengths) > 1 else None,
        e2e_s=now_s - metrics.arrival_s,
    )


def _span_s(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
