"""`nanoflow plan`: show pipeline plans.

`timeline/` draws plans and `simulate/` predicts their times; nothing is measured and no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.compat.unknown import unknown_option
from nanoflow.config import option

if TYPE_CHECKING:
    from nanoflow.graph.graph import OpGraph
    from nanoflow.graph.operation import BatchShape
    from nanoflow.plan.book import PlanEntry, StoredBook
    from nanoflow.plan.plan import PipelinePlan
    from nanoflow.profile.table import Profile
    from nanoflow.timeline.timeline import Timeline

_TEACH = """\
Look at pipeline plans: which operation runs on which nano-batch, when, and beside
what."""

_EXAMPLES = "  nanoflow plan show plan.json"

_TEACH_SHOW = """\
Draw a plan as lanes by time, with the use of each resource below: in the terminal,
with --svg as a picture, and with --chrome-trace as a file that Perfetto opens. PLAN
is a file with a plan or with a plan book. A book with several plans is listed, and the
plan that runs most of the time is drawn, or the one that --name chooses. With
--profile the times are predicted from its measurements, and compared with the
sequential plan. Without it, they are those that the search wrote into the plan, or,
if there are none, only the order is drawn. --trace adds what a profiler saw when the plan ran, on the same scale."""

_EXAMPLES_SHOW = """\
  nanoflow plan show plan.json
  nanoflow plan show book.json --name overlapped-2048 --profile profile.json
  nanoflow plan show plan.json --profile profile.json --svg plan.svg --decodes 1024
  nanoflow plan show plan.json --profile profile.json --trace trace.json --layers 2"""

_FALLBACK_COLUMNS = 120
# Keys of each decode if neither the user nor the book gives them.
_CONTEXT = 1024
_HEADINGS = ("name", "digest", "tokens", "decode share", "context", "keys", "lanes", "us a layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """What to show of a plan."""

    name: str | None = option(None, "Which plan of a book: its name or digest")
    profile: str | None = option(None, "Profile to predict times from")
    model: str | None = option(
        None, "Model folder, preset:NAME or 'default': says what bounds each operation where there is no profile"
    )
    trace: str | None = option(None, "Trace in Chrome's format of whole iterations; needs --profile or --model")
    svg: str | None = option(None, "Write a picture to this file")
    chrome_trace: str | None = option(None, "Write the timelines to this file for Perfetto (ui.perfetto.dev)")
    width: int | None = option(None, "Columns of the drawing; those of the terminal if not given")
    layers: int = option(3, "Layers to draw")
    first_layer: int | None = option(None, "First layer to take from the trace; layers in the middle if not given")
    decodes: int | None = option(
        None, "Decode tokens of the batch; those that the book has the plan for if not given, else half of its tokens"
    )
    context: int | None = option(
        None, f"Keys that each decode token sees; the book's, else {_CONTEXT}, if not given; prompts are as long"
    )

    kv_host_gib: float = option(
        0.0, "Host memory below the KV cache, GiB: with any the copies of its pages are a lane; needs --profile"
    )

    def __post_init__(self) -> None:
        if self.kv_host_gib < 0 or (self.kv_host_gib and self.profile is None):
            raise ValueError("--kv-host-gib must be at least 0, and needs --profile for the rate of copies")
        for name in ("layers", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")


_OPTIONS = OptionGroup(kind=ShowConfig, title="what to show")


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow plan` and its subcommands."""
    parser = add_command(commands, "plan", "look at pipeline plans", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} ACTION [options]"
    actions = parser.add_subparsers(title="actions", metavar="ACTION", prog=parser.prog, required=True)
    show = add_command(actions, "show", "draw a plan, or list those of a book", _TEACH_SHOW, _EXAMPLES_SHOW)
    show.usage = f"{show.prog} PLAN [options]"
    show.add_argument("plan", metavar="PLAN", help="File with a plan or a plan book")
    _OPTIONS.add_to(show)
    show.set_defaults(run=run_show)


