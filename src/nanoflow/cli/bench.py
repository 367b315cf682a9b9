"""`nanoflow bench throughput`, `bench serve` and `bench rounds`: measure, print a table, write the record.

`nanoflow/bench/` measures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.bench.options import BenchConfig, LoadConfig, ThroughputConfig
from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import UNWATCHED_DEFAULTS, ConfigError, EngineConfig
from nanoflow.conversation_options import ConversationConfig

if TYPE_CHECKING:
    from nanoflow.bench.record import BenchRecord

_TEACH = """\
Measure speed. `throughput` runs the engine in this process with all requests at
once; `serve` puts load on a running OpenAI-compatible server; `rounds` holds
conversations, whose prompts repeat what came before. Prompts are random token ids,
completions have fixed length, the end of sequence is ignored. --json writes
everything needed to judge or repeat the run. The exit status is 0 if every request
ended well, 1 after an error or if a request failed, 2 for a wrong command line, and
130 after Ctrl-C."""

_EXAMPLES = """\
  nanoflow bench throughput --workload 512/512
  nanoflow bench serve --url http://127.0.0.1:8000/v1 --request-rate 4
  nanoflow bench rounds --workload 64/32 --rounds 5"""

_TEACH_THROUGHPUT = """\
Load a model in this process, give it all requests at once and report tokens/s
and latencies, for the whole run and for its steady state. Bounds of this device are
measured before, for comparison: the serial bound (every GEMM and attention alone,
one after the other) and the optimum (the GEMMs alone).
Tokens are greedy and not turned into text unless options say otherwise.
--random-weights measures an architecture without its weights; preset:NAME needs no
files at all. Exit status 1 if a request failed (see nanoflow bench --help)."""

_EXAMPLES_THROUGHPUT = """\
  nanoflow bench throughput --workload 32/32 --num-requests 64
  nanoflow bench throughput --model ./my-model --workload 1024/512 --repeats 3 --json run.json
  nanoflow bench throughput --model preset:llama-3-8b --workload 512/512 --num-requests 1000
  nanoflow bench throughput --model ./my-model --workload trace:lengths.csv"""

_TEACH_SERVE = """\
Send prompts to a server's /v1/completions or /v1/chat/completions, with Poisson
arrivals or all at once, and report rates, latencies, the longest gap between the
tokens of a request and, with --goodput, the requests/s that meet every limit. Needs
a server that streams usage. One process receives some twenty thousand tokens/s: use
--num-processes against a fast server. Failed requests are counted by reason; exit
status 1 if there are any (see nanoflow bench --help)."""

_EXAMPLES_SERVE = """\
  nanoflow bench serve --workload 128/64 --num-requests 100 --request-rate 8
  nanoflow bench serve --max-concurrency 32 --workload 512/512 --json run.json
  nanoflow bench serve --request-rate 4 --goodput ttft_ms:200 tpot_ms:50"""

_TEACH_ROUNDS = """\
Hold conversations of several rounds and report how many prompt tokens had to be
computed, how many were found in the KV cache, and the time to the first token of
each round. The prompt of a round is everything before it, completions included, and
new tokens; lengths of both are those of --workload, one draw a round. Without --url
an engine is started for it; with --url the server that runs there is asked, whose
engine has its own options. A server must return token ids (return_token_ids), as
vLLM and nanoflow do; any other takes --prompts text, or --api chat --prompts text.
A round that would make its conversation longer than the model allows is left out,
and the table says how many were. Exit status 1 if a request failed."""

_EXAMPLES_ROUNDS = """\
  nanoflow bench rounds --workload 64/32 --num-conversations 8
  nanoflow bench rounds --workload trace:lengths.csv --rounds 8 --think-time 2 --max-concurrency 64
  nanoflow bench rounds --shared-system 0.5 --system-tokens 512 --agent-share 0.25 --json run.json
  nanoflow bench rounds --url http://127.0.0.1:8000/v1 --workload 512/128"""

_BENCH = OptionGroup(kind=BenchConfig, title="workload and measurement")
_THROUGHPUT = OptionGroup(kind=ThroughputConfig, title="workload and measurement")
_LOAD = OptionGroup(kind=LoadConfig, title="server and load")
_ENGINE = OptionGroup(
    kind=EngineConfig, title="model and engine", skip=frozenset({"seed"}), defaults=UNWATCHED_DEFAULTS
)

