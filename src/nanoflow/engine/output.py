"""From the engine's step outputs to what users read: text, log probabilities, finish reasons, times.

`OutputProcessor` keeps the living requests of a front end: it fans a prompt out into `n` requests of the engine and
brings their tokens back together. Results grow in place. It does not know where the engine runs: `llm.py` and
`async_engine.py` carry requests there and step outputs back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanoflow.engine.messages import EngineFacts, Finished, PlaceLogprobs, StepOutput
from nanoflow.engine.observer import FinishedRequest, Observer
from nanoflow.engine.prompts import Prompt, make_requests
from nanoflow.engine.stop import StopFilter
from nanoflow.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from nanoflow.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from nanoflow.request import Request, SamplingParams


@dataclass(slots=True, kw_only=True)
class _Living:
    """A request of a user that has not ended."""

    output: RequestOutput
    metrics: RequestMetrics
    params: SamplingParams
    engine_ids: set[int]


@dataclass(slots=True, kw_only=True)
class _Completion:
    """One of its completions: one request of the engine."""

    engine_id: int
    living: _Living
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    stops: StopFilter
    last_token_s: float | None = None


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
        self._completions: dict[int, _Completion] = {}
        self._stopped: list[int] = []

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
            outputs=[_empty_completion(index, params) for index in range(params.n)],
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(prompt.token_ids),
            metrics=metrics,
        )
        engine_ids = {request.request_id for request in requests}
        living = _Living(output=output, metrics=metrics, params=params, engine_ids=engine_ids)
        self._living[request_id] = living
        for request, completion in zip(requests, output.outputs, strict=True):
            self._completions[request.request_id] = self._new_completion(request.request_id, living, completion)
        return output, requests

    def abort(self, request_id: str) -> list[int]:
        """End a request with reason "abort"; return what the engine must forget, nothing for an unknown id."""
        living = self._living.get(request_id)
        if living is None:
            return []
        engine_ids = sorted(living.engine_ids)
        for engine_id in engine_ids:
            self._finish(self._completions[engine_id], Finished(reason=FinishReason.ABORT), self._clock())
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
            The outputs that grew or ended, each once. Those that ended are complete, the others after `refresh`.
        """
        now_s = self._clock()
        self._note_progress(step, now_s)
        latencies_s: list[float] = []
        grown: dict[str, RequestOutput] = {}
        for engine_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
            completion = self._completions.get(engine_id)
            if completion is not None:
                self._note_token_time(completion, now_s, latencies_s)
                self._take_logprobs(completion, step.logprobs.get(engine_id))
                self._take_token(completion, token_id, step.finished.get(engine_id), now_s)
                grown[completion.living.output.request_id] = completion.living.output
        for engine_id, end in step.finished.items():
            completion = self._completions.get(engine_id)
            if completion is not None:
                self._finish(completion, end, now_s)
                grown[completion.living.output.request_id] = completion.living.output
        if self.observer is not None and latencies_s:
            self.observer.observe_next_tokens(latencies_s)
        return list(grown.values())

    def refresh(self, output: RequestOutput) -> None:
        """Bring the text of an output up to its tokens, before it is shown."""

    def _new_completion(self, engine_id: int, living: _Living, output: CompletionOutput) -> _Completion:
        params, detokenizer = living.params, None
        if params.detokenize and self._tokenizer is not None:
            prompt_token_ids = living.output.prompt_token_ids
            detokenizer = IncrementalDetokenizer(self._tokenizer, prompt_token_ids, params.skip_special_tokens)
        return _Completion(
            engine_id=engine_id,
            living=living,
            output=output,
            detokenizer=detokenizer,
            stops=StopFilter(tuple(params.stop or ()), keeps_stop=params.include_stop_str_in_output),
        )

    def _note_progress(self, step: StepOutput, now_s: float) -> None:
        """Everything of a step that is neither a token nor an end."""
        if self.observer is not None and step.stats.iteration_tokens > 0:
            self.observer.observe_step(step.stats)
        for engine_id in step.scheduled:
            if engine_id in self._completions:
                metrics = self._completions[engine_id].living.metrics
                metrics.first_scheduled_s = now_s if metrics.first_scheduled_s is None else metrics.first_scheduled_s
        for engine_id in step.preempted:
            if engine_id in self._completions:
                self._completions[engine_id].living.metrics.num_preemptions += 1
        for engine_id, scores in step.prompt_logprobs.items():
            if engine_id in self._completions:
                living = self._completions[engine_id].living
                positions = living.output.prompt_logprobs
                if positions is not None:
                    stop = scores.first_position + len(scores.ranks)
                    positions[scores.first_position : stop] = self._read_logprobs(scores, living.params)

    def _note_token_time(self, completion: _Completion, now_s: float, latencies_s: list[float]) -> None:
        living = completion.living
        if completion.last_token_s is not None:
            latencies_s.append(now_s - completion.last_token_s)
        elif living.metrics.first_token_s is None:
            living.metrics.first_token_s = now_s
            if self.observer is not None:
                num_prompt_tokens = len(living.output.prompt_token_ids)
                self.observer.observe_first_token(now_s - living.metrics.arrival_s, num_prompt_tokens)
        completion.last_token_s = living.metrics.last_token_s = now_s

    def _take_token(self, completion: _Completion, token_id: int, end: Finished | None, now_s: float) -> None:
        output, params, stops = completion.output, completion.living.params, completion.stops
        output.token_ids.append(token_id)
        # A stop token is like a stop string: it ends the text and is not part of it, unless asked for.
        is_shown = end is None or end.reason is not FinishReason.STOP or params.include_stop_str_in_output
        if completion.detokenizer is not None and is_shown:
            text = completion.detokenizer.push(token_id)
            output.text += stops.push(text, may_stop=len(output.token_ids) >= params.min_tokens)
        if stops.found is not None:
            if end is None:
                self._stopped.append(completion.engine_id)
            self._finish(completion, Finished(reason=FinishReason.STOP), now_s)
        elif end is not None:
            self._finish(completion, end, now_s)

    def _take_logprobs(self, completion: _Completion, scores: PlaceLogprobs | None) -> None:
        output = completion.output
        if scores is None or output.logprobs is None:
            return
        output.logprobs += self._read_logprobs(scores, completion.living.params)
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(row[0] for row in scores.logprobs)

    def _read_logprobs(self, scores: PlaceLogprobs, params: SamplingParams) -> Iterator[PositionLogprobs]:
        """One mapping a place: the token that stands there first, then the most probable ones."""
        decode = self._tokenizer.token_text if self._tokenizer is not None and params.detokenize else _no_text
        for token_ids, logprobs, rank in zip(scores.token_ids, scores.logprobs, scores.ranks, strict=True):
            ranks = (rank, *range(1, len(token_ids)))
            position: PositionLogprobs = {}
            for token_id, logprob, token_rank in zip(token_ids, logprobs, ranks, strict=True):
                if token_id not in position:
                    position[token_id] = Logprob(logprob=logprob, rank=token_rank, decoded_token=decode(token_id))
            yield position

    def _finish(self, completion: _Completion, end: Finished, now_s: float) -> None:
        """End a completion, and its request if it was the last."""
        output, living = completion.output, completion.living
        if completion.stops.found is None and completion.detokenizer is not None:
            output.text += completion.stops.push(completion.detokenizer.flush(), may_stop=False)
            output.text += completion.stops.flush()
        output.finish_reason = end.reason
        output.stop_reason = completion.stops.found if end.stop_token_id is None else end.stop_token_id
        living.output.error = end.error or living.output.error
        del self._completions[completion.engine_id]
        living.engine_ids.discard(completion.engine_id)
        if not living.engine_ids:
            self._finish_request(living, end.reason, now_s)

    def _finish_request(self, living: _Living, reason: FinishReason, now_s: float) -> None:
        living.metrics.finished_s = now_s
        living.output.finished = True
        del self._living[living.output.request_id]
        if self.observer is not None:
            self.observer.observe_finished(_summary(living, reason, now_s))


def _empty_completion(index: int, params: SamplingParams) -> CompletionOutput:
    wants_logprobs = params.logprobs is not None
    return CompletionOutput(
        index=index, logprobs=[] if wants_logprobs else None, cumulative_logprob=0.0 if wants_logprobs else None
    )


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
