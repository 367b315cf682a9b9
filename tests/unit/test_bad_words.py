"""Tokens that may not be chosen: allowed ones, single ones, and the last ones of sequences, against plain Python."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoflow.batch import DenseBatch, Joined
from nanoflow.executor.bad_words import BadWords, bad_word_bytes
from nanoflow.executor.readback import PendingTokens
from nanoflow.executor.sampler import Sampler
from nanoflow.executor.sampling_state import SamplingState, table_bytes
from nanoflow.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from tests.graphs import batch_of

VOCAB_SIZE = 12
CPU = torch.device("cpu")

Words = tuple[tuple[int, ...], ...]


@dataclass
class Tenant:
    """A request in a row, as plain Python sees it."""

    row: int
    params: SamplingParams
    words: Words
    prompt: list[int]
    generated: list[int] = field(default_factory=list)

    def joined(self) -> Joined:
        return Joined(
            row=self.row,
            params=self.params,
            seed=7,
            token_ids=np.array([*self.prompt, *self.generated], np.int32),
            num_prompt_tokens=len(self.prompt),
            stop_token_ids=(),
            bad_word_ids=self.words,
        )

    def forbidden(self) -> set[int]:
        tokens = self.generated
        ends = {word[-1] for word in self.words if list(word[:-1]) == tokens[len(tokens) - len(word) + 1 :]}
        allowed = self.params.allowed_token_ids
        return ends | (set() if allowed is None else set(range(VOCAB_SIZE)) - set(allowed))


def random_tenant(rng: random.Random, row: int) -> Tenant:
    words = tuple(
        tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 2, 3, 5]))) for _ in range(rng.randrange(20))
    )
    allowed = rng.sample(range(VOCAB_SIZE), rng.randint(3, VOCAB_SIZE)) if rng.random() < 0.5 else None
    params = SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        allowed_token_ids=allowed,
        frequency_penalty=rng.choice([0.0, 0.0, -0.5]),
        top_k=rng.choice([0, 5]),
    )
    return Tenant(row, params, words if rng.random() < 0.8 else (), [rng.randrange(VOCAB_SIZE) for _ in range(3)])


def batch_for(tenants: list[Tenant]) -> DenseBatch:
    made = batch_of([(len(one.prompt) + len(one.generated), 1) for one in tenants], len(tenants), VOCAB_SIZE, seed=0)
    made.rows[:] = [one.row for one in tenants]
    return made


@pytest.mark.parametrize("seed", range(12))
def test_rows_never_choose_what_is_forbidden_and_are_free_otherwise(seed: int) -> None:
    """Requests come, go, are preempted, and take each other's rows; what is chosen among the rest is as ever."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sampler, free = (Sampler(num_rows=8, vocab_size=VOCAB_SIZE, device=CPU) for _ in range(2))
    tenants: dict[int, Tenant] = {}
    for _ in range(60):
        joining = []
        for row in range(8):
            if row not in tenants or rng.random() < 0.05:
                tenants[row] = random_tenant(rng, row)
                joining.append(tenants[row])
            elif rng.random() < 0.05:  # preempted, and back
                joining.append(tenants[row])
        sampler.join([one.joined() for one in joining])
        drawn = rng.sample(list(tenants.values()), rng.randint(1, 8))
        drawn = [one for one in drawn if len(one.forbidden()) < VOCAB_SIZE]
        if not drawn:
            continue
        logits = torch.randn(len(drawn), VOCAB_SIZE, generator=generator)
        # The twin: nothing is forbidden, and no token could be chosen anyway.
        expected = logits.clone()
        for place, one in enumerate(drawn):
            expected[place, list(one.forbidden())] = -torch.inf
        free.join([_unrestricted(one) for one in drawn])
        batch = batch_for(drawn)
        token_ids = sampler.sample(batch, logits).token_ids
        assert token_ids.tolist() == free.sample(batch, expected).token_ids.tolist()
        for one, token_id in zip(drawn, token_ids.tolist(), strict=True):
            assert token_id not in one.forbidden()
            one.generated.append(token_id)


