"""From the engine's step outputs to what users read: text, log probabilities, finish reasons, times.

`OutputProcessor` keeps the requests of a front end that have not ended. It makes `n` requests of the engine from one
prompt and collects their tokens in one output, which grows in place. An iteration costs little here: its tokens are
only stored, and become text when the output is read (`refresh`) or ends. Only requests with stop strings need their
text in every iteration. `llm.py` and `async_engine.py` carry requests to the engine and step outputs back.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

from nanoflow.engine.completion import Completion
from nanoflow.engine.detokenize import make_detokenizer
from nanoflow.engine.embeddings import numbers_of
from nanoflow.engine.living import LivingRequest
from nanoflow.engine.messages import EngineFacts, StepOutput
from nanoflow.engine.observer import Observer
from nanoflow.engine.prompts import Prompt, end_of_sequence, make_requests, read_bad_words, truncated
from nanoflow.engine.reasoning import thinking_limit
from nanoflow.engine.stop_special import StopRules
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.outputs import (
    CompletionOutput,
    Finished,
    FinishReason,
    LogprobRows,
    PromptLogprobRows,
    RequestMetrics,
    RequestOutput,
    TokenText,
)
from nanoflow.parameters import shown
from nanoflow.request import Request, RequestError, SamplingParams

logger = logging.getLogger(__name__)

# Size of the caches: of search trees by list of stop strings, and of tokens by list of bad words.
_NUM_WORD_LISTS = 64
_FAILURE = "its answer could not be made of its tokens; the log says why"


class OutputProcessor:
    """The requests of one front end that have not ended.

    Args:
        facts: Facts of the engine.
        tokenizer: Makes text of tokens; with None only requests without text are served.
        seed: Seed from which requests without a seed draw theirs.
        has_text: False makes no text for any request, whatever its parameters say.
        clock: Seconds, monotonic.

    Raises:
        TokenizerError: The tokenizer ends sequences with a token id that the model does not have.

    Attributes:
        observer: Is told of times and counts; None if there is none.
        num_generated_tokens: Tokens that outputs have got since the start, without those after a stop string.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tokenizer: Tokenizer | None,
        *,
        seed: int = 0,
        has_text: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.observer: Observer | None = None
        self.num_generated_tokens = 0
        self._facts = facts
        self._tokenizer = tokenizer
        self._has_text = has_text
        self._eos_token_ids = end_of_sequence(facts, tokenizer)
        self._random = random.Random(seed)
        self._clock = clock
        self._next_engine_id = 0
        self._living: dict[str, LivingRequest] = {}
        self._completions: dict[int, Completion] = {}
        self._stopped: list[int] = []
        self._stop_rules = lru_cache(_NUM_WORD_LISTS)(self._read_stops)
        self._bad_words = lru_cache(_NUM_WORD_LISTS)(partial(read_bad_words, tokenizer=tokenizer))

    def __len__(self) -> int:
        """Number of requests that have not ended."""
        return len(self._living)

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> tuple[RequestOutput, list[Request]]:
        """Add a request.

        Returns:
            Its output, which grows in place from now on, and the `params.n` requests to hand to the engine.

        Raises:
            RequestError: The id is in use, the prompt does not fit, or a token id does not exist.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(f"how to sample must be SamplingParams, got {shown(params)}")
        # A copy, since the user may change the parameters while the request runs.
        params = params.snapshot() if self._has_text else dataclasses.replace(params, detokenize=False)
        if request_id in self._living:
            raise RequestError(f"a request with id {request_id!r} is already there")
        if self._tokenizer is None and (params.detokenize or params.structured_outputs is not None):
            raise RequestError("this model has no tokenizer: set detokenize=False, and ask for no structured outputs")
        metrics = RequestMetrics(arrival_s=self._clock())
        prompt = truncated(prompt, params, self._facts)
        requests = make_requests(
            prompt,
            params,
            facts=self._facts,
            first_id=self._next_engine_id,
            first_seed=self._random.getrandbits(64) if params.seed is None else params.seed,
            eos_token_ids=self._eos_token_ids,
            bad_word_ids=self._bad_words(tuple(params.bad_words or ())),
            thinking=thinking_limit(prompt, params, self._tokenizer),
            arrival_s=metrics.arrival_s,
        )
        self._next_engine_id += params.n
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids,
            outputs=[CompletionOutput(index=index) for index in range(params.n)],
            metrics=metrics,
        )
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = PromptLogprobRows(len(prompt.token_ids), self._token_text(params))
        living = LivingRequest(output=output, metrics=metrics, params=params)
        for request, completion in zip(requests, output.outputs, strict=True):
            living.running[request.request_id] = self._new_completion(request, living, completion)
        # Only now, when nothing can fail any more.
        self._living[request_id] = living
        self._completions.update(living.running)
        return output, requests

    def abort(self, request_id: str) -> list[int]:
        """End a request with reason "abort"; return the engine's ids to abort there, none for an unknown request."""
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
        """The engine's ids of requests that a stop string or a failure ended since the last call: abort them there."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def process(self, step: StepOutput) -> list[RequestOutput]:
        """Add the tokens of an iteration to the outputs.

        Returns:
            The outputs that grew or ended, each once. Those that are `finished` are complete. The text of the others,
            and the log probabilities of their prompts, are brought up to date by `refresh`.
        """
        now_s = self._clock()
        self._note_progress(step, now_s)
        grown: dict[str, RequestOutput] = {}
        searched: dict[int, Completion] = {}
        gaps_s: list[float] = []
        num_first = 0
        find = self._completions.get
        # Runs for every token, so it is short: work for some tokens only is done after the loop.
        for engine_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
            completion = find(engine_id)
            if completion is None:
                continue
            completion.token_ids.append(token_id)
            last_s = completion.last_token_s
            if last_s is not None:
                gaps_s.append(now_s - last_s)
            else:
                num_first += 1
                if completion.metrics.first_token_s is None:
                    self._note_first_token(completion, now_s)
            completion.last_token_s = completion.metrics.last_token_s = now_s
            if completion.stops is not None:
                searched[engine_id] = completion
            grown[completion.name] = completion.request_output
        num_cut = sum(len(completion.token_ids) for completion in searched.values())
        ended_here = self._search(searched, step) | self._add_scores(step)
        num_cut -= sum(len(completion.token_ids) for completion in searched.values())
        num_new_tokens = num_first + len(gaps_s) - num_cut
        self.num_generated_tokens += num_new_tokens
        for engine_id, end in ended_here.items():
            self._finish(self._completions[engine_id], end, now_s)
        self._stopped += [engine_id for engine_id in ended_here if engine_id not in step.finished]
        for engine_id, end in step.finished.items():
            completion = find(engine_id)
            if completion is not None:
                self._finish(completion, end, now_s)
                grown[completion.name] = completion.request_output
        if self.observer is not None and (gaps_s or num_first):
            self.observer.observe_tokens(num_new_tokens)
            self.observer.observe_next_tokens(gaps_s)
        return list(grown.values())

    def refresh(self, output: RequestOutput) -> None:
        """Make text of all tokens of an output; to be called before the output is shown.

        Nothing happens if no tokens wait. A completion whose text cannot be made ends with an error.
        """
        living = self._living.get(output.request_id)
        # After a request has ended, another one may have the same name.
        if living is None or living.output is not output:
            return
        self._read_prompt_scores(living)
        living.count_tokens()
        for completion in list(living.running.values()):
            try:
                completion.refresh()
            except Exception as error:
                self._stopped.append(completion.engine_id)
                self._finish(completion, _failure(completion, error), self._clock())

    def _search(self, searched: Mapping[int, Completion], step: StepOutput) -> dict[int, Finished]:
        """Look for stop strings; return the ends of completions that have one, or that fail."""
        ends = {}
        for engine_id, completion in searched.items():
            try:
                if completion.find_stop(step.finished.get(engine_id)):
                    ends[engine_id] = Finished(reason=FinishReason.STOP)
            except Exception as error:
                ends[engine_id] = _failure(completion, error)
        return ends

    def _add_scores(self, step: StepOutput) -> dict[int, Finished]:
        """Add log probabilities to completions; return the ends of those that fail."""
        ends = {}
        for engine_id, scores in step.logprobs.items():
            completion = self._completions.get(engine_id)
            if completion is None:
                continue
            try:
                completion.add_scores(scores)
            except Exception as error:
                ends[engine_id] = _failure(completion, error)
        return ends

    def _new_completion(self, request: Request, living: LivingRequest, output: CompletionOutput) -> Completion:
        params, detokenizer = living.params, None
        if params.detokenize and self._tokenizer is not None:
            detokenizer = make_detokenizer(self._tokenizer, request.prompt_token_ids, params.skip_special_tokens)
        rules = self._stop_rules(tuple(params.stop), params.skip_special_tokens) if params.stop else None
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
            stops=None if rules is None else rules.new_filter(keeps_stop=params.include_stop_str_in_output),
            marks={} if rules is None else rules.marks,
            logprobs=rows,
        )

    def _read_stops(self, stops: tuple[str, ...], skip_special_tokens: bool) -> StopRules:
        tokenizer = self._tokenizer
        return StopRules(stops, tokenizer.special_names if tokenizer is not None and skip_special_tokens else None)

    def _token_text(self, params: SamplingParams) -> TokenText:
        return self._tokenizer.token_text if self._tokenizer is not None and params.detokenize else _no_text

    def _note_progress(self, step: StepOutput, now_s: float) -> None:
        """Note everything in a step except tokens and ends: state, admissions, preemptions, prompt scores."""
        if self.observer is not None and step.stats.iteration_tokens > 0:
            self.observer.observe_step(step.stats)
        for engine_id, num_cached in step.scheduled.items():
            completion = self._completions.get(engine_id)
            if completion is not None and completion.metrics.first_scheduled_s is None:
                completion.metrics.first_scheduled_s = now_s
                completion.request_output.num_cached_tokens = num_cached
        for engine_id in filter(self._completions.__contains__, step.preempted):
            self._completions[engine_id].metrics.num_preemptions += 1
        for engine_id, scores in step.prompt_logprobs.items():
            if engine_id in self._completions:
                self._living[self._completions[engine_id].name].prompt_scores.append(scores)
        for engine_id in filter(self._completions.__contains__, step.pooled):
            self._completions[engine_id].request_output.embedding = numbers_of(step.pooled[engine_id])

    def _note_first_token(self, completion: Completion, now_s: float) -> None:
        metrics = completion.metrics
        metrics.first_token_s = now_s
        if self.observer is not None:
            num_prompt_tokens = len(completion.request_output.prompt_token_ids)
            self.observer.observe_first_token(now_s - metrics.arrival_s, num_prompt_tokens)

    def _read_prompt_scores(self, living: LivingRequest) -> None:
        if not living.prompt_scores:
            return
        try:
            living.read_prompt_scores()
        except Exception:
            logger.exception("the log probabilities of the prompt of %s could not be read", living.output.request_id)
            living.output.error = _FAILURE

    def _finish(self, completion: Completion, end: Finished, now_s: float) -> None:
        """End a completion, and its request if it was the last one running."""
        try:
            completion.finish(end)
        except Exception as error:
            end = _failure(completion, error)
            completion.fail(end)
        living = self._living[completion.name]
        living.output.error = end.error or living.output.error
        del self._completions[completion.engine_id], living.running[completion.engine_id]
        if not living.running:
            self._finish_request(living, end.reason, now_s)

    def _finish_request(self, living: LivingRequest, reason: FinishReason, now_s: float) -> None:
        """End a request. It has failed if any of its completions has."""
        self._read_prompt_scores(living)
        reason = FinishReason.ERROR if living.output.error is not None else reason
        living.metrics.finished_s = now_s
        living.count_tokens()
        living.output.finished = True
        del self._living[living.output.request_id]
        if self.observer is not None:
            self.observer.observe_finished(living.summary(reason, now_s))


def _failure(completion: Completion, error: Exception) -> Finished:
    """The end of a completion for which text or log probabilities could not be made; other requests go on.

    The exception is logged, unless it is a RequestError.
    """
    if isinstance(error, RequestError):
        return Finished(reason=FinishReason.ERROR, error=str(error))
    logger.error("request %s failed", completion.name, exc_info=error)
    return Finished(reason=FinishReason.ERROR, error=_FAILURE)


def _no_text(_token_id: int) -> None:
    return None
