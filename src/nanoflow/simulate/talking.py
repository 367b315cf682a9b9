"""Conversations in simulated runs: each round comes when the one before has ended and been thought over.

What `bench/rounds.py` does with an engine, with the same options, conversations and metrics, so that both can be
compared. All completions have the same tokens here; prompts have those that were drawn.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Sequence

from nanoflow.conversations import Conversation, num_rounds
from nanoflow.kvcache.keys import root_key
from nanoflow.round_metrics import AskedRound, ConversationMetrics, measure_conversations
from nanoflow.simulate.arrivals import END, OTHER, Asked
from nanoflow.simulate.serving import Cluster, SimulatedRun, simulate_arrivals


class Talking:
    """The rounds of conversations.

    Args:
        conversations: In the order of their starts; each has a round.
        max_concurrency: Most conversations under way; a later one begins when an earlier one has ended. None: all.
    """

    def __init__(self, conversations: Sequence[Conversation], max_concurrency: int | None = None) -> None:
        self._conversations = tuple(conversations)
        self._said = [list(each.system_token_ids) for each in self._conversations]
        starts = itertools.accumulate((len(each.turns) for each in self._conversations), initial=0)
        self._first_ids = list(starts)[:-1]
        self._later = deque(range(len(self._conversations)))
        # When a round comes, of which conversation, and which of its rounds.
        self._coming: list[tuple[float, int, int]] = []
        self._asked: dict[int, tuple[int, int]] = {}
        self.num_requests = num_rounds(self._conversations)
        for _ in range(max_concurrency or len(self._conversations)):
            self._begin(0.0)

    @property
    def next_s(self) -> float | None:
        """See `Arrivals`."""
        return self._coming[0][0] if self._coming else None

    def take(self) -> Asked:
        """See `Arrivals`."""
        arrival_s, number, place = heapq.heappop(self._coming)
        turn = self._conversations[number].turns[place]
        self._said[number] += turn.new_token_ids
        request_id = self._first_ids[number] + place
        self._asked[request_id] = number, place
        return Asked(
            request_id=request_id,
            prompt_token_ids=list(self._said[number]),
            num_output_tokens=turn.num_output_tokens,
            arrival_s=arrival_s,
            root=root_key(),
            thread=number,
        )

    def finish(self, request_id: int, now_s: float) -> None:
        """See `Arrivals`."""
        number, place = self._asked.pop(request_id)
        turns = self._conversations[number].turns
        self._said[number] += [OTHER] * (turns[place].num_output_tokens - 1) + [END]
        if place + 1 < len(turns):
            heapq.heappush(self._coming, (now_s + turns[place + 1].think_s, number, place + 1))
        else:
            self._said[number] = []
            self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        """The next conversation may begin."""
        if self._later:
            number = self._later.popleft()
            heapq.heappush(self._coming, (max(now_s, self._conversations[number].start_s), number, 0))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTalk:
    """Simulated conversations: the run as of any requests, and the metrics that `nanoflow bench rounds` has."""

    run: SimulatedRun
    metrics: ConversationMetrics


def simulate_conversations(
    cluster: Cluster, conversations: Sequence[Conversation], *, max_concurrency: int | None, num_left_out: int = 0
) -> SimulatedTalk:
    """Hold conversations until all have ended.

    Args:
        cluster: Who answers; a conversation stays with one replica.
        conversations: In the order of their starts. Those without a round are left out.
        max_concurrency: Most of them under way, those in think time included; None for all.
        num_left_out: Rounds that nobody asks, as they are longer than the model allows.

    Raises:
        ConfigError: There is no round, or no replica.
    """
    held = [each for each in conversations if each.turns]
    simulated = simulate_arrivals(cluster, Talking(held, max_concurrency))
    records = iter(enumerate(simulated.records))
    asked = []
    for number, conversation in enumerate(held):
        num_before = 0
        for place in range(len(conversation.turns)):
            request_id, record = next(records)
            asked.append(
                AskedRound(
                    conversation=number,
                    round=place + 1,
                    record=record,
                    num_cached_tokens=simulated.num_cached[request_id],
                    num_repeated_tokens=num_before,
                )
            )
            num_before = record.num_prompt_tokens + record.num_output_tokens
    metrics = measure_conversations(
        asked,
        simulated.duration_s,
        {},
        num_left_out=num_left_out,
        tiers={name: dataclasses.asdict(counts) for name, counts in simulated.run.tiers.items()},
        completions=(),
    )
    return SimulatedTalk(
        run=simulated.run,
        metrics=dataclasses.replace(metrics, energy_per_token_j=simulated.run.metrics.energy_per_token_j),
    )
