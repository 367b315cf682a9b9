"""`nanoflow bench throughput` and `nanoflow bench serve`: measure, print a table, write the record.

`nanoflow/bench/` measures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.bench.options import BenchConfig, LoadConfig, ThroughputConfig
from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import UNWATCHED_DEFAULTS, EngineConfig

if TYPE_CHECKING:
    from nanoflow.bench.record import BenchRecord

_TEACH = """\
Measure speed. `throughput` runs the engine in this process with all requests at
once; `serve` puts load on a running OpenAI-compatible server. Prompts are random
token ids, completions have fixed length, the end of sequence is ignored. --json
writes everything needed to judge or repeat the run. The exit status is 0 if every
request ended well, 1 after an error or if a request failed, 2 for a wrong command
line, and 130 after Ctrl-C."""

_EXAMPLES = """\
  nanoflow bench throughput --workload 512/512
  nanoflow bench serve --url http://127.0.0.1:8000/v1 --request-rate 4"""

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

_BENCH = OptionGroup(kind=BenchConfig, title="workload and measurement")
_THROUGHPUT = OptionGroup(kind=ThroughputConfig, title="workload and measurement")
_LOAD = OptionGroup(kind=LoadConfig, title="server and load")
_ENGINE = OptionGroup(
    kind=EngineConfig, title="model and engine", skip=frozenset({"seed"}), defaults=UNWATCHED_DEFAULTS
)


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
