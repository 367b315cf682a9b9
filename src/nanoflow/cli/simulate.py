"""`nanoflow simulate`: predict one iteration, a whole serving run, or the number of GPUs needed; needs no GPU.

This file has the command; its options are in `simulate_options.py`, its runs in `simulate_runs.py`, what it says in
`simulate_words.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.cli.simulate_options import SimulateConfig
from nanoflow.config import ConfigError
from nanoflow.conversation_options import ConversationConfig

if TYPE_CHECKING:
    from nanoflow.cli.simulate_runs import Simulation
    from nanoflow.run_metrics import Distribution

_TEACH = """\
Predict what GPUs would do, from a profile of one of them (or an estimate: nanoflow
profile --estimate). With --batch: one iteration of that batch. Else a whole serving
run: the real scheduler on a simulated clock, requests of a workload in, throughput,
latencies and joules out, on as many GPUs as --gpus says. With --find-gpus the other
way round: how many GPUs keep the latency below --max-normalized-latency-ms? With
--rounds conversations are held, as nanoflow bench rounds holds them with an engine.
--kv-host-gib and --kv-disk-gib put host memory and a disk below the KV cache, whose
copies take their time. --policies compares who is let in, who is sent back, and how.
With --batch-requests there are requests of priority batch beside those of the workload:
what does each class get, alone and together?"""

_EXAMPLES = """\
  nanoflow simulate profile.json --batch 2048 --decodes 1024 --context 768
  nanoflow simulate profile.json --workload 512/512 --num-requests 1000 --plan plans.json
  nanoflow simulate profile.json --workload trace:lengths.csv --num-requests 20000 --request-rate 100 --gpus 64
  nanoflow simulate profile.json --workload trace:lengths.csv --num-requests 5000 --request-rate 100 --find-gpus
  nanoflow simulate profile.json --workload 256/128 --rounds 5 --think-time 10 --num-conversations 400 --kv-host-gib 64
  nanoflow simulate profile.json --workload 1024/512 --kv-host-gib 64 --max-tokens 1024 --policies
  nanoflow simulate profile.json --workload 512/256 --num-requests 2000 --request-rate 25 \\
      --max-itl-ms 75 --max-ttft-ms 300 --batch-requests 9000"""


_OPTIONS = OptionGroup(kind=SimulateConfig, title="what to simulate")
_TALK = OptionGroup(
    kind=ConversationConfig, title="conversations, with --rounds instead of --num-requests", defaults={"rounds": None}
)


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow simulate`."""
    parser = add_command(commands, "simulate", "predict iterations and serving runs without a GPU", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} PROFILE [options]"
    parser.add_argument("profile", metavar="PROFILE", type=Path, help="File written by nanoflow profile")
    parser.add_argument("--json", metavar="FILE", type=Path, help="File for the result")
    _OPTIONS.add_to(parser)
    _TALK.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    from nanoflow.cli.simulate_runs import Simulation, limits_of, model_of
    from nanoflow.cli.simulate_words import describe_iteration
    from nanoflow.plan.book import load_book
    from nanoflow.profile.table import Profile

    config, talk = _OPTIONS.read(args), _read_talk(args)
    profile = Profile.load(args.profile)
    book = None if config.plan is None else load_book(Path(config.plan))
    limits = limits_of(config, book)
    config = dataclasses.replace(config, max_batch_tokens=limits.max_batch_tokens, max_num_seqs=limits.max_num_seqs)
    # In a run copies have their times on the clock; a batch alone has its own beside it.
    host_gib = 0.0 if config.batch is None else config.kv_host_gib
    model = model_of(profile, book, max(limits.max_batch_tokens, config.batch or 0), host_gib=host_gib)
    if config.batch is not None:
        decodes = config.batch // 2 if config.decodes is None else config.decodes
        print("\n".join(describe_iteration(model, config.batch, decodes, config.context)))
        return 0
    simulation = Simulation.make(profile, model, config, talk)
    if config.find_gpus:
        return _find(simulation, config)
    gpus = config.gpus or profile.setup.num_gpus
    if gpus % profile.setup.num_gpus:
        raise ConfigError(f"gpus must be a multiple of the {profile.setup.num_gpus} of the profile, got {gpus}")
    show = _compare if config.policies else _show if config.batch_requests is None else _beside
    found = show(simulation, gpus // profile.setup.num_gpus)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _read_talk(args: argparse.Namespace) -> ConversationConfig | None:
    """Which conversations to hold; None for single requests.

    Raises:
        ConfigError: There are options of conversations without rounds, or of single requests beside them.
    """
    given, single = _TALK.given(args), _OPTIONS.given(args)
    if given.get("rounds") is None:
        if given:
            raise ConfigError(f"{', '.join(sorted(given))}: only with --rounds, for conversations")
        return None
    others = sorted(single.keys() & {"num_requests", "request_rate", "find_gpus", "batch_requests"})
    if others:
        raise ConfigError(
            f"{', '.join(others)}: not with --rounds; there are --num-conversations, --conversation-rate and "
            "--max-concurrency"
        )
    return _TALK.read(args)


def _show(simulation: Simulation, num_replicas: int) -> dict[str, object]:
    """Simulate one run and print it; its document."""
    from nanoflow.cli.simulate_words import describe_run, document
    from nanoflow.round_metrics import format_rounds

    talk = simulation.run_talk(num_replicas) if simulation.talk else None
    result = simulation.run(num_replicas) if talk is None else talk.run
    print("\n".join(describe_run(simulation.profile, simulation.what, result)))
    if talk is not None:
        print(f"\n{format_rounds([talk.metrics])}")
    return document(simulation.profile, simulation.options, result, talk)


def _beside(simulation: Simulation, num_replicas: int) -> dict[str, object]:
    """Simulate both classes of requests alone and together and print what each gets; the document."""
    from nanoflow.cli.simulate_words import describe_run, document
    from nanoflow.two_classes import table

    found, run = simulation.run_two_classes(num_replicas)
    print("\n".join((*describe_run(simulation.profile, simulation.what, run), "", *table(found))))
    beside = {**dataclasses.asdict(found), "share_of_rest": found.share_of_rest}
    return {**document(simulation.profile, simulation.options, run), "beside": beside}


def _compare(simulation: Simulation, num_replicas: int) -> dict[str, object]:
    """Simulate a run for each choice of policies and print them in a table; its document."""
    from nanoflow.simulate.compare import best, compare, table

    runs = compare(lambda policies: simulation.run(num_replicas, policies))
    print(f"{simulation.what}: policies of the scheduler; * wins, the first one is what an engine does")
    print("\n".join(table(runs)))
    found = [{**dataclasses.asdict(choice), "result": dataclasses.asdict(ran)} for choice, ran in runs.items()]
    options = {name: str(value) if value == math.inf else value for name, value in simulation.options.items()}
    return {"simulation": options, "policies": found, "best": dataclasses.asdict(best(runs))}


def _find(simulation: Simulation, config: SimulateConfig) -> int:
    """Try growing numbers of replicas and print the first that is enough; returns 1 if none is, else 0."""
    from nanoflow.simulate.serving import least_replicas

    per_replica = simulation.profile.setup.num_gpus

    def is_enough(num_replicas: int) -> bool:
        result = simulation.run(num_replicas)
        latency_ms = _percentile(config)(result.metrics.normalized_latency_s) * 1e3
        met = latency_ms <= config.max_normalized_latency_ms
        print(
            f"{num_replicas * per_replica:>6,} GPUs: {latency_ms:,.1f} ms/token for {config.percentile} % of requests"
            f"{'' if met else ', too slow'}",
            flush=True,
        )
        return met

    replicas = least_replicas(is_enough, max(config.max_gpus // per_replica, 1))
    if replicas is None:
        print(f"{config.max_gpus} GPUs are not enough for {config.max_normalized_latency_ms:g} ms/token")
        return 1
    print(
        f"{replicas * per_replica:,} GPUs serve {config.request_rate:g} requests/s at "
        f"{config.max_normalized_latency_ms:g} ms/token ({simulation.profile.setup.gpu})"
    )
    return 0


def _percentile(config: SimulateConfig) -> Callable[[Distribution | None], float]:
    def value(distribution: Distribution | None) -> float:
        return math.inf if distribution is None else float(getattr(distribution, f"p{config.percentile}"))

    return value
