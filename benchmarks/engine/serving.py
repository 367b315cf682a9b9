"""A server under load as in use: over HTTP, sampled, with text, its clients on the same machine.

Starts `nanoflow serve`, warms it up, sends one load after the other from several client processes, checks that the
server is idle after each, and writes one record. From the root of the repository:

    python -m benchmarks.engine.serving --model preset:llama-3-8b --workload trace:sharegpt.csv --temperature 0.7 \\
        --rates inf:1200 20:1200 35:1200 --repeats 3 --in-process --json benchmarks/results/serving_llama-3-8b.json

--in-process also gives the same requests to `LLM.generate`, before the server starts and on the same card; the record
then has the ratio "HTTP over in-process". Other servers are measured in the same way: a running one by --base-url (with
--server-pid for its CPU time), or one that is started here by --server-command "vllm serve MODEL --port {port}". Exit
status 1 if a request failed, or if the server was not idle after a load.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common.apart import RunFailed, run_apart
from benchmarks.common.document import write_json
from benchmarks.common.server_process import Server, ServerFailed, free_port, many_files, started, usage_of
from benchmarks.engine.serving_document import is_good, line, ratios
from nanoflow.bench.clients import Clients, Driven, draw_runs, measured, warm_up
from nanoflow.bench.options import BenchConfig, LoadConfig, ThroughputConfig
from nanoflow.bench.provenance import header, portable, portable_options, require_clean
from nanoflow.bench.record import BenchRecord
from nanoflow.bench.served import served_book, served_metrics, served_model, served_settings
from nanoflow.cli.options import CommandParser, OptionGroup
from nanoflow.config import ConfigError, EngineConfig
from nanoflow.models.presets import preset_name

# Gauges that are zero when a server is idle.
IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_IDLE_WITHIN_S = 10.0
_SETTLE_S = 1.0

_BENCH = OptionGroup(
    kind=BenchConfig,
    title="workload and measurement",
    skip=frozenset({"num_requests", "goodput"}),
    defaults={"workload": "1024/512", "num_warmup": 64},
)
_LOAD = OptionGroup(
    kind=LoadConfig,
    title="clients",
    skip=frozenset({"url", "model", "request_rate", "timeout_s", "num_processes"}),
)
_ENGINE = OptionGroup(kind=EngineConfig, title="engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One load: when requests arrive, how many there are, and all other options as `config`."""

    config: BenchConfig
    request_rate: float

    @property
    def name(self) -> str:
        """The name of the load in printed lines."""
        when = "at once" if math.isinf(self.request_rate) else f"at {self.request_rate:g}/s"
        return f"{self.config.workload} x {self.config.num_requests:,} {when}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every load; print and write the record after each."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        require_clean(args.json, allows_dirty=_BENCH.read(args).allow_dirty)
        loads, clients = read_loads(args), read_clients(args)
        engine = read_engine(args) if args.in_process else None
    except ValueError as error:
        parser.error(str(error))
    document: dict[str, Any] = {**header("serving"), "loads": []}
    many_files()
    try:
        if engine is not None:
            document["in_process"] = [plain(each) for each in run_in_process(engine, loads)]
            _write(args.json, document)
        with server_of(args) as server:
            for found in run_loads(server, clients, loads, document):
                print(line(found), flush=True)
                document["loads"].append(found)
                document["http_over_in_process"] = ratios(document)
                _write(args.json, document)
    except (ConnectionError, ServerFailed, RunFailed) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for name, ratio in document["http_over_in_process"].items():
        print(f"{name}: HTTP over in-process {ratio:.3f}")
    return 0 if all(is_good(found) for found in document["loads"]) else 1


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m benchmarks.engine.serving", description=__doc__)
    parser.add_argument("--model", help="model to serve (default: default), or its name at another server")
    parser.add_argument("--server-args", default="", metavar="TEXT", help="further options of nanoflow serve")
    parser.add_argument("--base-url", metavar="URL", help="measure the server that runs there, as http://HOST:PORT/v1")
    parser.add_argument(
        "--server-pid", type=int, metavar="N", help="process id of its main process, for CPU time and memory"
    )
    parser.add_argument(
        "--server-command", metavar="TEXT", help="start this server instead of nanoflow; {port} is filled in"
    )
    parser.add_argument("--server-log", type=Path, metavar="FILE", help="file for what the server prints")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=["inf:1000"],
        metavar="RATE:N",
        help="loads in turn: requests/s (Poisson; inf: all at once) and their number (default: inf:1000)",
    )
    parser.add_argument("--clients", type=int, metavar="N", help="client processes (default: cores - 6, 1 to 10)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for the start, and between two events"
    )
    parser.add_argument(
        "--in-process", action="store_true", help="also give the same requests to LLM.generate, before the server"
    )
    _BENCH.add_to(parser)
    _LOAD.add_to(parser)
    return parser