def run_show(args: argparse.Namespace) -> int:
    """Draw a plan, or list the plans of a book."""
    from nanoflow.plan.book import load_book
    from nanoflow.timeline.chrome import chrome_trace
    from nanoflow.timeline.drawing_svg import svg
    from nanoflow.timeline.drawing_text import text

    config = _OPTIONS.read(args)
    book = load_book(Path(args.plan))
    entry = _chosen(book, config.name)
    if entry is None or (config.name is None and len(book.plans) > 1):
        print("\n".join(_listed(book)))
    if entry is None:
        if config.svg is not None or config.chrome_trace is not None:
            raise ValueError(f"{args.plan} has no plan to draw: every batch runs sequentially")
        return 0
    if config.name is None and len(book.plans) > 1:
        if config.profile is None and config.model is None and config.svg is None and config.chrome_trace is None:
            return 0
        print(f"\ndrawing {entry.plan.name} ({entry.plan.digest}), the plan that runs most of the time")
    plan, config = entry.plan, _for_its_batches(entry, config)
    timelines, sequential_s = _timelines(plan, config)
    if config.svg is not None:
        Path(config.svg).write_text(svg(timelines, sequential_s=sequential_s), encoding="utf-8")
    if config.chrome_trace is not None:
        Path(config.chrome_trace).write_bytes(chrome_trace(timelines))
    print(
        text(
            timelines,
            width=config.width or shutil.get_terminal_size((_FALLBACK_COLUMNS, 0)).columns,
            sequential_s=sequential_s,
            colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ,
            is_ascii=not _can_show_blocks(),
        ),
        end="",
    )
    return 0


def _chosen(book: StoredBook, name: str | None) -> PlanEntry | None:
    """The first entry whose plan has this name or digest, or the first entry without a name; None if there is none.

    The search writes entries in descending order of the time that their batches take.
    """
    for entry in book.entries:
        if name in (None, entry.plan.name, entry.plan.digest):
            return entry
    if name is None:
        return None
    if not book.entries:
        raise ValueError(f"no plan {name!r}: the plan book has no plans")
    raise ValueError(unknown_option(name, [plan.name for plan in book.plans]).replace("option", "plan", 1))


