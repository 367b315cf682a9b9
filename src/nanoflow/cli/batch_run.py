"""Run `nanoflow batch`: start an engine, give the lines to the server's own application, and write the answers.

No port is opened: `server/inside.py` calls the routes. `batch_files/` reads, orders and writes lines.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nanoflow.batch_files import look_ahead
from nanoflow.batch_files.answers import Answers, Identity
from nanoflow.batch_files.lines import OK, AnswerLine
from nanoflow.batch_files.options import BatchConfig
from nanoflow.batch_files.order import RequestCost
from nanoflow.batch_files.requests import Counts, Requests, UnavailableError, error_of
from nanoflow.batch_files.source import Line, Scan, read_lines, scan
from nanoflow.cli.batch_progress import Progress
from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.cost.model import costed_model
from nanoflow.cost.requests import request_cost
from nanoflow.engine.async_engine import AsyncEngine
from nanoflow.engine.child import ENGINE_MODULE
from nanoflow.hardware import HardwareError, parse_gpus
from nanoflow.models.config_json import ModelError, load
from nanoflow.models.locate import locate_model
from nanoflow.models.presets import preset_config, preset_name
from nanoflow.server.app import create_app
from nanoflow.server.event_loop import run_loop
from nanoflow.server.inside import InsideCalls
from nanoflow.server.logs import start_logging

# No call is refused for want of room, as this process makes all of them and bounds their number.
_UNBOUNDED = 2**40
_FEWEST_AT_ONCE = 16
_EXIT_SIGNAL = 128
# What costs are taken for where the device or the model is not known: only ratios matter to an order.
_ANY_GPU, _ANY_MODEL = "h200", "llama-3-8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a run has ended: the exit status, and a summary for people."""

    status: int
    summary: str


def run_batch(
    source: Path,
    output: Path,
    engine_config: EngineConfig,
    config: BatchConfig,
    *,
    engine_module: str = ENGINE_MODULE,
) -> End:
    """Answer the lines of a file that have no answer yet.

    Args:
        source, output: The input file, and the file that answers are appended to.
        engine_config, config: Options.
        engine_module: What the engine's process runs; tests have engines of their own.

    Raises:
        ConfigError: The output has something else, another process writes to it, or the input changes; answers so far
            are kept.
        EngineError: The engine cannot start.
        OSError: A file cannot be read or opened.
        KeyboardInterrupt: Ctrl-C has ended the run; answers so far are kept.
    """
    start_logging("warning", "nanoflow batch")
    known = scan(source)
    with Answers.open(output, Identity.of(known, engine_config.model), known.num_numbers) as answers:
        run = _Run(
            source=source,
            known=known,
            answers=answers,
            engine_config=engine_config,
            config=config,
            engine_module=engine_module,
        )
        if len(answers.done) < known.num_lines:
            run_loop(run.until_signal())
        return run.end(output)


