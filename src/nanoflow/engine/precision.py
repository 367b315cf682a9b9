"""Which weights of a model are kept in FP8 or MXFP4: what the user asks for, what is stored, what the device can.

Everything else has the type that `dtype` says. `graph/fp8.py` and `graph/mxfp4.py` change the graph,
`models/placing.py` the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.graph.experts import ExpertDims
from nanoflow.graph.fp8 import fp8_candidates, with_fp8
from nanoflow.graph.graph import Fp8, OpGraph
from nanoflow.graph.mxfp4 import mxfp4_candidates, with_mxfp4
from nanoflow.graph.operation import KvType
from nanoflow.kernels.dispatch import multiplies_fp8, unpacks_mxfp4
from nanoflow.models.config_json import ModelConfig
from nanoflow.models.contents import Contents
from nanoflow.models.fp8_stored import kept_as_stored
from nanoflow.models.mxfp4_stored import packed_as_stored
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import check_weights


def graph_of(
    config: EngineConfig,
    model_config: ModelConfig,
    folder: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[OpGraph, str | None]:
    """The graph that a model is served by, its products not yet fused, and a line on its weights: `served_graph`.

    Args:
        config: Options.
        model_config: The model.
        folder: Its folder or GGUF file, whose headers are checked; None for a preset.
        dtype, device: As `served_graph` has them.

    Raises:
        ConfigError, ModelError: The model does not fit its checkpoint, or neither it nor the device has FP8.
    """
    graph = build_graph(model_config, config.max_model_len).with_kv_type(KvType(config.kv_cache_dtype))
    contents = None if folder is None or config.load_format == "random" else check_weights(graph, folder)
    packed = frozenset(mxfp4_candidates(graph)) if model_config.quant_method == "mxfp4" else frozenset[str]()
    return served_graph(config, graph, contents, dtype, device, drawn_in_mxfp4=packed)


def served_graph(
    config: EngineConfig,
    graph: OpGraph,
    contents: Contents | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    drawn_in_mxfp4: Set[str] = frozenset(),
) -> tuple[OpGraph, str | None]:
    """The graph that is served, and a line on its weights if there is something to say.

    Args:
        config: Options.
        graph: The model, all in one type.
        contents: Its checkpoint; None if weights are drawn at random.
        dtype: Type of activations, and of all weights that are in neither FP8 nor MXFP4.
        device: Where it runs.
        drawn_in_mxfp4: Names of parameters that are drawn in MXFP4 if weights are drawn at random.

    Raises:
        ConfigError: FP8 is asked for, and neither model nor device have it.
    """
    stored = {} if contents is None else kept_as_stored(graph, contents)
    can_multiply = multiplies_fp8(device, dtype)
    weights: Mapping[str, Fp8] = {}
    if config.quantization == "fp8":
        if device.type == "cuda" and not can_multiply:
            raise ConfigError(
                "quantization fp8 needs a GPU of compute capability 9.0 or later (Hopper) and a dtype of 16 bits, "
                f"this is {_name(dtype)} on {torch.cuda.get_device_name(device)}: use quantization none"
            )
        weights = {name: stored.get(name, Fp8()) for name in fp8_candidates(graph)}
        if not weights:
            raise ConfigError(f"quantization fp8: {graph.name} has no products of sizes that suit it")
    elif config.quantization == "auto" and can_multiply:
        weights = stored
    packed = drawn_in_mxfp4 if contents is None else packed_as_stored(graph, contents)
    can_unpack = config.quantization != "none" and unpacks_mxfp4(device, dtype)
    served = with_mxfp4(with_fp8(graph, weights), packed if can_unpack else ())
    kept = [form for form, is_kept in (("FP8", weights), ("MXFP4", packed and can_unpack)) if is_kept]
    line = _line(contents, [*kept, _name(dtype)], served.parameter_bytes(dtype.itemsize))
    if line is not None and "FP8" in kept and "MXFP4" not in kept:
        line += _left_out(served, dtype)
    if contents is None or line is None:
        return served, line
    if weights and contents.has_activation_scales:
        line = f"{line}; rows of activations get scales of their own, those in it are not used"
    if stored and config.quantization == "auto" and not can_multiply:
        line = f"{line}; products in FP8 need a GPU from Hopper on"
    if packed and config.quantization != "none" and not can_unpack:
        line = f"{line}; products in MXFP4 need a GPU from Hopper on and bfloat16"
    return served, line


def _left_out(graph: OpGraph, dtype: torch.dtype) -> str:
    """What is said of experts that no kernel multiplies in FP8; empty if there are none."""
    has_biases = any(isinstance(op.dims, ExpertDims) and not op.dims.is_plain for op in graph.layer_operations)
    return f"; experts with biases stay in {_name(dtype)}" if has_biases else ""


def _line(contents: Contents | None, types: Sequence[str], num_bytes: int) -> str | None:
    """What weights are stored and served as, the types in `types`; None if there is nothing to say."""
    if contents is not None and contents.title is not None:
        return contents.described(_listed(types), num_bytes)
    if len(types) == 1:
        return None
    size = f"{num_bytes / 2**30:.2f} GiB"
    if "FP8" in types:
        others = _listed(types[1:])
        return f"weights are quantised to FP8 (a scale for each row) where they can be, else {others}: {size}"
    return f"weights are {_listed(types)}: {size}"


def _listed(types: Sequence[str]) -> str:
    *most, last = types
    return f"{', '.join(most)} and {last}" if most else last


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