def _for_its_batches(entry: PlanEntry, config: ShowConfig) -> ShowConfig:
    """The options; where no batch is given, one from the middle of the ranges of the entry."""
    decodes, context = config.decodes, config.context
    if decodes is None and (entry.min_decode_share > 0 or entry.max_decode_share < 1):
        decodes = round((entry.min_decode_share + entry.max_decode_share) / 2 * entry.plan.num_tokens)
    share = (entry.plan.num_tokens // 2 if decodes is None else decodes) / entry.plan.num_tokens
    if context is None and entry.max_keys is not None and share > 0:
        context = max(round((entry.min_keys + entry.max_keys) / 2 / share), 1)
    if context is None and entry.max_decode_context is not None:
        context = max(round((entry.min_decode_context + entry.max_decode_context) / 2), 1)
    return dataclasses.replace(config, decodes=decodes, context=context or _CONTEXT)


def _listed(book: StoredBook) -> Iterator[str]:
    """The limits that the book is for, and a row for each entry."""
    if book.limits is not None:
        yield f"best limits: {book.limits}"
    if book.prediction is not None:
        how = "with gains as measured" if book.prediction.is_measured else "predicted"
        yield f"sequential best: {book.prediction.sequential_limits}"
        for each in book.prediction.workloads:
            yield (
                f"{each.workload} x {each.num_requests:,}: {each.tokens_per_s:,.0f} tokens/s, {how}, sequentially "
                f"{each.sequential_tokens_per_s:,.0f}: {each.gain:.3f}x of the best sequential run"
            )
    if not book.entries:
        yield "the plan book has no plans: every batch runs sequentially, which is what was predicted to be fastest"
        yield "nanoflow search says what the best candidates were; --margin and --measure decide what it keeps"
        return
    if book.made_for is not None:
        yield f"plans for {book.made_for.model} on {book.made_for.hardware}; --name NAME draws one"
    rows = [_HEADINGS, *(_entry(entry) for entry in book.entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *numbers])


def _entry(entry: PlanEntry) -> tuple[str, ...]:
    """The columns of a row, as in `_HEADINGS`."""
    plan = entry.plan
    return (
        plan.name,
        plan.digest,
        f"{entry.min_tokens}-{entry.max_tokens}",
        f"{entry.min_decode_share:.2f}-{entry.max_decode_share:.2f}",
        _range(entry.min_decode_context, entry.max_decode_context),
        _range(entry.min_keys, entry.max_keys),
        str(len(plan.lanes)),
        "-" if plan.predicted_makespan_s is None else f"{plan.predicted_makespan_s * 1e6:,.1f}",
    )


def _range(least: float, most: float | None) -> str:
    return f"{least:.0f}-" if most is None else f"{least:.0f}-{most:.0f}"


def _timelines(plan: PipelinePlan, config: ShowConfig) -> tuple[list[Timeline], float | None]:
    """The predicted timeline of the plan, with a trace also the measured one, and a layer's time run sequentially."""
    from nanoflow.profile.table import Profile
    from nanoflow.timeline.drawing import order_timeline

    shape = _shape(plan, config)
    profile = None if config.profile is None else Profile.load(Path(config.profile))
    graph = _graph(plan, config.model) if profile is None else _profiled_graph(plan, profile)
    if graph is not None:
        plan.validate(graph)
    sequential_s = None
    if profile is None or graph is None:
        expected = order_timeline(plan, graph, config.layers)
    else:
        expected, sequential_s = _predicted(plan, profile, graph, shape, config)
    if config.trace is None:
        return [expected], sequential_s
    if graph is None:
        raise ValueError("--trace needs --profile or --model, to know how many layers ran")
    return [expected, _measured(plan, graph, shape, config, Path(config.trace))], sequential_s


def _shape(plan: PipelinePlan, config: ShowConfig) -> BatchShape:
    """A batch as large as the plan, whose prompts start in it and are as long as the context of its decodes."""
    from nanoflow.graph.operation import BatchShape

    context = config.context or _CONTEXT

    decodes = plan.num_tokens // 2 if config.decodes is None else config.decodes
    if not 0 <= decodes <= plan.num_tokens:
        raise ValueError(f"--decodes must be from 0 to the plan's {plan.num_tokens} tokens, got {decodes}")
    prefills = plan.num_tokens - decodes
    return BatchShape(
        num_tokens=plan.num_tokens,
        num_decode_tokens=decodes,
        decode_context=decodes * context,
        prefill_context=prefills * (min(context, prefills) + 1) // 2,
        prefill_kv_tokens=prefills,
        num_sampled=decodes,
    )


def _profiled_graph(plan: PipelinePlan, profile: Profile) -> OpGraph:
    """The graph of the profiled model, with the plan's kind of exchange between GPUs."""
    from nanoflow.simulate.iteration import graphs_of

    graphs = graphs_of(profile)
    planned = {nano.operation for nano in plan.nano_operations}
    return next((graph for graph in graphs if {op.name for op in graph.layer} == planned), graphs[0])


def _graph(plan: PipelinePlan, model: str | None) -> OpGraph | None:
    """The model's graph in the form that the plan was made for."""
    from nanoflow.graph.fp8 import in_fp8
    from nanoflow.graph.fuse import fuse_swiglu
    from nanoflow.models import config_json as models
    from nanoflow.models.locate import locate_model
    from nanoflow.models.presets import preset_config, preset_name
    from nanoflow.models.registry import build_graph

    if model is None:
        return None
    preset = preset_name(model)
    graph = build_graph(models.load(locate_model(model)) if preset is None else preset_config(preset), None)
    planned = {nano.operation for nano in plan.nano_operations}
    forms = (fuse_swiglu(graph), in_fp8(graph), fuse_swiglu(in_fp8(graph)))
    return next((form for form in forms if {op.name for op in form.layer} == planned), graph)


def _predicted(
    plan: PipelinePlan, profile: Profile, graph: OpGraph, shape: BatchShape, config: ShowConfig
) -> tuple[Timeline, float | None]:
    from nanoflow.plan.sequential import sequential_plan
    from nanoflow.simulate.iteration import predict_timeline

    timeline = predict_timeline(plan, profile, shape, config.layers, kv_host_gib=config.kv_host_gib)
    sequential = predict_timeline(sequential_plan(graph, plan.num_tokens), profile, shape, config.layers)
    batch = f"{shape.num_decode_tokens:,} decodes with {_keys(shape):,} keys in {plan.num_tokens:,} tokens"
    return dataclasses.replace(timeline, name=f"{plan.name}, predicted for {batch}"), sequential.period_s


def _keys(shape: BatchShape) -> int:
    """Mean keys of a decode."""
    return round(shape.decode_context / max(shape.num_decode_tokens, 1))


def _measured(plan: PipelinePlan, graph: OpGraph, shape: BatchShape, config: ShowConfig, path: Path) -> Timeline:
    from nanoflow.timeline.trace import read_chrome_trace, timeline_of_trace

    return timeline_of_trace(
        read_chrome_trace(path),
        plan,
        shape,
        num_layers=graph.num_layers,
        first_layer=config.first_layer,
        num_shown=config.layers,
        resources={op.name: op.resource for op in graph.layer},
    )


def _can_show_blocks() -> bool:
    try:
        "░▁·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
