"""Soak test: requests arrive at random, many are cancelled, and pages run out again and again.

It checks that every token belongs to an unfinished request, that requests end as they should, that scheduler and pages
agree at all times, and that everything is free at the end. It also checks that greedy tokens do not depend on the other
requests. The same code runs on a CPU (`tests/integration`) and, for longer, on a GPU (`tests/gpu`).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanoflow.config import DType, EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.engine.engine import Engine
from nanoflow.engine.messages import PlaceLogprobs, StepOutput
from nanoflow.outputs import Finished, FinishReason
from nanoflow.request import Request, SamplingParams
from tests.driving import expect_less

MAX_PROMPT = 400
# Longest outputs in alternating periods: admission learns to expect short ones and is then wrong.
LONGEST_OUTPUTS = (10, 200)
NUM_RUN_ALONE = 20
# Pages for about 10 requests of average length.
_ENGINE_OPTIONS: Mapping[str, Any] = {
    "page_size": 8,
    "num_pages": 300,
    "max_model_len": 640,
    "max_num_seqs": 48,
    "max_batch_tokens": 256,
}
# Ids are reused as soon as they are free, so a late token would be counted for the wrong request.
_MAX_LIVING = 40
_UNKNOWN_ID = 10**6
_NUM_REMEMBERED = 500
# Probabilities per iteration.
_ARRIVAL, _CANCELLATION, _LULL = 0.5, 0.1, 1 / 100
_CHECK_INTERVAL = 50
_MIN_ITERATIONS = 300
# Adding in another order changes log probabilities by less than a tenth of this.
_TIE_NATS = 1e-3
_SAMPLED: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.7, "logprobs": 2},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.05, "stop_token_ids": range(20, 60)},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logit_bias": {7: 2.0}, "prompt_logprobs": 1, "allowed_token_ids": range(100)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport:
    """Results of a soak test.

    Attributes:
        num_iterations: Steps of the engine.
        num_finished, num_cancelled: Requests, without those that ran alone.
        num_lulls: How often the engine ran out of requests.
        num_preemptions: How often a request lost its pages.
        num_compared: Greedy requests that ran again, alone, and gave the same tokens.
        num_ties: How many of them took the other of two tokens with equal logits, and were equal up to there.
    """

    num_iterations: int
    num_finished: int
    num_cancelled: int
    num_lulls: int
    num_preemptions: int
    num_compared: int
    num_ties: int


def soak(folder: Path, *, device: str, dtype: DType, duration_s: float, seed: int = 0) -> SoakReport:
    """Load the model, run the test and make all checks; greedy tokens are only compared in float32."""
    config = EngineConfig(model=str(folder), device=device, dtype=dtype, **_ENGINE_OPTIONS)
    engine = build_engine(config)
    expect_less(engine, 4)
    try:
        traffic = _Traffic(engine, seed)
        traffic.run(duration_s)
        traffic.abort_all()
        num_preemptions = engine.stats().num_preemptions
        chosen = traffic.choose(NUM_RUN_ALONE) if dtype == "float32" else []
        num_ties = sum(not _runs_alone_alike(engine, life) for life in chosen)
        _assert_idle(engine)
    finally:
        engine.close()
    return SoakReport(
        num_iterations=traffic.num_iterations,
        num_finished=traffic.num_finished,
        num_cancelled=traffic.num_cancelled,
        num_lulls=traffic.num_lulls,
        num_preemptions=num_preemptions,
        num_compared=len(chosen),
        num_ties=num_ties,
    )


def make_soak_model(folder: Path) -> Path:
    """A tiny random Llama with heads of 64, whose weights are wide enough that greedy tokens vary; no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=192,
        vocab_size=1009,
        max_position_embeddings=1024,
        eos_token_id=2,
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@dataclass(slots=True, kw_only=True)
class _Life:
    """A request and its results."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    is_preempted: bool = False


class _Traffic:
    """Adds requests, aborts some, and checks what comes back."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.num_iterations = self.num_finished = self.num_cancelled = self.num_lulls = 0
        self._engine = engine
        self._rng = random.Random(seed)
        self._longest_output = LONGEST_OUTPUTS[0]
        self._living: dict[int, _Life] = {}
        # The last greedy requests that ran to the end.
        self._whole: deque[_Life] = deque(maxlen=_NUM_REMEMBERED)

    def run(self, duration_s: float) -> None:
        """Run for `duration_s` seconds, or longer on a slow machine, until something of everything has happened."""
        deadline_s, is_lull = time.monotonic() + duration_s, False
        while time.monotonic() < deadline_s or self.num_iterations < _MIN_ITERATIONS:
            if not is_lull and self._rng.random() < _ARRIVAL:
                self._arrive()
            if self._rng.random() < _CANCELLATION:
                self._cancel()
            if self._engine.has_work:
                self._take(self._engine.step())
            elif is_lull:
                _assert_idle(self._engine)
                self.num_lulls += 1
                self._longest_output = LONGEST_OUTPUTS[self.num_lulls % 2]
                is_lull = False
            is_lull |= self._rng.random() < _LULL
            if self.num_iterations % _CHECK_INTERVAL == 0:
                self._engine.check_integrity()

    def abort_all(self) -> None:
        """Abort the remaining requests; no token may arrive for them."""
        self._engine.abort(list(self._living))
        assert self._engine.stats().pages_in_use == 0
        self._living.clear()
        while self._engine.has_work:
            self._take(self._engine.step())
        _assert_idle(self._engine)

    def choose(self, count: int) -> list[_Life]:
        """Up to `count` greedy requests that ran to the end, half of them preempted if there are enough."""
        lives = self._rng.sample(list(self._whole), len(self._whole))
        preempted = [life for life in lives if life.is_preempted][: count // 2]
        return preempted + [life for life in lives if life not in preempted][: count - len(preempted)]

    def _arrive(self) -> None:
        for _ in range(self._rng.randint(1, 5)):
            if len(self._living) < _MAX_LIVING:
                request = self._make_request()
                self._living[request.request_id] = _Life(request=request)
                self._engine.add(request)

    def _make_request(self) -> Request:
        rng, facts = self._rng, self._engine.facts
        max_tokens = rng.randint(1, self._longest_output)
        options = {"temperature": 0.0} if rng.random() < 0.5 else rng.choice(_SAMPLED)
        return Request(
            request_id=rng.choice([number for number in range(_MAX_LIVING) if number not in self._living]),
            prompt_token_ids=[rng.randrange(4, facts.vocab_size) for _ in range(rng.randint(1, MAX_PROMPT))],
            # Without `ignore_eos`, admission has to guess the lengths, and is wrong.
            params=SamplingParams(max_tokens=max_tokens, **options),
            seed=rng.getrandbits(32),
            max_tokens=max_tokens,
            eos_token_ids=facts.eos_token_ids,
            # Greedy requests are compared by the two most probable tokens, so none may be forbidden.
            bad_word_ids=self._bad_words() if options["temperature"] else (),
        )

    def _bad_words(self) -> tuple[tuple[int, ...], ...]:
        """Some tokens and sequences of tokens."""
        rng, vocab_size = self._rng, self._engine.facts.vocab_size
        lengths = (rng.choice((1, 2, 2, 3)) for _ in range(rng.randint(1, 30)))
        return tuple(tuple(rng.randrange(4, vocab_size) for _ in range(length)) for length in lengths)

    def _cancel(self) -> None:
        if self._living:
            request_id = self._rng.choice(list(self._living))
            self._engine.abort([request_id, _UNKNOWN_ID])
            del self._living[request_id]
            self.num_cancelled += 1

    def _take(self, output: StepOutput) -> None:
        """Record tokens and ends; a token for an unknown request raises KeyError."""
        self.num_iterations += 1
        for request_id in output.preempted:
            self._living[request_id].is_preempted = True
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            self._living[request_id].token_ids.append(token_id)
        for request_id, finished in output.finished.items():
            life = self._living.pop(request_id)
            _assert_ended_well(life, finished)
            self.num_finished += 1
            if life.request.params.is_greedy:
                self._whole.append(life)


def _assert_ended_well(life: _Life, finished: Finished) -> None:
    """Check that a request ended at its length, or at the first token that ends it."""
    request, token_ids = life.request, life.token_ids
    ends = {*request.eos_token_ids, *(request.params.stop_token_ids or ())}
    is_stop = token_ids[-1] in ends
    assert finished.reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH), finished
    assert is_stop or len(token_ids) == request.max_tokens
    assert len(token_ids) <= request.max_tokens and not ends & set(token_ids[:-1])


def _assert_idle(engine: Engine) -> None:
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_in_use) == (0, 0, 0)


def _runs_alone_alike(engine: Engine, life: _Life) -> bool:
    """Whether the request gives the same tokens alone; False if they differ after a tie of the most probable two."""
    engine.add(replace(life.request, params=replace(life.request.params, logprobs=2)))
    places: list[PlaceLogprobs] = []
    while engine.has_work:
        places += engine.step().logprobs.values()
    alone = [place.token_ids[0][0] for place in places]
    if alone == life.token_ids:
        return True
    parting = next(i for i, pair in enumerate(zip(alone, life.token_ids, strict=False)) if pair[0] != pair[1])
    (_, first, second), (_, likely, next_likely) = places[parting].token_ids[0], places[parting].logprobs[0]
    assert {alone[parting], life.token_ids[parting]} == {first, second}, f"token {parting} of {life.request}"
    assert likely - next_likely < _TIE_NATS, f"token {parting} of {life.request}"
    return False