def _unrestricted(one: Tenant) -> Joined:
    params = SamplingParams(
        temperature=one.params.temperature, frequency_penalty=one.params.frequency_penalty, top_k=one.params.top_k
    )
    return Tenant(one.row, params, (), one.prompt, one.generated).joined()


def test_nobody_who_has_none_pays_for_words() -> None:
    words = BadWords(num_rows=1024, vocab_size=VOCAB_SIZE, device=CPU)
    assert sum(table.numel() for table in (words._before, words._last, words._recent)) == 0
    seen, rows = torch.zeros(1024, VOCAB_SIZE, dtype=torch.int16), np.arange(8, dtype=np.int32)
    words.join(range(8), [])
    words.mark(rows, seen)
    words.note(rows, torch.ones(8, dtype=torch.int64))
    assert not seen.any() and words._recent.numel() == 0


def test_the_largest_tables_are_counted() -> None:
    state = SamplingState(num_rows=2, vocab_size=4000, device=CPU)
    longest = [tuple(range(start, start + MAX_BAD_WORD_TOKENS)) for start in range(2 * MAX_BAD_WORDS)]
    state.join([Tenant(1, SamplingParams(), tuple(longest), [1]).joined()])
    tables = (state._bad_words._before, state._bad_words._last, state._bad_words._recent)
    assert sum(table.numel() * 4 for table in tables) <= bad_word_bytes(2)
    assert table_bytes(2, 4000) - table_bytes(1, 4000) > 2 * 4000 + bad_word_bytes(1)


def test_a_request_that_cannot_join_fails_alone(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Whatever is wrong with it: the others draw as ever, and the next tenant of its row does too."""
    sampler = Sampler(num_rows=4, vocab_size=VOCAB_SIZE, device=CPU)
    good = [Tenant(row, SamplingParams(temperature=0.0), (), [1]) for row in range(3)]
    bad = Tenant(3, SamplingParams(temperature=0.0), ((2**40,),), [1])
    sampler.join([bad.joined(), *(one.joined() for one in good)])
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    result = PendingTokens(sampler.sample(batch_for([*good, bad]), logits), ()).read()
    assert result.errors == {3: "its parameters cannot be taken in; the log says why"}
    assert result.token_ids[:3].tolist() == logits[:3].argmax(-1).tolist()
    assert "cannot be taken in" in caplog.text
    sampler.join([Tenant(3, SamplingParams(temperature=0.0), (), [1]).joined()])
    assert not PendingTokens(sampler.sample(batch_for([*good, bad]), logits), ()).read().errors


@pytest.mark.parametrize("words", [((0,), (1,), (2,)), ((0,), (1,), (2,), (5, 2))])
def test_a_row_that_may_choose_nothing_says_so(words: Words) -> None:
    sampler = Sampler(num_rows=1, vocab_size=VOCAB_SIZE, device=CPU)
    one = Tenant(0, SamplingParams(allowed_token_ids=[0, 1, 2]), words, [1])
    sampler.join([one.joined()])
    result = PendingTokens(sampler.sample(batch_for([one]), torch.zeros(1, VOCAB_SIZE)), ()).read()
    assert result.errors == {0: "there is no token that may be chosen"}


def test_log_probabilities_are_of_the_model_itself() -> None:
    sampler = Sampler(num_rows=1, vocab_size=VOCAB_SIZE, device=CPU)
    one = Tenant(0, SamplingParams(temperature=0.0, logprobs=1, allowed_token_ids=[3]), (), [1])
    sampler.join([one.joined()])
    logits: Tensor = torch.arange(12.0)[None]
    drawn = sampler.sample(batch_for([one]), logits)
    assert drawn.token_ids.tolist() == [3] and drawn.logprobs[0].tolist() == [[3, 11]]
    torch.testing.assert_close(drawn.logprobs[1][0], logits.log_softmax(-1)[0, [3, 11]])
