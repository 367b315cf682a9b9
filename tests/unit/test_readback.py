"""What comes back of an iteration: each place gets as many log probabilities as it wants, and its own error."""

from __future__ import annotations

import torch

from nanoflow.engine.logprobs import sampled_logprobs
from nanoflow.executor.readback import PendingTokens
from nanoflow.executor.sampler import Drawn


def drawn(best: list[float], places: list[tuple[int, int]]) -> Drawn:
    """Tokens 10, 11, ...; log probabilities of the widest place for all, as kernels give them."""
    width = 1 + max((num_top for _, num_top in places), default=0)
    shape = len(places), width
    ids = torch.arange(len(places) * width, dtype=torch.int32).view(shape)
    scores = (ids, -ids.float(), torch.arange(len(places), dtype=torch.int32)) if places else ()
    return Drawn(
        token_ids=torch.arange(10, 10 + len(best)), best=torch.tensor(best), logprob_places=places, logprobs=scores
    )


def test_each_place_has_as_many_as_it_wants() -> None:
    found = PendingTokens(drawn([1.0, 2.0, 3.0], [(0, 3), (2, 1)]), []).read()
    assert found.token_ids.tolist() == [10, 11, 12] and not found.errors
    scores = sampled_logprobs(found, {0: 100, 1: 101, 2: 102})
    assert {place: score.token_ids for place, score in scores.items()} == {100: [[0, 1, 2, 3]], 102: [[4, 5]]}
    assert scores[102].logprobs == [[-4.0, -5.0]] and scores[102].ranks == [1]
    assert list(sampled_logprobs(found, {2: 7})) == [7]  # the other request has left


def test_a_row_without_finite_logits_is_an_error_of_its_own() -> None:
    found = PendingTokens(drawn([1.0, torch.inf, torch.nan, -torch.inf], []), []).read()
    wrong, none = "the model gave no finite logits", "there is no token that may be chosen"
    assert found.errors == {1: wrong, 2: wrong, 3: none}


def test_prompt_scores_are_put_together_from_their_slices() -> None:
    slices = [
        tuple(torch.tensor(values) for values in ([[1, 2]], [[-0.1, -0.2]], [1])),
        tuple(torch.tensor(values) for values in ([[3, 4], [5, 6]], [[-0.3, -0.4], [-0.5, -0.6]], [2, 3])),
    ]
    found = PendingTokens(drawn([1.0], [(0, 0)]), [slices, slices[:1]]).read()
    assert [top.token_ids.tolist() for top in found.prompt_logprobs] == [[[1, 2], [3, 4], [5, 6]], [[1, 2]]]
    assert found.prompt_logprobs[0].ranks.tolist() == [1, 2, 3]
    assert found.logprobs is not None and found.logprobs.token_ids.tolist() == [[0]]
