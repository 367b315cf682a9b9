"""Rows with a grammar, against plain Python: which tokens each may choose, whatever joins and leaves around it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow.batch import Joined
from nanoflow.config import EngineConfig
from nanoflow.engine.tokenizer import Tokenizer
from nanoflow.engine.vocabulary import vocabulary_of
from nanoflow.executor.constraints import Constraints
from nanoflow.executor.sampler import Sampler
from nanoflow.grammars.compiled import Grammars
from nanoflow.request import Request, SamplingParams
from nanoflow.scheduler.forced import ForcedRuns
from tests.graphs import batch_of

CPU = torch.device("cpu")
CONFIG = EngineConfig()
# Some columns more than the tokenizer has tokens, and no multiple of 32.
VOCAB_SIZE, EOS, OTHER_EOS = 2057, 0, 1
WORDS = ("red", "reddish", "green", "greenhouse", "blue sky", "grün")


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    tokenizer = Tokenizer.load(CONFIG)
    special = set(tokenizer.special_names.values())
    texts = [b"" if i in special else tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size)]
    return texts + [b""] * (VOCAB_SIZE - len(texts))


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(lambda: vocabulary_of(CONFIG, (EOS, OTHER_EOS, 2055), VOCAB_SIZE))
    yield made
    made.close()


@dataclass
class Tenant:
    """A request in a row, as plain Python sees it."""

    row: int
    choices: tuple[str, ...]
    tokens: list[bytes]
    generated: list[int] = field(default_factory=list)
    has_ended: bool = False

    def joined(self) -> Joined:
        return joined(self.row, {"choice": self.choices} if self.choices else None, self.generated)

    @property
    def text(self) -> bytes:
        return b"".join(self.tokens[token_id] for token_id in self.generated)

    @property
    def is_forced(self) -> bool:
        """Whether the next byte can be but one."""
        text, whole = self.text, [choice.encode() for choice in self.choices]
        return text not in whole and len({each[len(text)] for each in whole if each.startswith(text)}) == 1

    def allowed(self) -> set[int]:
        text, tokens = self.text, self.tokens
        whole = [choice.encode() for choice in self.choices]
        fitting = {
            token_id
            for token_id, more in enumerate(tokens)
            if more and any(choice.startswith(text + more) for choice in whole)
        }
        return fitting | ({EOS, OTHER_EOS} if text in whole else set())


def joined(row: int, structured: Any, generated: Sequence[int] = ()) -> Joined:
    return Joined(
        row=row,
        params=SamplingParams(structured_outputs=structured),
        seed=row,
        token_ids=np.array([5, 6, *generated], np.int32),
        num_prompt_tokens=2,
        stop_token_ids=(EOS,),
    )


def constraints_of(grammars: Grammars, num_rows: int = 4) -> Constraints:
    return Constraints(num_rows=num_rows, vocab_size=VOCAB_SIZE, device=CPU, grammars=grammars)


def allowed_by(words: torch.Tensor) -> set[int]:
    bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@pytest.mark.parametrize("rows_of_a_copy", [1, 16])
def test_masks_are_those_of_plain_python(
    rows_of_a_copy: int, grammars: Grammars, tokens: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoflow.executor.constraints._ROWS_OF_A_COPY", rows_of_a_copy)
    rng = random.Random(3)
    constraints, tenants = constraints_of(grammars), dict[int, Tenant]()
    num_masks = num_must_end = num_replaced = 0
    for _ in range(150):
        newcomers = []
        for row in range(4):
            if row not in tenants or rng.random() < 0.15:
                num_replaced += row in tenants
                choices = tuple(rng.sample(WORDS, 3)) if rng.random() < 0.7 else ()
                # A request that comes back after a preemption has tokens already.
                before = (
                    [rng.choice(sorted(Tenant(row, choices, tokens).allowed()))]
                    if choices and rng.random() < 0.3
                    else []
                )
                tenants[row] = Tenant(row, choices, tokens, before)
                newcomers.append(tenants[row].joined())
        assert constraints.join(newcomers) == {}
        rows = np.array(rng.sample(range(4), rng.randint(1, 4)), np.int32)
        masks = constraints.masks(rows)
        assert masks.errors == {}
        drawn = []
        for place, row in enumerate(rows.tolist()):
            tenant, number = tenants[row], int(masks.numbers[place])
            assert (number > 0) == (bool(tenant.choices) and not tenant.has_ended)
            options = set(range(VOCAB_SIZE)) if not number else allowed_by(masks.words[number - 1])
            if number:
                fitting = tenant.allowed()
                # Where the text is forced, the one token that its tokenizer would take.
                assert options == fitting or (len(options) == 1 and options < fitting and tenant.is_forced)
                assert masks.must_end[place] == (options == {EOS, OTHER_EOS})
                num_masks, num_must_end = num_masks + 1, num_must_end + int(masks.must_end[place])
            drawn.append(rng.choice(sorted(options)))
            tenant.has_ended = tenant.has_ended or drawn[-1] in (EOS, OTHER_EOS)
            tenant.generated.append(drawn[-1])
        constraints.note(torch.tensor(drawn))
    assert num_masks > 100 and num_must_end > 10 and num_replaced > 5


def test_nothing_waits_without_a_grammar(grammars: Grammars) -> None:
    constraints = constraints_of(grammars)
    constraints.join([joined(0, None)])
    rows = np.zeros(1, np.int32)
    masks = constraints.masks(rows)
    constraints.note(torch.tensor([5]))
    assert constraints._pending is None
    assert masks.numbers.tolist() == [0] and not masks.must_end.any() and not constraints._executors


def test_a_grammar_that_fails_ends_its_request_alone(grammars: Grammars, tokens: list[bytes]) -> None:
    constraints = constraints_of(grammars)
    # Each rule is twice the next: its automaton is larger than any.
    rules = "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(20)) + 'A20: "x"\n'
    errors = constraints.join(
        [
            joined(0, {"grammar": "start: ("}),
            joined(1, {"grammar": f'start: "y" A0\n{rules}'}),
            joined(2, {"regex": "ab"}),
        ]
    )
    assert list(errors) == [0] and errors[0].startswith("its structured output failed: ")
    rows, y, a = np.array([0, 1, 2], np.int32), tokens.index(b"y"), tokens.index(b"a")
    assert constraints.masks(rows).errors == {}
    constraints.note(torch.tensor([a, y, a]))
    masks = constraints.masks(rows)
    assert list(masks.errors) == [1] and "too many expressions" in masks.errors[1] and "\n" not in masks.errors[1]
    assert masks.numbers[0] == 0 and allowed_by(masks.words[masks.numbers[2] - 1])


def test_without_a_tokenizer_requests_with_a_grammar_fail() -> None:
    grammars = Grammars(lambda: vocabulary_of(EngineConfig(skip_tokenizer_init=True), (EOS,), VOCAB_SIZE))
    assert constraints_of(grammars).join([joined(0, {"regex": "a"}), joined(1, None)]) == {
        0: "its structured output failed: this model has no tokenizer"
    }
    grammars.close()
    alone = Constraints(num_rows=1, vocab_size=VOCAB_SIZE, device=CPU, grammars=None)
    assert "needs a tokenizer" in alone.join([joined(0, {"regex": "a"})])[0]


def test_other_rows_draw_the_same(grammars: Grammars, tokens: list[bytes]) -> None:
    def drawn(structured: object, **params: object) -> list[list[int]]:
        sampler = Sampler(num_rows=3, vocab_size=VOCAB_SIZE, device=CPU, grammars=grammars)
        sampler.join([joined(0, None), joined(1, structured), joined(2, None)])
        batch, generator = batch_of([(4, 1)] * 3, 3, VOCAB_SIZE, seed=0), torch.Generator().manual_seed(0)
        logits = [torch.randn(3, VOCAB_SIZE, generator=generator) for _ in range(6)]
        return [sampler.sample(batch, each).token_ids.tolist() for each in logits]

    free, held = drawn(None), drawn({"choice": ["abc", "abd"]})
    assert [[one[0], one[2]] for one in free] == [[one[0], one[2]] for one in held]
    text = b"".join(tokens[one[1]] for one in held)
    assert text.startswith((b"abc", b"abd")), text


def test_masks_of_drafts_are_those_behind_their_tokens(grammars: Grammars) -> None:
    """The tokens of a completion one by one, then again with drafts that are right up to some place, or all along."""
    rng, shape = random.Random(5), {"regex": "(red|green|blue sky)[a-d]{12,}!"}
    row, alone = np.zeros(1, np.int32), constraints_of(grammars, 2)
    alone.join([joined(0, shape)])
    path: list[int] = []
    allowed: list[set[int]] = []
    while not path or path[-1] not in (EOS, OTHER_EOS):
        allowed.append(allowed_by(alone.masks(row).words[0]))
        path.append(rng.choice(sorted(allowed[-1])))
        alone.note(torch.tensor(path[-1:]))
    for _ in range(8):
        drafted, place = constraints_of(grammars, 2), 0
        drafted.join([joined(0, shape), joined(1, None)])
        while place < len(path):
            draft = path[place : place + rng.randint(0, 4)]
            num_right = rng.randint(0, len(draft))
            if num_right < len(draft):
                draft[num_right] = 5 if path[place + num_right] != 5 else 6
            rows = np.array([0] * (len(draft) + 1) + [1], np.int32)
            followed_by = np.array([*draft, 9, 9], np.int32)
            masks = drafted.masks(rows, followed_by)
            assert masks.numbers.tolist() == [*range(1, len(draft) + 2), 0] and not masks.errors
            count = min(num_right + 1, len(path) - place)
            assert [allowed_by(words) for words in masks.words[:count]] == allowed[place : place + count]
            drawn = (path[place : place + count] + [5] * len(rows))[: len(rows)]
            drafted.note(torch.tensor(drawn))
            place += count
        assert drafted.masks(row).numbers.tolist() == [0]


def test_forced_runs_follow_what_is_known(grammars: Grammars, tokens: list[bytes]) -> None:
    runs, a = ForcedRuns(grammars.matcher_or_none), tokens.index(b"a")
    request = Request(
        request_id=0,
        prompt_token_ids=[5, 6],
        params=joined(0, {"regex": "[ab]-the only way[ab]"}).params,
        seed=0,
        max_tokens=9,
    )
    assert runs.join(3, request) and not runs.join(4, dataclasses.replace(request, params=SamplingParams()))
    known = [5, 6]
    assert not len(runs.run(3, np.array(known, np.int32), 8)) and not len(runs.run(4, np.array(known, np.int32), 8))
    forced = runs.run(3, np.array([*known, a], np.int32), 8).tolist()
    assert b"".join(tokens[each] for each in forced) == b"-the only way"
    assert runs.run(3, np.array([*known, a, forced[0]], np.int32), 2).tolist() == forced[1:3]
    # What the grammar does not take ends the row's runs.
    assert not len(runs.run(3, np.array([*known, a, forced[0], a], np.int32), 8))
    bad = dataclasses.replace(request, params=joined(0, {"grammar": "start: ("}).params)
    assert not runs.join(3, bad)


def test_matchers_that_wait_for_each_other_share_a_thread(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    constraints, rows = constraints_of(grammars, 8), np.arange(8, dtype=np.int32)
    constraints.join([joined(row, {"choice": WORDS}) for row in rows.tolist()])
    constraints.masks(rows)
    assert list(constraints._executors) == [1]
    constraints.join([joined(row, {"choice": (WORDS[row], "other")}) for row in range(5)])
    constraints.masks(rows)
    assert list(constraints._executors) == [1, 4], "six grammars, and a power of two"
