"""gpt-oss: checkpoints in every form they come in, what is refused, and the kernels that its experts get."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoflow.config import EngineConfig
from nanoflow.engine.build import build_engine
from nanoflow.executor.inputs import InputBuilder
from nanoflow.graph.experts import ClampedSwiglu, ExpertDims, Routing
from nanoflow.graph.graph import RopeSpec
from nanoflow.graph.nanobatch import TokenRange
from nanoflow.graph.operation import Operation, OpKind, Resource
from nanoflow.kernels import cpu, dispatch, reference
from nanoflow.kernels.launch import Launch
from nanoflow.models import config_json as model_config
from nanoflow.models import dequantise
from nanoflow.models import weights as weights_module
from nanoflow.models.config_json import ModelError
from nanoflow.models.contents import read_contents
from nanoflow.models.presets import preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, load_weights
from nanoflow.profiler.site import Site, attention_weights, equal_requests
from tests.driving import HuggingFace
from tests.families import make_model
from tests.logits import prompt_logits
from tests.mxfp4 import write_twins

CPU = torch.device("cpu")
PROMPT = [number * 37 % 131 for number in range(40)]
EXPERTS = "model.layers.1.mlp.experts"
Change = Callable[[dict[str, torch.Tensor]], None]


class _Copier:
    """Copies at once, in the thread that it was made for, as one to a GPU: from any layout to contiguous memory."""

    def __init__(self, device: torch.device) -> None:
        self.thread = threading.get_ident()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert threading.get_ident() == self.thread
        target.view(-1).copy_(source.reshape(-1))

    def wait(self) -> None:
        """Nothing is queued."""


def _load(folder: Path, **options: Any) -> Weights:
    graph = build_graph(model_config.load(folder), None)
    return load_weights(graph, folder, torch.float32, CPU, show_progress=False, **options)


def _are_equal(one: Weights, other: Weights) -> bool:
    groups = zip((one.shared, *one.layers), (other.shared, *other.layers), strict=True)
    return all(torch.equal(first[name], second[name]) for first, second in groups for name in first)


def _change(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    write_twins(make_model("gpt-oss", folder))
    return folder


@pytest.fixture
def packed(made: Path, tmp_path: Path) -> Path:
    """A model in MXFP4 that a test may change, with its twin."""
    shutil.copytree(made, tmp_path / "packed")
    return tmp_path / "packed"


def test_experts_are_read_in_the_order_that_kernels_take(tmp_path: Path) -> None:
    """Checkpoints alternate rows of gate and up, in matrices and biases, and have the matrices transposed."""
    make_model("gpt-oss", tmp_path)
    stored, weights = load_file(tmp_path / "model.safetensors"), _load(tmp_path).layers[1]
    for expert in range(6):
        rows, bias = stored[f"{EXPERTS}.gate_up_proj"][expert].T, stored[f"{EXPERTS}.gate_up_proj_bias"][expert]
        assert torch.equal(weights["experts_in.weight"][expert], torch.cat((rows[::2], rows[1::2])))
        assert torch.equal(weights["experts_in.bias"][expert], torch.cat((bias[::2], bias[1::2])))
        assert torch.equal(weights["experts_out.weight"][expert], stored[f"{EXPERTS}.down_proj"][expert].T)
        assert torch.equal(weights["experts_out.bias"][expert], stored[f"{EXPERTS}.down_proj_bias"][expert])


@pytest.mark.parametrize("is_packed", [False, True])
def test_pieces_and_threads_make_the_same(is_packed: bool, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert by expert, and a few rows at a time: that is what bounds memory."""
    twin = packed / "twin"
    folder, expected = packed if is_packed else twin, _load(twin)
    monkeypatch.setattr(weights_module, "_MAPPED_BYTES", 4096)
    monkeypatch.setattr(dequantise, "_CHUNK_NUMBERS", 1)
    sizes: list[int] = []
    mapped = weights_module._mapped

    def noted(piece: Any, *args: Any) -> dict[str, torch.Tensor]:
        found = mapped(piece, *args)
        if piece.part.name.endswith("experts.gate_up_proj"):
            sizes.extend(len(tensor) for tensor in found.values())
        return found

    monkeypatch.setattr(weights_module, "_mapped", noted)
    assert _are_equal(_load(folder), expected)
    assert _are_equal(_load(folder, make_copier=_Copier), expected)
    # Of three layers, six experts, each alone, twice; packed ones have blocks and scales.
    assert sizes == [1] * (3 * 6 * 2 * (1 + is_packed))


