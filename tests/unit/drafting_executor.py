"""The fake executor for batches with drafts: it draws behind every token of a draft, right or wrong.

What it remembers of a request afterwards are the tokens that the request would have got one by one: should the
scheduler count others, the next batch does not fit to what is in the simulated cache.
"""

from __future__ import annotations

from nanoflow.batch import DenseBatch, Joined
from nanoflow.scheduler import SchedulerLimits
from tests.unit.fake_executor import FakeExecutor, Model, choose_token


def repetitive_token(seed: int, tokens: list[int], vocab_size: int, forbidden: tuple[int, ...]) -> int:
    """A model that repeats itself, and changes its mind every eleven tokens."""
    return choose_token(seed, [tokens[-1], len(tokens) // 11], vocab_size, forbidden)


def periodic_token(seed: int, tokens: list[int], vocab_size: int, forbidden: tuple[int, ...]) -> int:
    """A model that counts to seven again and again."""
    del seed, vocab_size, forbidden
    return (tokens[-1] + 1) % 7


class DraftingExecutor(FakeExecutor):
    """`FakeExecutor` that knows drafts."""

    def __init__(self, limits: SchedulerLimits, model: Model = repetitive_token) -> None:
        super().__init__(limits)
        self.model = model
        self.num_draft_tokens = 0

    def guessed(self, batch: DenseBatch, index: int) -> list[int]:
        """Tokens of a request in the batch that it has not got: a draft."""
        known = len(self.tenants[int(batch.rows[index])].tokens)
        span = range(int(batch.query_start[index]), int(batch.query_start[index + 1]))
        return [int(batch.token_ids[place]) for place in span if batch.positions[place] >= known]

    def check_context(self, batch: DenseBatch, index: int) -> None:
        tenant, guessed = self.tenants[int(batch.rows[index])], self.guessed(batch, index)
        num_draws = batch.sampled.tolist().count(index)
        assert num_draws == (1 + len(guessed) if tenant.num_computed >= len(tenant.tokens) else 0)
        assert not guessed or index >= batch.num_decodes
        known, tenant.tokens = tenant.tokens, tenant.tokens + guessed
        super().check_context(batch, index)
        tenant.tokens = known

    def draw(self, batch: DenseBatch) -> list[int]:
        num_guessed = [len(self.guessed(batch, index)) for index in range(batch.num_requests)]
        assert batch.num_draft_tokens == sum(num_guessed) == len(batch.sampled) - len(set(batch.sampled.tolist()))
        assert batch.num_drafted_requests == sum(count > 0 for count in num_guessed)
        draws: list[int] = []
        for index in dict.fromkeys(batch.sampled.tolist()):
            tenant, guessed = self.tenants[int(batch.rows[index])], self.guessed(batch, index)
            self.num_draft_tokens += len(guessed)
            known = list(tenant.tokens)
            drawn = [self.choose(tenant.joined, known + guessed[:count]) for count in range(len(guessed) + 1)]
            tenant.tokens.append(drawn[0])
            for guess, token, following in zip(guessed, drawn, drawn[1:], strict=False):
                if guess != token:
                    break
                tenant.tokens.append(following)
            tenant.num_computed = len(tenant.tokens) - 1
            draws += drawn
        return draws

    def choose(self, joined: Joined, tokens: list[int]) -> int:
        may_stop = len(tokens) - joined.num_prompt_tokens >= joined.params.min_tokens
        return self.model(joined.seed, tokens, self.limits.vocab_size, () if may_stop else joined.stop_token_ids)
