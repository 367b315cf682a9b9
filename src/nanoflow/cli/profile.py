"""`nanoflow profile`: measure the operations of a model on this machine, or estimate them for another.

`profiler/` measures; `profile/estimate.py` estimates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanoflow.cli.expert_skew import HELP as EXPERT_SKEW_HELP
from nanoflow.cli.expert_skew import check_expert_skew
from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, KvCacheDType, option, read_value_of

if TYPE_CHECKING:
    from nanoflow.profile.table import Profile
    from nanoflow.profiler.profile import Job

_TEACH = """\
Measure every operation of a model on this machine, alone at many sizes and pairs of
them side by side, and write it to a file that the search for plans reads. Each point
is taken under sustained load, so it takes minutes; a run that is interrupted goes on
where it was when started again with the same file. --estimate needs no GPU: it
computes the profile of given GPUs from their data sheets. MODEL is a folder,
preset:NAME for a published architecture, or 'default'; weights are drawn at random."""

_EXAMPLES = """\
  nanoflow profile preset:llama-3-8b -o llama-3-8b.json --max-batch-tokens 8192
  nanoflow profile default -o small.json --quick --max-batch-tokens 64
  nanoflow profile preset:llama-2-70b -o a100.json --estimate a100-80x8"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """What to measure."""

    max_batch_tokens: int = option(2048, "Token budget: no operation is measured on more tokens")
    quick: bool = option(False, "Look at each point half as long, and on a CPU at a few sizes only")
    fresh: bool = option(False, "Begin anew instead of adding what the file lacks")
    only: Literal["alone", "pairs", "stream", "partition", "beside", "inside"] | None = option(
        None, "Measure only operations alone, only pairs, or only the pairs of one mechanism"
    )
    device: str = option("auto", "Where to measure: auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "Type of weights and activations")
    kv_cache_dtype: KvCacheDType = option(
        "auto",
        "Type of keys and values in the KV cache; auto: that of the activations; fp8_e4m3, or fp8: 8 bits",
        read=read_value_of("kv_cache_dtype"),
    )
    quantization: Literal["none", "fp8", "mxfp4"] = option(
        "none",
        "fp8: the model as `--quantization fp8` serves it, with 8-bit weights and activations in products; mxfp4: "
        "experts with 4-bit weights, as a gpt-oss is served",
    )
    estimate: str | None = option(None, "Measure nothing: estimate for these GPUs, NAME or NAMExN")
    expert_skew: float = option(0.0, EXPERT_SKEW_HELP)

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1:
            raise ConfigError(f"max_batch_tokens must be positive, got {self.max_batch_tokens}")
        check_expert_skew(self.expert_skew)


_OPTIONS = OptionGroup(kind=ProfileConfig, title="what to measure")


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow profile`."""
    parser = add_command(commands, "profile", "measure a model's operations for the search", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} MODEL -o FILE [options]"
    parser.add_argument("model", metavar="MODEL", help="Model folder, preset:NAME, or 'default'")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, type=Path, help="The profile, JSON")
    _OPTIONS.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure or estimate, and print where the profile is."""
    config, path = _OPTIONS.read(args), Path(args.output).expanduser()
    profile = _measured(args.model, config, path) if config.estimate is None else _estimated(args.model, config, path)
    print(f"{path}: {len(profile.points)} points, {len(profile.pairs)} pairs")
    return 0


def _measured(model: str, config: ProfileConfig, path: Path) -> Profile:
    import torch

    from nanoflow.device.detect import resolve_device, resolve_dtype, total_memory_bytes, use_device
    from nanoflow.graph.operation import KvType
    from nanoflow.kernels.dispatch import unpacks_mxfp4
    from nanoflow.models.config_json import parse
    from nanoflow.models.quantised import has_mxfp4, quant_method_of
    from nanoflow.profiler.profile import new_job, run_job, setup_line
    from nanoflow.profiler.work import Sizes

    device = resolve_device(config.device)
    use_device(device)
    raw = _config_of(model)
    dtype = resolve_dtype(config.dtype, parse(raw).dtype, device)
    is_small = config.quick and device == torch.device("cpu")
    budget = config.max_batch_tokens
    # For keys and values of one layer. Free memory is not used, as it could change before a profile is continued.
    cache_bytes = min(16 << 30, total_memory_bytes(device) // 4)
    job = new_job(
        model,
        raw,
        device=device,
        dtype=dtype,
        kv_type=KvType(config.kv_cache_dtype),
        sizes=Sizes.small(budget) if is_small else Sizes(max_tokens=budget, max_cache_bytes=cache_bytes),
        path=path,
        is_quick=config.quick,
        is_fresh=config.fresh,
        only=config.only,
        is_fp8=config.quantization == "fp8",
        # Beside FP8 only where a server would keep them so.
        is_mxfp4=has_mxfp4(config.quantization, quant_method_of(raw))
        and (config.quantization == "mxfp4" or unpacks_mxfp4(device, dtype)),
        expert_skew=config.expert_skew,
    )
    print(f"{setup_line(job.profile.setup)}: {_size_of(job)}", flush=True)
    return run_job(job, path, show_progress=sys.stderr.isatty())


def _size_of(job: Job) -> str:
    """How much is to be measured."""
    wanted = job.wanted()
    known = len(job.profile.points) + len(job.profile.pairs)
    minutes = wanted.estimate_s(job.site.device, job.span) / 60
    return f"{len(wanted)} points to measure, {known} known, about {minutes:.1f} minutes"


def _estimated(model: str, config: ProfileConfig, path: Path) -> Profile:
    from nanoflow.graph.operation import KvType
    from nanoflow.hardware import parse_gpus
    from nanoflow.models.quantised import has_mxfp4, quant_method_of
    from nanoflow.profile.estimate import estimated_profile
    from nanoflow.profile.table import write_profile

    gpus = parse_gpus(config.estimate or "")
    raw = _config_of(model)
    profile = estimated_profile(
        model,
        raw,
        gpus,
        config.max_batch_tokens,
        kv_type=KvType(config.kv_cache_dtype),
        expert_skew=config.expert_skew,
        is_fp8=config.quantization == "fp8",
        is_mxfp4=has_mxfp4(config.quantization, quant_method_of(raw)),
    )
    write_profile(profile, path)
    return profile


def _config_of(model: str) -> Mapping[str, Any]:
    """The config.json of a model; `ModelError` if it is missing or invalid."""
    from nanoflow.models.config_json import load, read_config
    from nanoflow.models.locate import locate_model
    from nanoflow.models.presets import PRESETS, preset_config, preset_name

    preset = preset_name(model)
    if preset is not None:
        preset_config(preset)
        return PRESETS[preset]
    folder = locate_model(model)
    load(folder)
    return read_config(folder)[0]
