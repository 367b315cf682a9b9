"""Load from one or several client processes: shares the requests of a run among them and merges their records.

One Python process can receive some twenty thousand pieces a second, fewer than a fast server sends. `online.py` has the
work of one client.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import signal
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

from nanoflow.bench.client import read_address
from nanoflow.bench.online import Sending, drive, prepare, record_of
from nanoflow.bench.options import BenchConfig, LoadConfig
from nanoflow.bench.processes import ProcessState, listeners_at, processes_of
from nanoflow.bench.record import BenchRecord, make_record
from nanoflow.bench.served import served_book, served_metrics, served_model
from nanoflow.run_metrics import RequestRecord, RunMetrics, measure, parse_limits
from nanoflow.workload import BenchRequest, draw_lengths, make_requests

Result = TypeVar("Result")

# Seconds from the moment all clients are ready to the first arrival.
_START_IN_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Driven:
    """A run as its clients saw it.

    Attributes:
        records: In the order of the requests.
        duration_s: From the earliest possible arrival to the end of the last answer.
        client_cpu_s: CPU seconds of each client under load; a client that is always busy is the bottleneck.
    """

    records: Sequence[RequestRecord]
    duration_s: float
    client_cpu_s: Sequence[float]

    @property
    def busiest_client(self) -> float:
        """CPU seconds per second of the busiest client."""
        return max(self.client_cpu_s) / self.duration_s


class Clients:
    """Client processes, as many as the load asks for; one is this process.

    A context manager: the processes end with the `with` block.
    """

    def __init__(self, num_processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._ends: list[Connection] = []
        for _ in range(num_processes if num_processes > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_parent, args=(theirs,), daemon=True)
            with _interrupts_ignored():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(ours)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            if error is None:
                process.join(5)
            process.kill()

    def drive(self, load: LoadConfig, config: BenchConfig, model: str, requests: Sequence[BenchRequest]) -> Driven:
        """Send all requests at their times, and return when the last answer has ended.

        Raises:
            ConnectionError: A client process died.
        """
        if not self._ends:
            sendings = prepare(load, config, model, requests)
            start_s = time.monotonic()
            return _joined([_drive(load, sendings, start_s)], start_s)
        # With fewer slots than processes, some processes would have none.
        ends = self._ends[: load.max_concurrency]
        shares = [requests[place :: len(ends)] for place in range(len(ends))]
        try:
            for place, (end, share) in enumerate(zip(ends, shares, strict=True)):
                end.send((_of_one(load, place, len(ends)), config, model, share))
            for end in ends:
                end.recv()
            start_s = time.monotonic() + _START_IN_S
            for end in ends:
                end.send(start_s)
            return _joined([end.recv() for end in ends], start_s)
        except (EOFError, OSError) as error:
            raise ConnectionError(f"a client process ended: {error or type(error).__name__}") from error


def _of_one(load: LoadConfig, place: int, count: int) -> LoadConfig:
    """One client's part of a load that `count` clients share."""
    if load.max_concurrency is None:
        return load
    slots = load.max_concurrency // count + (place < load.max_concurrency % count)
    return dataclasses.replace(load, max_concurrency=slots)


def _serve_parent(end: Connection) -> None:
    """Main loop of a client process: for each run, prepare, report ready, wait for the start, send back records."""
    while True:
        try:
            load, config, model, requests = end.recv()
            sendings = prepare(load, config, model, requests)
            end.send(None)
            end.send(_drive(load, sendings, end.recv()))
        except (EOFError, OSError):
            return


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which the terminal sends to them too: this process ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set what a signal does
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """The results of one client: its records, its CPU seconds under load, and the time of its last answer."""

    records: Sequence[RequestRecord]
    cpu_s: float
    stop_s: float


def _drive(load: LoadConfig, sendings: Sequence[Sending], start_s: float) -> _Share:
    """Run one client's requests; answers are parsed when all have arrived."""
    before_s = time.process_time()
    sent = run_loop(drive(load, sendings, start_s))
    stop_s, cpu_s = time.monotonic(), time.process_time() - before_s
    return _Share(records=[record_of(each, is_stream=load.stream) for each in sent], cpu_s=cpu_s, stop_s=stop_s)


def _joined(shares: Sequence[_Share], start_s: float) -> Driven:
    """Merge the results; request i was sent by client i modulo their number."""
    count, num_requests = len(shares), sum(len(share.records) for share in shares)
    records = [shares[place % count].records[place // count] for place in range(num_requests)]
    last_s = max((each.finished_s for each in records if each.error is None), default=max(s.stop_s for s in shares))
    return Driven(records=records, duration_s=last_s - start_s, client_cpu_s=[share.cpu_s for share in shares])


def run_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run on uvloop if it is installed: it takes less of the CPU time that server and clients share."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def run_serve(load: LoadConfig, config: BenchConfig) -> BenchRecord:
    """Warm up a server and measure every repeat.

    Raises:
        ValueError: The workload or a limit is invalid.
        ConnectionError: The server cannot be reached, or completes no request of the warm-up.
    """
    limits_ms = parse_limits(config.goodput)
    runs = draw_runs(load, config)
    model = load.model or served_model(load)
    with Clients(load.num_processes) as clients:
        if config.num_warmup:
            warm_up(clients, load, config, model, runs[0][: config.num_warmup])
        repeats = [measured(clients.drive(load, config, model, requests), limits_ms) for requests in runs]
    book = served_book(served_metrics(load))
    return make_record(
        "serve",
        model={"name": model} if book is None else {"name": model, "book": book},
        plan=None if book is None else str(book),
        workload=config,
        config=dataclasses.replace(load, api_key=None),
        repeats=repeats,
        processes=server_processes(load.url),
    )


def server_processes(url: str) -> list[ProcessState]:
    """The processes of a server on this machine; empty if it runs elsewhere or as another user."""
    address = read_address(url)
    is_here = address.host == "localhost" or address.host == "::1" or address.host.startswith("127.")
    return processes_of(listeners_at(address.port)) if is_here else []


def draw_runs(load: LoadConfig, config: BenchConfig) -> list[list[BenchRequest]]:
    """The requests of every repeat."""
    lengths = draw_lengths(config.workload, config.num_requests, config.seed)
    return [
        make_requests(
            lengths, vocab_size=load.vocab_size, seed=config.seed, repeat=repeat, request_rate=load.request_rate
        )
        for repeat in range(config.repeats)
    ]


def warm_up(
    clients: Clients, load: LoadConfig, config: BenchConfig, model: str, requests: Sequence[BenchRequest]
) -> None:
    """Send requests that are not counted, all at once.

    Raises:
        ConnectionError: None of them completed.
    """
    records = clients.drive(
        load, config, model, [dataclasses.replace(each, arrival_s=0.0) for each in requests]
    ).records
    errors = [record.error for record in records if record.error is not None]
    if len(errors) == len(records):
        raise ConnectionError(f"the server at {load.url} completes no request: {errors[0]}")


def measured(driven: Driven, limits_ms: dict[str, float]) -> RunMetrics:
    """The metrics of a run."""
    return measure(driven.records, driven.duration_s, limits_ms)
