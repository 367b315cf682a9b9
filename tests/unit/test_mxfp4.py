"""Experts kept in MXFP4: words and scales, products of them by Triton's interpreter, and models that are served so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tests.triton_interpreter  # noqa: F401  (it must come before the kernels)

# isort: split
from safetensors.torch import load_file, save_file

from nanoflow.cli.main import main
from nanoflow.config import EngineConfig, Quantization
from nanoflow.engine import precision
from nanoflow.graph.experts import ClampedSwiglu
from nanoflow.graph.graph import GraphError, OpGraph
from nanoflow.graph.mxfp4 import in_mxfp4
from nanoflow.graph.operation import BatchShape, OpKind
from nanoflow.hardware import parse_gpus
from nanoflow.kernels import dispatch
from nanoflow.kernels import reference_mxfp4 as reference
from nanoflow.kernels import triton_experts_mxfp4 as fast
from nanoflow.kernels.mxfp4_tiles import BESIDE, WHOLE_CARD, Mxfp4Tiles, choose_mxfp4_tiles
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.kernels.restricted import kernels_beside, kernels_on
from nanoflow.models import config_json, weights
from nanoflow.models.config_json import ModelError
from nanoflow.models.mxfp4 import lay_out, numbers_of
from nanoflow.models.presets import PRESETS, preset_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import Weights, load_weights, random_weights
from nanoflow.profile.estimate import estimated_profile
from nanoflow.profile.table import Profile
from nanoflow.simulate.iteration import graphs_of
from tests.all_cases import part
from tests.compiling import compiled
from tests.driving import greedy, random_prompts, run_model
from tests.expert_cases import ROUTINGS, ExpertCase, exact
from tests.families import make_model
from tests.gemm_cases import assert_linear, assert_linear_swiglu
from tests.mxfp4 import quantise, write_twins
from tests.mxfp4_cases import packed
from tests.unit.test_beside import RESERVED_BYTES, SM_BYTES, SM_REGISTERS, attention_bytes, attention_registers
from tests.unit.test_gpt_oss import _Copier
from tests.unit.test_triton_gemm import HOPPER_BYTES

CPU = torch.device("cpu")
SMALL = Mxfp4Tiles(max_rows=0, block_m=16, block_n=64, block_k=64, num_stages=2, programs_per_sm=1, group_m=2)
CLAMPED = ClampedSwiglu(alpha=1.702, limit=0.75)


def _case(routing: str, num_tokens: int, *, is_plain: bool = False) -> ExpertCase:
    """Sizes that end within tiles and steps, more tiles of an expert than one."""
    torch.manual_seed(num_tokens)
    return ExpertCase(
        num_experts=4,
        per_token=2,
        width=96,
        inner=96,
        ids=ROUTINGS[routing](num_tokens, 4, 2, CPU),
        dtype=torch.bfloat16,
        has_biases=not is_plain,
        clamped=None if is_plain else CLAMPED,
    )


@pytest.mark.parametrize("is_gated", [False, True])
def test_words_stand_for_the_numbers_of_a_checkpoint(is_gated: bool) -> None:
    """Every code at every place, with scales from the least to the greatest that are kept."""
    torch.manual_seed(0)
    blocks, _, _ = quantise(torch.randn(2, 48, 64).numpy())
    scales = torch.randint(0, 129, (2, 48, 2), dtype=torch.uint8)
    codes = torch.stack((torch.from_numpy(blocks) % 16, torch.from_numpy(blocks) // 16), dim=-1).flatten(-2)
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    expected = (sizes[codes.long()] * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2)
    if is_gated:
        expected = torch.cat((expected[:, ::2], expected[:, 1::2]), 1)
    words = torch.from_numpy(blocks).reshape(2, 48, 32).contiguous().view(torch.int32)
    powers = scales.reshape(2, 2, 48).clone()
    lay_out(words, powers, is_gated=is_gated)
    assert torch.equal(numbers_of(words, powers, is_gated=is_gated).double(), expected)
    assert torch.equal(powers[0, :, 0], scales[0, 0]), "the scales of the first row, whatever the order of others"


def test_some_matrices_at_a_time_are_laid_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    words, scales = torch.randint(-(2**31), 2**31, (3, 32, 8)).int(), torch.randint(0, 129, (3, 2, 32)).byte()
    once, twice = ((words.clone(), scales.clone()) for _ in range(2))
    lay_out(*once, is_gated=True)
    monkeypatch.setattr("nanoflow.models.mxfp4._WORDS_AT_ONCE", 1)
    lay_out(*twice, is_gated=True)
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


@pytest.mark.parametrize(
    ("routing", "num_tokens", "num_programs", "is_plain"), [("skewed", 20, 2, False), ("balanced", 3, 9, True)]
)
def test_grouped_products(routing: str, num_tokens: int, num_programs: int, is_plain: bool) -> None:
    """As the same numbers in bfloat16, with biases and a clamped activation, and without."""
    case = _case(routing, num_tokens, is_plain=is_plain)
    launch, twin = packed(case.first())
    fast.run_experts_in(launch, SMALL, num_programs)
    assert_linear_swiglu(launch.writes[0], exact(twin))
    launch, twin = packed(case.second())
    fast.run_experts_out(launch, SMALL, num_programs)
    assert_linear(launch.writes[0], exact(twin))


def test_reference_kernels_multiply_the_same_numbers() -> None:
    case = _case("skewed", 9)
    for launch, kernel in ((case.first(), reference.experts_in_mxfp4), (case.second(), reference.experts_out_mxfp4)):
        ours, twin = packed(launch)
        kernel(ours)
        assert_linear_swiglu(ours.writes[0], exact(twin))


def test_rows_of_another_type_are_refused() -> None:
    case = replace(_case("same", 3), dtype=torch.float16)
    for launch, run in ((case.first(), fast.run_experts_in), (case.second(), fast.run_experts_out)):
        with pytest.raises(ValueError, match=r"rows of type torch.float16; products of weights in MXFP4 take bfloat16"):
            run(packed(launch)[0], SMALL, 1)


def test_lanes_have_programs_for_their_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for each if they are alone there; reference kernels stay."""
    card = SimpleNamespace(num_sms=132, shared_memory_bytes=HOPPER_BYTES)
    monkeypatch.setattr(fast, "card_of", lambda _: card)
    counts: list[int] = []
    for name in ("run_experts_in", "run_experts_out"):
        monkeypatch.setattr(fast, name, lambda _launch, _tiles, count: counts.append(count))
    launch = packed(_case("same", 3).first())[0]
    large = packed(_case("same", 99).first())[0]
    for restricted, expected in ((kernels_on, 300), (kernels_beside, 100)):
        for kind, kernel in fast.TRITON_MXFP4_KERNELS.items():
            restricted({**REFERENCE_KERNELS, kind: kernel}, 100)[kind](launch)
            assert counts.pop() == expected
            card.shared_memory_bytes = 64 << 10
            restricted({**REFERENCE_KERNELS, kind: kernel}, 100)[kind](large)
            assert counts.pop() == 100, "the tiling for any card"
            card.shared_memory_bytes = HOPPER_BYTES
        kept = restricted({**REFERENCE_KERNELS, **reference.MXFP4_KERNELS}, 100)
        assert kept[OpKind.EXPERTS_IN_MXFP4] is reference.experts_in_mxfp4


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """Numbers are unpacked where they are multiplied: no bytes are moved for it, and no product waits for another.

    All products of a step have ended before the next one writes its numbers to the same registers.
    """
    cases = part(["in:0"], of=[f"{product}:{place}" for place in range(len(WHOLE_CARD)) for product in ("in", "out")])
    for case, report in zip(cases, compiled("tests.compile_mxfp4", *cases), strict=True):
        tiles = WHOLE_CARD[int(case.partition(":")[2])]
        assert report["num_spills"] == 0 and report["num_permuted_bytes"] < 8
        assert report["num_warpgroup_products"] >= 4 and report["num_waits"] == report["num_waits_for_all"] == 1
        assert report["shared_bytes"] <= tiles.shared_memory_bytes
        # The card allocates registers in units of eight, 65,536 of a multiprocessor.
        registers = -(-report["registers"] // 8) * 8 * 32 * tiles.num_warps
        assert tiles.programs_per_sm * registers <= 65536
        assert tiles.programs_per_sm * (tiles.shared_memory_bytes + 1024) <= 228 << 10


def test_chosen_tiles() -> None:
    for candidates in (WHOLE_CARD, BESIDE):
        rows = (0.5, 12, 13, 48, 100, 5000)
        heights = [choose_mxfp4_tiles(candidates, each, HOPPER_BYTES).block_m for each in rows]
        assert heights == [16, 16, 32, 64, 64, 128]
        assert choose_mxfp4_tiles(candidates, 99, 48 << 10).shared_memory_bytes <= 48 << 10
    # Beside one program of decode attention there is room for one of these, and not for two.
    for tiles in BESIDE:
        assert tiles.shared_memory_bytes + attention_bytes() + 2 * RESERVED_BYTES <= SM_BYTES
        assert 255 * 32 * tiles.num_warps + attention_registers() <= SM_REGISTERS


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model("gpt-oss", tmp_path_factory.mktemp("gpt-oss"), seed=1)
    write_twins(made)
    return made


def _loaded(folder: Path, graph: OpGraph, **options: Any) -> Weights:
    return load_weights(graph, folder, torch.bfloat16, CPU, show_progress=False, **options)


@pytest.mark.parametrize("options", [{}, {"make_copier": _Copier}], ids=["one thread", "several"])
def test_a_checkpoint_is_kept_as_it_is(options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the twin, expert by expert; biases and everything else as ever."""
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 4096)
    graph = build_graph(config_json.load(folder), None)
    kept, twin = _loaded(folder, in_mxfp4(graph), **options), _loaded(folder / "twin", graph)
    for ours, theirs in zip(kept.layers, twin.layers, strict=True):
        for name, expected in theirs.items():
            numbers = ours[name]
            if numbers.dtype == torch.int32:
                is_gated = name == "experts_in.weight"
                numbers = numbers_of(numbers, ours[f"{name}_scales"], is_gated=is_gated)
            assert torch.equal(numbers, expected), name
    assert kept.num_bytes == in_mxfp4(graph).parameter_bytes(2) < 0.75 * twin.num_bytes


def test_a_model_says_the_same_with_weights_as_they_are_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = random_prompts(6, 131, longest=40), greedy(8)
    options: dict[str, Any] = {"max_num_seqs": 6, "max_batch_tokens": 32, "device": "cpu", "dtype": "float32"}
    expected = run_model(folder, prompts, params, **options).tokens
    monkeypatch.setattr(precision, "unpacks_mxfp4", lambda *_: True)
    assert run_model(folder, prompts, params, **options).tokens == expected


def test_a_scale_that_kernels_cannot_multiply_by_is_one_line(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 3, 1] = 129
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    graph = build_graph(config_json.load(tmp_path), None)
    with pytest.raises(ModelError, match=r"down_proj_scales has a scale of 129; weights are kept in MXFP4 up to 128"):
        _loaded(tmp_path, in_mxfp4(graph))
    _loaded(tmp_path, graph)


@pytest.mark.parametrize(
    ("quantization", "can_unpack", "is_packed", "said"),
    [
        ("auto", True, True, "weights are stored as MXFP4 and served as MXFP4 and bfloat16: "),
        ("fp8", True, True, "weights are stored as MXFP4 and served as FP8, MXFP4 and bfloat16: "),
        ("none", True, False, "weights are stored as MXFP4 and served as bfloat16: "),
        ("auto", False, False, "; products in MXFP4 need a GPU from Hopper on and bfloat16"),
    ],
)
def test_which_weights_are_kept(
    quantization: str, can_unpack: bool, is_packed: bool, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "unpacks_mxfp4", lambda *_: can_unpack)
    config = EngineConfig(model=str(folder), device="cpu", quantization=quantization)  # type: ignore[arg-type]
    graph, line = precision.graph_of(config, config_json.load(folder), folder, torch.bfloat16, CPU)
    kinds = {op.kind for op in graph.layer_operations}
    assert (OpKind.EXPERTS_IN_MXFP4 in kinds, OpKind.EXPERTS_OUT in kinds) == (is_packed, not is_packed)
    assert line is not None and said in line
    twin, _ = precision.graph_of(config, config_json.load(folder / "twin"), folder / "twin", torch.bfloat16, CPU)
    assert OpKind.EXPERTS_IN in {op.kind for op in twin.layer_operations}, "plain numbers are not quantised"


def test_random_weights_are_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If config.json says so, as a preset's does. Of the size of other random weights; another seed has others."""
    monkeypatch.setattr(precision, "unpacks_mxfp4", lambda *_: True)
    config = EngineConfig(model="preset:gpt-oss-20b", device="cpu", load_format="random")
    _, line = precision.graph_of(config, preset_config("gpt-oss-20b"), None, torch.bfloat16, CPU)
    assert line == "weights are MXFP4 and bfloat16: 12.82 GiB"
    graph, _ = precision.graph_of(config, config_json.load(folder), folder, torch.bfloat16, CPU)
    drawn = [random_weights(graph, torch.bfloat16, CPU, seed).layers[0] for seed in (0, 1)]
    numbers = numbers_of(drawn[0]["experts_out.weight"], drawn[0]["experts_out.weight_scales"], is_gated=False)
    assert 0.016 < float(numbers.float().std()) < 0.022 and abs(float(numbers.float().mean())) < 5e-4
    assert not torch.equal(drawn[0]["experts_out.weight"], drawn[1]["experts_out.weight"])


def test_what_analyze_counts_is_what_is_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts in MXFP4 stay so where other products multiply FP8."""
    for name in ("multiplies_fp8", "unpacks_mxfp4"):
        monkeypatch.setattr(precision, name, lambda *_: True)
    model = preset_config("gpt-oss-20b")
    cases: tuple[tuple[str, Quantization, str], ...] = (
        ("none", "none", "16 bits"),
        ("mxfp4", "auto", "MXFP4 and 16 bits"),
        ("fp8", "fp8", "FP8, MXFP4 and 16 bits"),
    )
    for analyzed, served, forms in cases:
        config = EngineConfig(model="preset:gpt-oss-20b", device="cpu", quantization=served)
        graph, _ = precision.graph_of(config, model, None, torch.bfloat16, CPU)
        assert main(["analyze", config.model, "--gpu", "h200", "--quantization", analyzed]) == 0
        assert f"weights {graph.parameter_bytes(2) / 1e9:.1f} GB in {forms}\n" in capsys.readouterr().out


def test_costs() -> None:
    """A weight has 4 bits, and 32 have a scale of 8; of a 120b experts take a quarter of what they take in 16 bits."""
    plain = build_graph(preset_config("gpt-oss-120b"), None)
    graph = in_mxfp4(plain)
    num_weights = 36 * 128 * 3 * 2880 * 2880
    assert plain.parameter_bytes(2) - graph.parameter_bytes(2) == num_weights * 2 - num_weights * 17 // 32
    assert graph.parameter_bytes(2) < 62 << 30 and graph.num_parameters == plain.num_parameters
    shape = BatchShape(num_tokens=256)
    for ours, theirs in zip(graph.layer, plain.layer, strict=True):
        assert ours.name == theirs.name and ours.flops(shape) == theirs.flops(shape)
        saved = theirs.memory_bytes(shape, 2) - ours.memory_bytes(shape, 2)
        weights = {"experts_in": 2, "experts_out": 1}.get(ours.name, 0) * 2880 * 2880 * 128
        # 256 tokens leave out one expert in a thousand.
        assert saved == pytest.approx(weights * (2 - 17 / 32), rel=2e-3)
    with pytest.raises(GraphError, match=r"quantization mxfp4: LlamaForCausalLM 8.0B has no experts of sizes"):
        in_mxfp4(build_graph(preset_config("llama-3-8b"), None))


def test_a_profile_says_in_which_form_experts_are() -> None:
    """So it is simulated with the graph that it is of; few tokens take the less time, and many no less."""
    times: dict[bool, dict[int, float]] = {}
    for is_packed in (False, True):
        config = {**PRESETS["gpt-oss-20b"], "num_hidden_layers": 2}
        profile = estimated_profile("a model", config, parse_gpus("h200"), 4096, is_mxfp4=is_packed)
        assert Profile.from_json(profile.to_json()).is_mxfp4 is is_packed
        (graph,) = graphs_of(profile)
        assert (OpKind.EXPERTS_IN_MXFP4 in {op.kind for op in graph.layer}) is is_packed
        points = [point for point in profile.points if point.operation == "experts_out"]
        times[is_packed] = {point.num_tokens: point.time_s for point in points}
    assert times[True][64] < 0.4 * times[False][64] and times[True][4096] == times[False][4096]


def test_a_cuda_graph_can_have_all_operations() -> None:
    """But not the reference kernels, which read lengths on the host."""
    layer = in_mxfp4(build_graph(preset_config("gpt-oss-20b"), None)).layer
    attentions = dict.fromkeys((OpKind.DECODE_ATTENTION, OpKind.PREFILL_ATTENTION), REFERENCE_KERNELS[OpKind.LINEAR])
    kernels = {**REFERENCE_KERNELS, **attentions, **fast.TRITON_MXFP4_KERNELS}
    assert dispatch.are_capturable(kernels, layer)
    assert not dispatch.are_capturable({**kernels, **reference.MXFP4_KERNELS}, layer)