def read_loads(args: argparse.Namespace) -> list[Load]:
    """The loads of the command line; ConfigError if one is invalid."""
    loads = []
    for text in args.rates:
        rate, _, count = text.partition(":")
        if not count.isdecimal():
            raise ConfigError(f"--rates: {text!r} names no number of requests; write {text}:1000")
        try:
            request_rate = float(rate)
        except ValueError:
            raise ConfigError(f"--rates: {rate!r} is no number of requests/s") from None
        given = {**_BENCH.defaults, **_BENCH.given(args), "num_requests": int(count)}
        loads.append(Load(config=BenchConfig(**given), request_rate=request_rate))
        LoadConfig(request_rate=request_rate)
    return loads


def read_clients(args: argparse.Namespace) -> LoadConfig:
    """Options that all loads share; the server's address is filled in later."""
    if args.clients is not None and args.clients < 1:
        raise ConfigError(f"--clients must be at least 1, got {args.clients}")
    if args.base_url is not None and (args.server_command is not None or args.in_process or args.server_args):
        raise ConfigError("--base-url is a server that runs already: nothing is started, nor is an engine built here")
    if args.server_command is not None and "{port}" not in args.server_command:
        raise ConfigError("--server-command must have {port} where the port is to stand")
    num_cores = len(os.sched_getaffinity(0))
    return LoadConfig(
        **_LOAD.given(args), timeout_s=args.timeout, num_processes=args.clients or min(10, max(num_cores - 6, 1))
    )


def read_engine(args: argparse.Namespace) -> EngineConfig:
    """Options of the server's engine; ConfigError if the server is started by --server-command."""
    if args.server_command is not None:
        raise ConfigError("--in-process compares nanoflow with itself: leave --server-command out")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _ENGINE.add_to(parser)
    try:
        known, _ = parser.parse_known_args(shlex.split(args.server_args))
    except argparse.ArgumentError as error:
        raise ConfigError(f"--server-args: {error}") from None
    return replace(_ENGINE.read(known), model=args.model or EngineConfig().model)


@contextmanager
def server_of(args: argparse.Namespace) -> Iterator[Server]:
    """The running server, or one that is started here."""
    if args.base_url is not None:
        yield Server(url=args.base_url, pid=args.server_pid)
        return
    port = free_port()
    if args.server_command is not None:
        command = shlex.split(args.server_command.replace("{port}", str(port)))
    else:
        serve = [sys.executable, "-m", "nanoflow", "serve", args.model or EngineConfig().model]
        command = [*serve, "--port", str(port), *shlex.split(args.server_args)]
    print(f"starting {portable(shlex.join(command))}", flush=True)
    with started(command, port, args.timeout, args.server_log) as server:
        print(f"ready after {server.start_s:.1f} s", flush=True)
        yield server


