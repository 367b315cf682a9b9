"""Convert the log probabilities of an iteration from the device's arrays to the messages that front ends get.

`kernels/sample.py` computes them, `completion.py` puts them into outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanoflow.batch import SampledTokens, TopLogprobs
from nanoflow.engine.messages import PlaceLogprobs


def consecutive_places(top: TopLogprobs, first_position: int = 0) -> PlaceLogprobs:
    """Log probabilities of consecutive places of a prompt, from `first_position` on."""
    return PlaceLogprobs(
        first_position=first_position,
        token_ids=top.token_ids.tolist(),
        logprobs=top.logprobs.tolist(),
        ranks=top.ranks.tolist(),
    )


def sampled_logprobs(result: SampledTokens, at_place: Mapping[int, int]) -> dict[int, PlaceLogprobs]:
    """Log probabilities of the new tokens, by request id.

    `at_place` maps a place in the sample to the request whose token was drawn there; places of rejected tokens are
    absent. Arrays become lists in one go, since hundreds of requests may ask in one iteration.
    """
    if result.logprobs is None:
        return {}
    all_ids, all_logprobs = result.logprobs.token_ids.tolist(), result.logprobs.logprobs.tolist()
    rows = zip(result.logprob_places, all_ids, all_logprobs, result.logprobs.ranks.tolist(), strict=True)
    found: dict[int, PlaceLogprobs] = {}
    for (place, num_top), token_ids, logprobs, rank in rows:
        if place not in at_place:
            continue
        places = found.setdefault(at_place[place], PlaceLogprobs(first_position=0, token_ids=[], logprobs=[], ranks=[]))
        places.token_ids.append(token_ids[: 1 + num_top])
        places.logprobs.append(logprobs[: 1 + num_top])
        places.ranks.append(rank)
    return found