@dataclass(slots=True, kw_only=True)
class _Run:
    """One run of the command.

    Attributes:
        source: The input file.
        known: What is known of it.
        answers: The open output.
        engine_config, config, engine_module: As for `run_batch`.
        counts: Of the answers of this run.
        stopped_by: The signal that has ended the run; None if none has.
        problem: Why the run has ended before all lines were answered; None if it has not, or by a signal.
        first_error: The first answer of this run that is an error, for people; None if there is none.
        wall_s: Seconds of answering, without the start of the engine.
    """

    source: Path
    known: Scan
    answers: Answers
    engine_config: EngineConfig
    config: BatchConfig
    engine_module: str
    counts: Counts = field(default_factory=Counts)
    stopped_by: int | None = None
    problem: str | None = None
    first_error: str | None = None
    wall_s: float = 0.0

    async def until_signal(self) -> None:
        """Answer lines until all are answered, a signal comes, or the engine ends."""
        work = asyncio.ensure_future(self._work())

        def stop(number: int) -> None:
            self.stopped_by = self.stopped_by or number
            work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        with suppress(asyncio.CancelledError):
            await work

    async def _work(self) -> None:
        engine = await AsyncEngine.start(self.engine_config, module=self.engine_module)
        progress = Progress(self.known.num_lines, len(self.answers.done), is_shown=self.config.progress)
        try:
            await self._requests(engine, progress).run(self._order(engine)(self._unanswered()))
        except (UnavailableError, OSError) as error:
            self.problem = str(error)
        finally:
            progress.close()
            self.wall_s = progress.wall_s
            await engine.close()

    def _requests(self, engine: AsyncEngine, progress: Progress) -> Requests:
        names = self.config.served_model_name or self.engine_config.model
        server_config = ServerConfig(
            served_model_name=names, max_queued_requests=_UNBOUNDED, max_queued_tokens=_UNBOUNDED
        )
        inside = InsideCalls(create_app(engine, server_config))
        num_at_once = self.config.num_at_once or max(2 * engine.facts.max_num_seqs, _FEWEST_AT_ONCE)
        return Requests(
            call=inside.post,
            sink=self,
            repeated=self.known.repeated,
            num_at_once=min(num_at_once, self.known.num_lines),
            on_answer=progress.tell,
            counts=self.counts,
        )

    def append(self, number: int, line: AnswerLine) -> bool:
        """Write an answer."""
        answer = line.response
        if self.first_error is None and answer is not None and answer.status_code != OK:
            self.first_error = f"line {number}: status {answer.status_code}, {error_of(answer).message}"
        return self.answers.append(number, line)

    def _unanswered(self) -> Iterator[Line]:
        done = self.answers.done
        return (line for line in read_lines(self.source, self.known) if line.number not in done)

    def _order(self, engine: AsyncEngine) -> look_ahead.Order:
        if self.config.order == "arrival":
            return look_ahead.arrival
        return look_ahead.throughput(cost_of(self.engine_config, engine.facts.device), self.config.look_ahead)

    def end(self, output: Path) -> End:
        """The exit status and the summary; KeyboardInterrupt after Ctrl-C."""
        counts, num_done = self.counts, len(self.answers.done)
        tokens = counts.num_prompt_tokens + counts.num_completion_tokens
        parts = [f"{num_done:,} of {self.known.num_lines:,} lines are answered in {output}"]
        if counts.num_answered:
            parts.append(
                f"{counts.num_answered:,} now, {counts.num_failed:,} of them with an error: "
                f"{counts.num_prompt_tokens:,} prompt and {counts.num_completion_tokens:,} completion tokens in "
                f"{self.wall_s:,.1f} s, {tokens / max(self.wall_s, 1e-9):,.0f} tokens/s"
            )
        lines = [f"nanoflow batch: {'; '.join(parts)}"]
        if self.first_error is not None:
            lines.append(f"nanoflow batch: the first error: {self.first_error}")
        if self.problem is not None:
            lines.append(f"nanoflow: error: {self.problem}")
        if num_done < self.known.num_lines:
            lines.append("nanoflow batch: the same command goes on with the rest")
        status = 1 if self.problem is not None or counts.num_failed or self.answers.num_failed else 0
        if self.stopped_by is not None and num_done < self.known.num_lines:
            status = _EXIT_SIGNAL + self.stopped_by
        return End(status=status, summary="\n".join(lines))


def cost_of(config: EngineConfig, device: str) -> RequestCost:
    """What a request costs on a device; as on an H200 if the device is not known."""
    try:
        gpus = parse_gpus(device.partition(":")[0])
    except HardwareError:
        gpus = parse_gpus(_ANY_GPU)
    preset = preset_name(config.model)
    try:
        model = load(locate_model(config.model, config.revision)) if preset is None else preset_config(preset)
    except ModelError:
        model = preset_config(_ANY_MODEL)
    return request_cost(costed_model(model), gpus.sustained_rates())