def test_mxfp4_is_the_model_of_its_numbers(packed: Path, tmp_path: Path) -> None:
    plain = prompt_logits(make_model("gpt-oss", tmp_path), PROMPT)
    twin = packed / "twin"
    logits = prompt_logits(packed, PROMPT)
    torch.testing.assert_close(logits, HuggingFace(twin).logits(PROMPT), rtol=2e-4, atol=2e-4)
    assert not torch.allclose(logits, plain, atol=1e-2)
    assert _are_equal(_load(packed), _load(twin))
    assert read_contents(build_graph(model_config.load(packed), None), packed).title == "MXFP4"


def test_transformers_reads_the_same_from_mxfp4(packed: Path) -> None:
    """So the files that these tests write are what published ones are."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(packed, **options).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].float()
    torch.testing.assert_close(prompt_logits(packed, PROMPT), expected, rtol=2e-4, atol=2e-4)


def test_numbers_are_exact_in_bfloat16_and_any_scale_but_one_is_taken(packed: Path) -> None:
    def extreme(tensors: dict[str, torch.Tensor]) -> None:
        scales = tensors[f"{EXPERTS}.down_proj_scales"]
        scales[0, 0], scales[0, 1] = 0, 252

    _change(packed, extreme)
    graph = build_graph(model_config.load(packed), None)
    exact, rounded = (
        load_weights(graph, packed, dtype, CPU, show_progress=False).layers[1]["experts_out.weight"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.isfinite().all()
    assert torch.equal(rounded.float(), exact)
    assert exact[0, 0].abs().max() <= 6 * 2.0**-127
    assert exact[0, 1].abs().max() >= 0.5 * 2.0**125


def test_blocks_and_scales_may_be_in_different_files(packed: Path) -> None:
    twin = packed / "twin"
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    files = {name: f"model-{1 + name.endswith('scales')}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, packed / file)
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert _are_equal(_load(packed), _load(twin))


def test_the_start_says_what_is_stored_and_what_is_served(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanoflow"):
        build_engine(EngineConfig(model=str(packed), device="cpu", dtype="bfloat16", max_num_seqs=2)).close()
    assert any("weights are stored as MXFP4 and served as bfloat16: " in record.message for record in caplog.records)


def _without(role: str) -> Change:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{EXPERTS}.{role}"]

    return remove


def _as(role: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({f"{EXPERTS}.{role}": tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("gate_up_proj_scales"), f"lacks 1 tensor ({EXPERTS}.gate_up_proj_scales) that GptOssForCausalLM"),
        (_without("down_proj_blocks"), f"lacks 1 tensor ({EXPERTS}.down_proj_blocks) that GptOssForCausalLM"),
        (_without("down_proj_bias"), f"lacks 1 tensor ({EXPERTS}.down_proj_bias) that GptOssForCausalLM"),
        (
            _as("down_proj_scales", torch.zeros(6, 64, 2, dtype=torch.uint8)),
            "down_proj_scales has shape (6, 64, 2), expected (6, 64, 3) by config.json",
        ),
        (
            _as("gate_up_proj_blocks", torch.zeros(6, 96, 2, 16, dtype=torch.uint8)),
            "gate_up_proj_blocks has shape (6, 96, 2, 16), expected (6, 192, 2, 16) by config.json",
        ),
        (_as("down_proj_scales", torch.zeros(6, 64, 3)), "down_proj_scales has type F32, expected U8"),
        (
            _as("down_proj_scales", torch.full((6, 64, 3), 255, dtype=torch.uint8)),
            "down_proj_scales has a scale of 255, which is no number; download it again",
        ),
        (_as("down_proj", torch.zeros(6, 96, 64)), f"has 2 tensors ({EXPERTS}.down_proj_blocks, {EXPERTS}.down_proj_s"),
        (_as("strange", torch.zeros(1)), f"has 1 tensor ({EXPERTS}.strange) that GptOssForCausalLM"),
    ],
)
def test_damaged_tensors_are_one_line(change: Change, message: str, packed: Path) -> None:
    _change(packed, change)
    with pytest.raises(ModelError) as caught:
        _load(packed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_matrix_that_is_not_transposed_is_refused(tmp_path: Path) -> None:
    make_model("gpt-oss", tmp_path)
    _change(tmp_path, _as("down_proj", torch.zeros(6, 64, 96)))
    with pytest.raises(ModelError, match=r"down_proj has shape \(6, 64, 96\), expected \(6, 96, 64\) by config.json"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotation": "hadamard"}, "field 'rotation' is not known; remove it if it says nothing"),
        ({"quant_method": "nvfp4"}, "weights quantised by NVFP4 are not served, FP8, AWQ, GPTQ"),
    ],
)
def test_damaged_configs_are_one_line(fields: dict[str, Any], message: str, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **fields}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        model_config.load(packed)
        _load(packed)


@pytest.mark.parametrize("kernels", [cpu.CPU_KERNELS, reference.REFERENCE_KERNELS], ids=["cpu", "reference"])
def test_experts_by_their_formula(kernels: dispatch.Kernels) -> None:
    """One product a row in float64; expert 0 has 300 rows, which a CPU divides, and expert 2 none."""
    count, width, inner, limit = 300, 16, 8, 0.7
    routing = Routing(num_experts=4, num_per_token=2)
    sizes: dict[str, Any] = {"routing": routing, "has_bias": True}
    clamped = ClampedSwiglu(alpha=1.702, limit=limit)
    into = ExpertDims(in_features=width, out_features=2 * inner, is_gated=True, clamped=clamped, **sizes)
    out = ExpertDims(in_features=inner, out_features=width, is_gated=False, **sizes)
    chosen = torch.tensor([[0, 1 if token % 3 else 3] for token in range(count)], dtype=torch.int32)
    flat = chosen.flatten()
    rows = flat.sort(stable=True).indices.int().view(count, 2)
    ends = torch.tensor([int((flat <= expert).sum()) for expert in range(4)], dtype=torch.int32).expand(count, 4)
    generator = torch.Generator().manual_seed(0)
    x, first, first_bias, second, second_bias = (
        torch.randn(shape, generator=generator)
        for shape in ((count, width), (4, 2 * inner, width), (4, 2 * inner), (4, width, inner), (4, width))
    )
    activation, result = (torch.full((count, 2 * size), torch.nan) for size in (inner, width))
    _run(kernels, OpKind.EXPERTS_IN, into, (x, rows, ends), activation, (first, first_bias))
    _run(kernels, OpKind.EXPERTS_OUT, out, (activation, rows, ends), result, (second, second_bias))
    for row, expert in enumerate(flat.tolist()):
        gate, up = (first[expert].double() @ x[row // 2].double() + first_bias[expert]).chunk(2)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        middle = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        expected = second[expert].double() @ middle + second_bias[expert]
        torch.testing.assert_close(result.view(2 * count, width)[row].double(), expected, rtol=1e-4, atol=1e-5)


def _run(
    kernels: dispatch.Kernels,
    kind: OpKind,
    dims: ExpertDims,
    reads: tuple[torch.Tensor, ...],
    written: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
) -> None:
    op = Operation(name="experts", kind=kind, resource=Resource.COMPUTE, reads=("x",), writes=("y",), dims=dims)
    inputs = InputBuilder((RopeSpec(inv_freq=(1.0,)),), num_rows=1, device=CPU).build(equal_requests(1, 0, 1, 4))
    tokens = TokenRange(start=0, stop=len(written))
    launch = Launch(
        op=op, layer=0, tokens=tokens, reads=reads, writes=(written,), weights=weights, inputs=inputs, cache=None
    )
    kernels[kind](launch)


def test_the_profiler_gives_attention_its_sinks() -> None:
    graph = build_graph(preset_config("gpt-oss-20b"), None)
    site = Site(graph=graph, device=CPU, dtype=torch.bfloat16, page_size=16)
    weights = attention_weights(site, graph)
    assert weights.shared == {}
    assert [{name: each.shape for name, each in layer.items()} for layer in weights.layers] == 24 * [
        {"attn.sinks": (64,)}
    ]