def run_loads(
    server: Server, common: LoadConfig, loads: Sequence[Load], document: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Send one load after the other to a server; facts of the server are added to the record.

    Raises:
        ConnectionError: It does not answer, or completes no request.
    """
    common = replace(common, url=server.url)
    model = document.get("served_model") or served_model(common)
    metrics = served_metrics(common)
    document["server"] = {
        "model": portable(model),
        "start_s": server.start_s,
        "settings": served_settings(metrics),
        "book": None if (book := served_book(metrics)) is None else book.digest,
    }
    with Clients(common.num_processes) as clients:
        for load in loads:
            asked = replace(common, request_rate=load.request_rate)
            runs = draw_runs(asked, load.config)
            if load.config.num_warmup:
                warm_up(clients, asked, load.config, model, runs[0][: load.config.num_warmup])
                wait_until_idle(asked)
            repeats = []
            for requests in runs:
                before = None if server.pid is None else usage_of(server.pid)
                driven = clients.drive(asked, load.config, model, requests)
                after = None if server.pid is None else usage_of(server.pid)
                left = wait_until_idle(asked)
                cpu_s = None if before is None or after is None else after.cpu_s - before.cpu_s
                repeats.append(
                    {
                        **one_run(driven, cpu_s),
                        "left_over": left,
                        "server_rss_bytes": None if server.pid is None else usage_of(server.pid).rss_bytes,
                    }
                )
            yield {
                "name": portable(load.name),
                "workload": plain(portable_options(replace(load.config, json=None))),
                "load": plain(replace(asked, api_key=None, url="", model=None)),
                "repeats": repeats,
            }


def one_run(driven: Driven, server_cpu_s: float | None) -> dict[str, Any]:
    """Metrics of one repeat."""
    run = measured(driven, {})
    return {
        **plain(run),
        "server_cpu_s": server_cpu_s,
        "server_cpu_s_per_output_token": None
        if server_cpu_s is None or not run.num_output_tokens
        else server_cpu_s / run.num_output_tokens,
        "client_cpu_s": sum(driven.client_cpu_s),
        "busiest_client": driven.busiest_client,
    }


def wait_until_idle(load: LoadConfig) -> dict[str, float] | None:
    """Gauges of a server that are not zero although it should be idle, by name; None if it has no gauges.

    The server gets some seconds, as it may notice the end of a request later than the client.
    """
    deadline_s = time.monotonic() + _IDLE_WITHIN_S
    while True:
        metrics = served_metrics(load)
        known = {name: sum(value for _, value in metrics[name]) for name in IDLE if name in metrics}
        left = {name: value for name, value in known.items() if value}
        if not left or time.monotonic() > deadline_s:
            time.sleep(_SETTLE_S if known else 0.0)
            return left if known else None
        time.sleep(0.1)


def run_in_process(engine: EngineConfig, loads: Sequence[Load]) -> list[BenchRecord]:
    """The requests of every load, all at once through `LLM.generate`, with text, in a process of its own.

    Raises:
        RunFailed: That process failed.
    """
    configs = [
        ThroughputConfig(**{**plain(load.config), "json": None}, text=has_text(engine), bounds=False) for load in loads
    ]
    if preset_name(engine.model) is not None:
        engine = replace(engine, load_format="random")
    records = []
    for record in run_apart(engine, distinct(configs)):
        print(
            f"in process: {statistics.median(run.total_tokens_per_s for run in record.repeats):,.0f} tok/s", flush=True
        )
        records.append(record)
    return records


def distinct(configs: Sequence[ThroughputConfig]) -> list[ThroughputConfig]:
    """Loads without duplicates: in process all requests are there at once, whatever their rate over HTTP."""
    return [config for place, config in enumerate(configs) if config not in configs[:place]]


def has_text(engine: EngineConfig) -> bool:
    """Whether a server of this engine sends text; a preset without a tokenizer has none."""
    return engine.tokenizer is not None or preset_name(engine.model) is None


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as plain data."""
    found: dict[str, Any] = msgspec.to_builtins(value)
    return found


def _write(path: Path | str | None, document: dict[str, Any]) -> None:
    if path is not None:
        write_json(Path(path), document)


if __name__ == "__main__":
    sys.exit(main())
