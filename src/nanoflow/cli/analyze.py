"""`nanoflow analyze`: what a model costs on given GPUs, as a table.

Nothing is measured and no GPU is needed: `cost/` computes, from the figures of GPUs in `hardware.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanoflow.cli.expert_skew import HELP as EXPERT_SKEW_HELP
from nanoflow.cli.expert_skew import check_expert_skew
from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import DEFAULT_MODEL, KvCacheDType, option, read_value_of
from nanoflow.hardware import GPUS

if TYPE_CHECKING:
    from nanoflow.cost.analysis import BatchSize, MeanLengths
    from nanoflow.cost.model import CostedModel
    from nanoflow.cost.roofline import OperationCost, ResourceTimes
    from nanoflow.graph.experts import Routing
    from nanoflow.graph.layers import KvGroup
    from nanoflow.hardware import GpuGroup, ResourceRates
    from nanoflow.models.config_json import ModelConfig

_TEACH = """\
Say what a model costs on GPUs that you need not have: FLOPs, bytes and joules of
every operation of one iteration, the time each resource would take for it, what
bounds the workload, and the throughput if products ran without pause. MODEL is a
folder with a config.json, preset:NAME for a published architecture, or 'default'.
Numbers are 16-bit unless --quantization says otherwise, all GPUs share the model by
tensor parallelism, and the batch is the largest that fits unless
--max-batch-tokens says less. docs/cost-model.md has the formulas."""

_EXAMPLES = """\
  nanoflow analyze preset:llama-2-70b --gpu a100-80x8 --workload 512/1024
  nanoflow analyze preset:llama-3-8b --max-batch-tokens 2048
  nanoflow analyze ./my-model --gpu h100x2 --workload trace:lengths.csv"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeConfig:
    """What to analyze a model on."""

    gpu: str = option("h200", f"GPUs, NAME or NAMExN: {', '.join(GPUS)}; a100-80x8 is eight of one host")
    workload: str = option(
        "512/512",
        "Lengths of which the average counts: prompt tokens/output tokens, a mix of several, or trace:FILE.csv",
    )
    max_batch_tokens: int | None = option(None, "Token budget; what memory allows if not given")
    kv_cache_dtype: KvCacheDType = option(
        "auto",
        "Type of keys and values in the KV cache; auto: 16 bits; fp8_e4m3, or fp8: 8 bits and a scale for each",
        read=read_value_of("kv_cache_dtype"),
    )
    quantization: Literal["none", "fp8", "mxfp4"] = option(
        "none",
        "fp8: products of layers have 8-bit weights and activations, and the GPU's rate for these; mxfp4: experts have "
        "4-bit weights",
    )
    exchange: Literal["all-reduce", "all-gather"] = option(
        "all-reduce", "How several GPUs put the attention block together; both move the same bytes"
    )
    expert_skew: float = option(0.0, EXPERT_SKEW_HELP)

    def __post_init__(self) -> None:
        check_expert_skew(self.expert_skew)


