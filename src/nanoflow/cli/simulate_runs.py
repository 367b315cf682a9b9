"""Runs of `nanoflow simulate`: requests or conversations as its options ask for them, on any number of replicas.

`simulate.py` has the command, `simulate/serving.py` and `simulate/talking.py` do the work.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from nanoflow.cli.simulate_options import BUDGET, REQUESTS, SimulateConfig
from nanoflow.conversation_options import ConversationConfig
from nanoflow.conversations import Conversation, draw_conversations, fitted, num_rounds
from nanoflow.models.config_json import parse
from nanoflow.plan.book import BookLimits, StoredBook
from nanoflow.plan.sequential import sequential_plan
from nanoflow.profile.host_link import copies_of
from nanoflow.profile.table import Profile
from nanoflow.scheduler.limits import SchedulerLimits
from nanoflow.scheduler.pace import Pace
from nanoflow.scheduler.policies import Policies
from nanoflow.simulate.iteration import IterationModel, graphs_of
from nanoflow.simulate.link import BelowDevice
from nanoflow.simulate.serving import Cluster, SimulatedRun, limits_for, simulate
from nanoflow.simulate.talking import SimulatedTalk, simulate_conversations
from nanoflow.simulate.two_classes import Work, predicted_pace, simulate_two_classes
from nanoflow.two_classes import TwoClasses
from nanoflow.workload import Lengths, draw_arrivals, draw_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """All inputs of a simulation but the number of replicas and the policies: either requests or conversations."""

    profile: Profile
    model: IterationModel
    config: SimulateConfig
    limits: SchedulerLimits
    lengths: Sequence[Lengths]
    arrivals_s: Sequence[float]
    background: Sequence[Lengths]
    talk: ConversationConfig | None
    conversations: Sequence[Conversation]
    num_left_out: int

    @staticmethod
    def make(
        profile: Profile, model: IterationModel, config: SimulateConfig, talk: ConversationConfig | None
    ) -> Simulation:
        """Draw requests or conversations, and work out the limits of the scheduler for them."""
        from nanoflow.workload import Lengths

        conversations: list[Conversation] = []
        lengths, background = list[Lengths](), list[Lengths]()
        arrivals_s, num_left_out = list[float](), 0
        if talk is None:
            lengths = draw_lengths(config.workload, config.num_requests, config.seed)
            arrivals_s = draw_arrivals(config.num_requests, config.request_rate, config.seed)
            background = draw_lengths(config.batch_workload, config.batch_requests or 0, config.seed + 1)
            sizes = [*lengths, *background]
        else:
            drawn = draw_conversations(config, talk, vocab_size=model.graph.vocab_size)
            conversations = fitted(drawn, parse(profile.config, origin=profile.model).max_position_embeddings)
            num_left_out = num_rounds(drawn) - num_rounds(conversations)
            sizes = [
                Lengths(
                    num_prompt_tokens=each.num_tokens - each.turns[-1].num_output_tokens,
                    num_output_tokens=each.turns[-1].num_output_tokens,
                )
                for each in conversations
                if each.turns
            ]
        limits = limits_for(
            profile,
            model.graph,
            sizes if config.max_tokens is None else [_allowing(each, config.max_tokens) for each in sizes],
            max_batch_tokens=config.max_batch_tokens or BUDGET,
            max_num_seqs=config.max_num_seqs or REQUESTS,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
        return Simulation(
            profile=profile,
            model=model,
            config=config,
            limits=limits,
            lengths=lengths,
            arrivals_s=arrivals_s,
            background=background,
            talk=talk,
            conversations=conversations,
            num_left_out=num_left_out,
        )

    def run(self, num_replicas: int, policies: Policies | None = None) -> SimulatedRun:
        """Simulate all requests on this many replicas."""
        return self.run_talk(num_replicas, policies).run if self.talk else self._run_single(num_replicas, policies)

    def run_talk(self, num_replicas: int, policies: Policies | None = None) -> SimulatedTalk:
        """Hold all conversations."""

        assert self.talk is not None
        with self._cluster(num_replicas, policies, num_rounds(self.conversations)) as cluster:
            return simulate_conversations(
                cluster,
                self.conversations,
                max_concurrency=self.talk.max_concurrency,
                num_left_out=self.num_left_out,
            )

    def _run_single(self, num_replicas: int, policies: Policies | None) -> SimulatedRun:

        with self._cluster(num_replicas, policies, len(self.lengths)) as cluster:
            return simulate(cluster, self.lengths, self.arrivals_s)

    def run_two_classes(self, num_replicas: int) -> tuple[TwoClasses, SimulatedRun]:
        """Simulate the requests and background ones, each alone and together; the run is that of both."""
        work = Work(lengths=self.lengths, arrivals_s=self.arrivals_s, background=self.background)
        with self._cluster(num_replicas, None, len(self.lengths) + len(self.background)) as cluster:
            found, simulated = simulate_two_classes(cluster, work)
        return found, simulated.run

    @contextmanager
    def _cluster(self, num_replicas: int, policies: Policies | None, num_requests: int) -> Iterator[Cluster]:
        """The GPUs, and a bar that shows how far they are."""

        from nanoflow.simulate.serving import Cluster

        config, setup = self.config, self.profile.setup
        is_shown = sys.stderr.isatty()
        with tqdm(total=num_requests, desc="Simulating", unit="request", disable=not is_shown) as bar:
            yield Cluster(
                limits=self.limits,
                iterations=self.model,
                num_replicas=num_replicas,
                gpus_per_replica=setup.num_gpus,
                static_power_w=setup.static_power_w or 0.0,
                policies=policies,
                pace=self._pace(),
                below=BelowDevice.of(
                    self.profile,
                    self.model.graph,
                    host_gib=config.kv_host_gib,
                    disk_gib=config.kv_disk_gib,
                    disk_gb_per_s=config.disk_gb_s,
                ),
                max_tokens=config.max_tokens,
                on_progress=lambda finished: _advance(bar, finished),
            )

    def _pace(self) -> Pace:
        """The bounds of the options, with an estimate of iterations like that of an engine."""
        max_itl_s, max_ttft_s = (
            None if bound is None else bound / 1e3 for bound in (self.config.max_itl_ms, self.config.max_ttft_ms)
        )
        return predicted_pace(self.model, self.limits, max_itl_s=max_itl_s, max_ttft_s=max_ttft_s)

    @property
    def what(self) -> str:
        """Workload and arrivals in a line."""
        config, talk = self.config, self.talk
        if talk is None:
            rate = "at once" if math.isinf(config.request_rate) else f"at {config.request_rate:g} requests/s"
            beside = f", beside requests of {config.batch_workload}" if self.background else ""
            return f"{config.workload}, {config.num_requests:,} requests {rate}{beside}"
        return (
            f"{config.workload}, {talk.num_conversations:,} conversations of {talk.rounds} rounds, "
            f"{talk.think_time:g} s of thinking between them"
        )

    @property
    def options(self) -> dict[str, Any]:
        """Everything that was asked for."""
        return dataclasses.asdict(self.config) | (dataclasses.asdict(self.talk) if self.talk else {})


def _allowing(length: Lengths, max_tokens: int) -> Lengths:
    """The longest that a request of this length may become."""
    return dataclasses.replace(length, num_output_tokens=max(max_tokens, length.num_output_tokens))


def _advance(bar: object, finished: int) -> None:
    bar.update(finished - bar.n)  # type: ignore[attr-defined]


def limits_of(config: SimulateConfig, book: StoredBook | None) -> BookLimits:
    """Each limit from the options, else from the book, else a default."""
    usual = BookLimits(max_batch_tokens=BUDGET, max_num_seqs=REQUESTS)
    known = usual if book is None or book.limits is None else book.limits
    return BookLimits(
        max_batch_tokens=config.max_batch_tokens or known.max_batch_tokens,
        max_num_seqs=config.max_num_seqs or known.max_num_seqs,
    )


def model_of(profile: Profile, book: StoredBook | None, num_tokens: int, *, host_gib: float = 0.0) -> IterationModel:
    """The model of iterations of up to `num_tokens` tokens under the plans of a book, with copies to host memory."""
    graph = graphs_of(profile)[0]
    chosen = None if book is None else book.with_fallback(sequential_plan(graph, num_tokens), graph)
    return IterationModel(profile, chosen, copies_of(profile, graph, host_gib=host_gib))