_ASKED = OptionGroup(kind=BenchConfig, title="workload and measurement", skip=frozenset({"num_requests"}))
_TALK = OptionGroup(kind=ConversationConfig, title="conversations")
_SERVED = OptionGroup(
    kind=LoadConfig,
    title="server",
    skip=frozenset({"model", "request_rate", "max_concurrency", "num_processes", "stream"}),
    defaults={"url": None},
)
_STARTED = OptionGroup(kind=EngineConfig, title="model and engine, without --url", skip=frozenset({"seed"}))


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow bench` and its subcommands."""
    parser = add_command(commands, "bench", "measure throughput and latency", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} BENCHMARK [options]"
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", prog=parser.prog, required=True)
    throughput = add_command(
        benchmarks, "throughput", "the engine in this process", _TEACH_THROUGHPUT, _EXAMPLES_THROUGHPUT
    )
    serve = add_command(benchmarks, "serve", "a running server", _TEACH_SERVE, _EXAMPLES_SERVE)
    _THROUGHPUT.add_to(throughput)
    _ENGINE.add_to(throughput)
    throughput.set_defaults(run=run_throughput)
    _BENCH.add_to(serve)
    _LOAD.add_to(serve)
    serve.set_defaults(run=run_serve)
    rounds = add_command(benchmarks, "rounds", "conversations of several rounds", _TEACH_ROUNDS, _EXAMPLES_ROUNDS)
    for group in (_ASKED, _TALK, _SERVED, _STARTED):
        group.add_to(rounds)
    rounds.set_defaults(run=run_rounds)


def run_throughput(args: argparse.Namespace) -> int:
    """Measure an engine in this process."""
    from nanoflow.bench import offline
    from nanoflow.bench.provenance import require_clean

    config = _THROUGHPUT.read(args)
    require_clean(config.json, allows_dirty=config.allow_dirty)
    return _report(offline.run_throughput(_ENGINE.read(args), config), config.json)


def run_serve(args: argparse.Namespace) -> int:
    """Measure a server."""
    from nanoflow.bench import clients
    from nanoflow.bench.provenance import require_clean

    config = _BENCH.read(args)
    require_clean(config.json, allows_dirty=config.allow_dirty)
    return _report(clients.run_serve(_LOAD.read(args), config), config.json)


def run_rounds(args: argparse.Namespace) -> int:
    """Hold conversations, with a server where its address is given, else with an engine that is started."""
    config, talk = _ASKED.read(args), _TALK.read(args)
    load, engine = read_target(args)
    from nanoflow.bench import rounds
    from nanoflow.bench.provenance import require_clean
    from nanoflow.round_metrics import format_rounds

    require_clean(config.json, allows_dirty=config.allow_dirty)
    if load is None:
        record = rounds.run_engine_rounds(engine, config, talk)
    else:
        record = rounds.run_served_rounds(load, config, talk)
    status = _report(record, config.json)
    print(f"\n{format_rounds(rounds.conversation_metrics(record))}")
    return status


def read_target(args: argparse.Namespace) -> tuple[LoadConfig | None, EngineConfig]:
    """The server to ask, None for an engine of ours, and the options of that engine.

    Raises:
        ConfigError: There are options of a server without its address, or of an engine beside it.
    """
    served, started = _SERVED.given(args), _STARTED.given(args)
    if "url" not in served:
        if served:
            raise ConfigError(f"{', '.join(sorted(served))}: only with --url, for a server that runs already")
        return None, _STARTED.read(args)
    others = sorted(started.keys() - {"model"})
    if others:
        raise ConfigError(f"{', '.join(others)}: not with --url, as the server there has an engine of its own")
    return LoadConfig(**served, model=started.get("model")), EngineConfig()


def _report(record: BenchRecord, path: str | None) -> int:
    """Print the table and write the record where asked for; say on standard error if requests failed, and return 1."""
    from nanoflow.bench.record import format_table, write_record

    print(format_table(record.repeats, record.bounds, record.processes))
    if path is not None:
        write_record(record, Path(path))
    num_failed = sum(run.num_failed for run in record.repeats)
    if num_failed:
        num_requests = sum(run.num_requests for run in record.repeats)
        print(f"nanoflow: error: {num_failed} of {num_requests} requests failed", file=sys.stderr)
    return 1 if num_failed else 0