_OPTIONS = OptionGroup(kind=AnalyzeConfig, title="GPUs and workload")
_COLUMNS = f"{'operation':<28}{'GFLOP':>11}{'mem GB':>9}{'net GB':>9}"


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow analyze`."""
    parser = add_command(commands, "analyze", "what a model costs on given GPUs, by arithmetic", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="Model folder, preset:NAME, or 'default'")
    _OPTIONS.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from nanoflow.cost.analysis import batch_shape, batch_within, largest_batch
    from nanoflow.cost.model import costed_model
    from nanoflow.cost.roofline import iteration_costs
    from nanoflow.graph.operation import KvType
    from nanoflow.graph.shard import Exchange
    from nanoflow.hardware import parse_gpus
    from nanoflow.models.quantised import has_mxfp4

    config = _OPTIONS.read(args)
    gpus, lengths = parse_gpus(config.gpu), _mean_lengths(config.workload)
    is_fp8 = config.quantization == "fp8"
    if is_fp8:
        gpus.require_fp8()
    model_config = _model_config(args.model)
    is_mxfp4 = has_mxfp4(config.quantization, model_config.quant_method)
    model = costed_model(
        model_config,
        config.expert_skew,
        KvType(config.kv_cache_dtype),
        is_fp8=is_fp8,
        is_mxfp4=is_mxfp4,
    )
    batch = batch_within(model, gpus, lengths, config.max_batch_tokens)
    costs = iteration_costs(model, batch_shape(model, batch, lengths), gpus.num_gpus, Exchange(config.exchange))
    small = ", ".join([*["FP8"] * is_fp8, *["MXFP4"] * is_mxfp4])
    kept_as = f"{small} and 16 bits" if small else "16 bits"
    lines = [
        *_head(model, gpus, lengths, batch, largest_batch(model, gpus, lengths), kept_as),
        "",
        *_table(costs, gpus),
        "",
        *_conclusions(model, gpus, lengths, batch, costs),
    ]
    print("\n".join(lines))
    return 0


def _model_config(model: str) -> ModelConfig:
    """The config.json of a folder or of a preset; nothing is downloaded."""
    from nanoflow.models import config_json as models
    from nanoflow.models.locate import locate_model
    from nanoflow.models.presets import PRESETS, preset_config, preset_name

    preset = preset_name(model)
    if preset is not None:
        return preset_config(preset)
    if model != DEFAULT_MODEL and not Path(model).expanduser().exists():
        nearest = difflib.get_close_matches(model.lower().rpartition("/")[2], PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean 'preset:{nearest[0]}'?" if nearest else "give a folder with a config.json, or preset:NAME"
        raise models.ModelError(f"model {model!r}: no such folder; {hint}")
    return models.load(locate_model(model))


def _mean_lengths(workload: str) -> MeanLengths:
    """Mean lengths of a workload."""
    from nanoflow.cost.analysis import MeanLengths
    from nanoflow.workload import kinds_of

    lengths = kinds_of(workload)
    return MeanLengths(
        prompt_tokens=sum(length.num_prompt_tokens for length in lengths) / len(lengths),
        output_tokens=sum(length.num_output_tokens for length in lengths) / len(lengths),
    )


def _head(
    model: CostedModel,
    gpus: GpuGroup,
    lengths: MeanLengths,
    batch: BatchSize,
    largest: BatchSize,
    kept_as: str,
) -> Iterator[str]:
    """Lines that say what is analyzed."""
    weights = f"weights {model.weight_bytes / 1e9:.1f} GB in {kept_as}"
    yield f"{'model':<12}{model.graph.name}, {_parameters(model)}, {weights}"
    yield f"{'GPUs':<12}{gpus.num_gpus} x {gpus.spec.title}, {gpus.memory_bytes / 1e9:.0f} GB"
    yield f"{'workload':<12}{lengths.prompt_tokens:.0f} prompt and {lengths.output_tokens:.0f} output tokens a request"
    groups = model.graph.kv_groups
    kept = f": {', '.join(map(_kept_tokens, groups))}" if any(group.window for group in groups) else ""
    yield f"{'KV cache':<12}{model.graph.kv_bytes_per_token(model.dtype_bytes):,} bytes a token{kept}"
    yield f"{'batch':<12}{_batch(batch)}, context {lengths.mean_context:.0f}"
    if batch != largest:
        yield f"{'':<12}(memory would allow {_batch(largest)})"
    if (routing := _routing(model)) is not None:
        yield f"{'experts':<12}{_experts(routing, round(batch.num_tokens))}"


def _routing(model: CostedModel) -> Routing | None:
    """How tokens choose experts; None for a dense model."""
    from nanoflow.graph.experts import ExpertDims

    return next((op.dims.routing for op in model.graph.layer if isinstance(op.dims, ExpertDims)), None)


def _experts(routing: Routing, num_tokens: int) -> str:
    """What a batch makes the experts of a sparse layer do."""
    load, touched = routing.load(num_tokens), routing.num_touched(num_tokens)
    return (
        f"{routing.num_per_token} of {routing.num_experts} a token; the batch reads {touched:.1f} "
        f"of a layer, each with {sum(load) / len(load):,.1f} tokens on average, the busiest with {load[0]:,.1f}"
    )


def _kept_tokens(group: KvGroup) -> str:
    """How much of a request the layers of a KV group keep."""
    kept = "all tokens" if group.window is None else f"the last {group.window:,} tokens"
    return f"{len(group.layers)} layers keep {kept} of a request"


def _parameters(model: CostedModel) -> str:
    if model.num_active_parameters == model.num_parameters:
        return f"{model.num_parameters / 1e9:.2f}e9 parameters"
    return f"{model.num_active_parameters / 1e9:.2f}e9 of {model.num_parameters / 1e9:.2f}e9 parameters a token"


def _batch(batch: BatchSize) -> str:
    return f"{batch.num_tokens:,.0f} tokens, {batch.num_decodes:,.0f} of them decodes"


def _table(costs: tuple[OperationCost, ...], gpus: GpuGroup) -> Iterator[str]:
    """One row for each operation, at peak rates."""
    from nanoflow.cost.roofline import resource_times, total

    rates = gpus.peak_rates()
    yield "One iteration, all layers and GPUs; milliseconds that each resource takes at its peak rate:"
    yield f"{_COLUMNS}{'compute':>10}{'memory':>9}{'network':>9}{'power':>9}{'J':>9}  bound"
    for cost in costs:
        times = resource_times(cost, gpus, rates)
        yield f"{_row(cost, gpus, times)}  {times.bound}"
    yield _row(total(costs), gpus, resource_times(total(costs), gpus, rates))


def _row(cost: OperationCost, gpus: GpuGroup, times: ResourceTimes) -> str:
    from nanoflow.cost.roofline import energy_j

    joules = energy_j(cost, gpus, times.longest_s)
    return (
        f"{cost.name:<28}{cost.flops / 1e9:>11,.1f}{cost.memory_bytes / 1e9:>9.1f}{cost.network_bytes / 1e9:>9.1f}"
        f"{times.compute_s * 1e3:>10.2f}{times.memory_s * 1e3:>9.2f}{times.network_s * 1e3:>9.2f}"
        f"{_or_dash(times.power_s, 1e3)}{_or_dash(joules, 1.0)}"
    )


def _or_dash(value: float | None, factor: float) -> str:
    return f"{'-':>9}" if value is None else f"{value * factor:>9.2f}"


def _conclusions(
    model: CostedModel, gpus: GpuGroup, lengths: MeanLengths, batch: BatchSize, costs: tuple[OperationCost, ...]
) -> Iterator[str]:
    """Lines that say what bounds the workload, at peak rates and, where known, at sustained rates."""
    kinds = {"at peak rates": gpus.peak_rates()}
    if gpus.spec.has_sustained:
        kinds["at sustained rates"] = gpus.sustained_rates()
    for title, rates in kinds.items():
        yield f"{title}: {_rates(rates, gpus, is_fp8=model.num_fp8_parameters > 0)}"
        yield from _bounds(model, gpus, lengths, batch, costs, rates)
    yield from _sources(gpus)


def _rates(rates: ResourceRates, gpus: GpuGroup, *, is_fp8: bool) -> str:
    network = f", {rates.network_bytes_per_s / 1e9:,.0f} GB/s of network" if gpus.num_gpus > 1 else ""
    fp8 = f" ({rates.fp8_speedup:g} times as many in FP8)" if is_fp8 else ""
    return f"{rates.compute_flops_per_s / 1e12:,.0f} TFLOP/s{fp8}, {rates.memory_bytes_per_s / 1e12:.2f} TB/s{network}"


def _bounds(
    model: CostedModel,
    gpus: GpuGroup,
    lengths: MeanLengths,
    batch: BatchSize,
    costs: tuple[OperationCost, ...],
    rates: ResourceRates,
) -> Iterator[str]:
    from nanoflow.cost.analysis import iteration_views, memory_to_compute, optimal_throughput, serial_bound
    from nanoflow.cost.roofline import total

    views = iteration_views(model, gpus, rates, batch, lengths, total(costs))
    shown = ", ".join(f"{bound} {time_s * 1e3:.2f} ms" for bound, time_s in views.by_bound.items())
    serial = serial_bound(costs, gpus, rates, round(batch.num_tokens))
    energy = "" if serial.energy_per_token_j is None else f", {serial.energy_per_token_j * 1e3:.1f} mJ/token"
    yield f"  {'iteration':<20}{shown}"
    yield f"  {'workload':<20}{views.bound}-bound; memory / compute {memory_to_compute(views):.2f}"
    yield f"  {'optimal throughput':<20}{optimal_throughput(model, gpus, rates):,.0f} tokens/s/GPU"
    yield f"  {'serial bound':<20}{serial.tokens_per_s_per_gpu:,.0f} tokens/s/GPU{energy}"


def _sources(gpus: GpuGroup) -> Iterator[str]:
    """Lines that say where the figures of the GPU come from."""
    from nanoflow.hardware import Figure

    yield f"where the numbers of one {gpus.spec.title} come from:"
    for field in dataclasses.fields(gpus.spec):
        figure = getattr(gpus.spec, field.name)
        if isinstance(figure, Figure):
            yield f"  {field.name:<30}{figure.value:<10.4g}{figure.source}"
