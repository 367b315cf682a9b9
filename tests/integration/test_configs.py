"""Every field of config.json means what it means to transformers, for every architecture, or is refused by name.

Each architecture's config.json is varied (`tests/config_cases.py`; a part of the variations, unless
NANOFLOW_ALL_CASES=1). transformers builds its model from the very file,
gives it random weights and computes logits; then nanoflow reads the folder. A window, a default
or a spelling that is misread moves these logits by whole nats.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoflow.models.config_json import parse
from nanoflow.models.fields import ModelError
from nanoflow.models.registry import ARCHITECTURES, build_graph
from tests.all_cases import part
from tests.config_cases import BASES, NUM_TOKENS, Case, cases_of
from tests.logits import prompt_logits

transformers = pytest.importorskip("transformers")

# Why a config.json that transformers takes is refused.
REASONS = (
    r"field '(num_hidden_layers|(original_)?max_position_embeddings|head_dim)' must be a positive integer, got",
    r"field 'sliding_window(_pattern)?' must be a positive integer, got",
    r"field '(rms_norm_eps|rope_theta|rope_local_base_freq|swiglu_limit)' must be a positive number, got -1.0",
    r"field 'eos_token_id' must be token ids below \d+, got",
    r"hidden_act must be 'silu', got '(gelu|relu)'",
    r"hidden_activation must be 'gelu_pytorch_tanh', got '(gelu|silu)'",
    r"field '(final|attn)_logit_softcapping' must be null: soft caps are not served",
    r"field 'use_bidirectional_attention' must be false: only causal attention is served",
    r"rope_parameters: field '\w+' is none of full_attention and sliding_attention",
    r"field 'type' must be called rope_type",
    r"field 'truncate' must be true where layers have rotary embeddings of their own",
    r"field 'torch_dtype' must be one of float32, bfloat16, float16, got '(int8|float64)'",
    r"field 'truncate' is missing: it is null",
    # transformers takes the field and rotates whole heads; other engines do not.
    r"field 'partial_rotary_factor' must be 1, as models of type \w+ rotate whole heads, got",
    r"field 'partial_rotary_factor' must be a positive number, got (0.0|True)",
    r"field 'partial_rotary_factor' must be at most 1 and rotate some of a head's 16 dimensions, got 0.01",
    r"field 'head_dim' must be even for the rotary embedding, got 15",
    r"rotary embeddings that differ between layers are not served",
    r"field 'architectures' must be a list with the model's class, got 'LlamaForCausalLM'",
    r"architecture 'MambaForCausalLM' is not known",
    r"field 'model_type' is 'gpt2', but architectures has",
    r"field 'quantization_config' is set: weights quantised by HQQ are not served",
    r"field 'is_causal' must be true: only causal attention is served",
    r"field '(num_(local_)?experts|num_experts_per_tok)' must be a positive integer, got",
    r"field '(decoder_sparse_step|shared_expert_intermediate_size)' must be a positive integer, got",
    # A Qwen 2 MoE has a window of 0 tokens then, which hides every key.
    r"field 'sliding_window' is missing, but layer_types asks for sliding_attention",
)
# What transformers does not take, and nanoflow does: no field of these says anything about what is computed, or it can
# only mean one thing.
MEANT = (
    "no model_type",
    "model_type=None",
    "rms_norm_eps=1",
    "dtype='torch.bfloat16'",
    "pad_token_id=9999",
    "attention_dropout=None",
    "initializer_range=None",
    "use_cache=None",
    "auto_map=None",
)
# By architecture: a list of layers that it does not have may be of any length; sizes that give the size of a head; a
# padding token that is not in the vocabulary; the trained length where nothing is stretched.
MEANT_BY = {
    "LlamaForCausalLM": (
        "layer_types=['sliding_attention', 'sliding_attention', 'sliding_attention']",
        "layer_types=[]",
    ),
    "Phi3ForCausalLM": (
        "layer_types=['sliding_attention', 'sliding_attention', 'sliding_attention']",
        "layer_types=[]",
        "no pad_token_id",
        "original_max_position_embeddings=32.0",
    ),
    "MistralForCausalLM": (
        "layer_types=['full_attention', 'sliding_attention', 'full_attention', 'sliding_attention'], no head_dim",
    ),
    "MixtralForCausalLM": (
        "layer_types=['sliding_attention', 'sliding_attention', 'sliding_attention']",
        "layer_types=[]",
    ),
    "GptOssForCausalLM": ("original_max_position_embeddings=None", "swiglu_limit=7"),
    "Qwen3MoeForCausalLM": (
        "layer_types=['sliding_attention', 'sliding_attention', 'sliding_attention']",
        "layer_types=[]",
    ),
    # No layer has a window.
    "Qwen2MoeForCausalLM": ("no layer_types, sliding_window=None, use_sliding_window=True",),
    "Gemma3ForCausalLM": ("sliding_window=None, sliding_window_pattern=1",),
}
# Of rotary embeddings that say which layers they are for, where there is one for all; and the other way round.
OF_OTHER_LAYERS = "of which each has its own|differ between layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a case: what transformers said (logits or an error), and what nanoflow did."""

    case: Case
    theirs: Tensor | None
    ours: Tensor | None
    our_error: str

    @property
    def is_equal(self) -> bool:
        """True if both have the same logits within rounding: deviations of some 2e-6 were measured."""
        assert self.theirs is not None
        assert self.ours is not None
        return bool((self.ours - self.theirs).abs().max() < 1e-3 * self.theirs.std())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without what transformers says about values that make no sense, and on one thread: the models are tiny."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    # Of each kind of layer and of rotary embedding one; defaults of all are compared below.
    part(["LlamaForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM", "Qwen2MoeForCausalLM"], of=ARCHITECTURES),
)
@pytest.mark.filterwarnings("ignore")
def test_every_field_means_what_it_means_to_transformers(architecture: str, tmp_path: Path) -> None:
    outcomes = [_outcome_of(case, tmp_path) for case in cases_of(architecture)]
    compared = [one for one in outcomes if one.theirs is not None and one.ours is not None]
    assert [one.case.name for one in compared if not one.is_equal] == []
    refused = [one for one in outcomes if one.theirs is not None and one.ours is None]
    assert [one.our_error for one in refused if not any(re.search(reason, one.our_error) for reason in REASONS)] == []
    assert {one.case.name for one in outcomes if one.theirs is None and one.ours is not None} <= {
        *MEANT,
        *MEANT_BY.get(architecture, ()),
    }
    for one in outcomes:
        assert one.ours is not None or re.search(r"field|architecture|hidden_act|tensor|shape|rotary", one.our_error)
        assert "\n" not in one.our_error
    refused_here = [one for one in refused if not re.search(OF_OTHER_LAYERS, one.our_error)]
    # Measured, of all: 56% to 68% are equal, and 6% to 10% refused that transformers takes; of the part that runs by
    # default 49% to 72%, and 4% to 15%.
    assert len(compared) >= 0.45 * len(outcomes)
    assert len(refused_here) <= 0.16 * len(outcomes)
    # The test could not fail if the variations changed nothing.
    base = compared[0].theirs
    changed = [one for one in compared if one.theirs is not None and not _are_alike(one.theirs, base)]
    assert len(changed) >= 0.16 * len(outcomes)


def test_the_cases_have_every_variation_and_every_reason_to_refuse() -> None:
    """Also the part that runs by default."""
    cases = [case for architecture in BASES for case in cases_of(architecture)]
    every = {case.name for architecture in BASES for case in cases_of(architecture, is_complete=True)}
    assert {case.name for case in cases} == every
    errors = []
    for case in cases:
        try:
            build_graph(parse(case.config, origin="config.json"), None)
        except ModelError as error:
            errors.append(str(error))
    assert [reason for reason in REASONS if not any(re.search(reason, error) for error in errors)] == []


# Fields without a place in a configuration class of transformers, which reads them all the same: older spellings, those
# that any class takes, and two that are looked for where models are made.
_ANYWHERE = {"rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "torch_dtype"}
_READ_ELSEWHERE = {
    "MistralForCausalLM": {"layer_types"},
    "Qwen2ForCausalLM": {"head_dim"},
    "Gemma3ForCausalLM": {"sliding_window_pattern", "rope_local_base_freq"},
    "Phi3ForCausalLM": {"head_dim"},
    "MixtralForCausalLM": {"num_experts"},
    "GptOssForCausalLM": {"num_experts"},
    "Qwen2MoeForCausalLM": {"head_dim"},
    "Qwen3MoeForCausalLM": {"head_dim", "num_local_experts"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_and_defaults_are_those_of_the_configuration_class(architecture: str) -> None:
    reading = ARCHITECTURES[architecture].reading
    kind = type(transformers.AutoConfig.for_model(reading.model_type))
    theirs = {field.name: field.default for field in dataclasses.fields(kind)}
    known = {name for one in ARCHITECTURES.values() for name in one.reading.fields}
    mine = reading.fields.keys() - (_ANYWHERE - theirs.keys()) - _READ_ELSEWHERE.get(architecture, set())
    assert mine == theirs.keys() & known
    assert {name: reading.fields[name] for name in mine} == {name: theirs[name] for name in mine}
    thetas = {"global": reading.fields["rope_theta"], "local": reading.fields.get("rope_local_base_freq")}
    assert kind.default_theta in (thetas["global"], thetas)


def test_a_window_that_is_left_out_is_as_long_as_in_transformers(tmp_path: Path) -> None:
    """Mistral's is 4,096: the first token that does not see all others is the 4,097th."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    base = {"architectures": ["MistralForCausalLM"], **BASES["MistralForCausalLM"], **sizes}
    del base["sliding_window"]
    prompt = torch.arange(4200) * 37 % 131
    theirs, ours = _logits_of_both(base, tmp_path, prompt)
    wider, _ = _logits_of_both({**base, "sliding_window": None}, tmp_path, prompt)
    # Angles of such positions in float32 are good to 3e-4; 0.003 deviations were measured.
    assert (ours - theirs).abs().max() < 0.02 * theirs.std()
    assert (wider - theirs)[:4096].abs().max() < 0.02 * theirs.std()
    assert (wider - theirs)[4096:].abs().max() > 0.1 * theirs.std()


def _are_alike(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and bool((one - other).abs().max() < 0.05 * one.std())


def _logits_of_both(config: dict[str, Any], folder: Path, prompt: Tensor) -> tuple[Tensor, Tensor]:
    (folder / "config.json").write_text(json.dumps(config))
    return _their_logits(folder, prompt), prompt_logits(folder, prompt.tolist())


def _outcome_of(case: Case, folder: Path) -> Outcome:
    """Both sides of a case; with the weights of the first one, if transformers makes no model of it."""
    (folder / "config.json").write_text(json.dumps(case.config))
    prompt = torch.arange(NUM_TOKENS) * 37 % 131
    theirs, ours, our_error = None, None, ""
    try:
        theirs = _their_logits(folder, prompt)
    except Exception:
        shutil.copyfile(folder / "first.safetensors", folder / "model.safetensors")
    try:
        ours = prompt_logits(folder, prompt.tolist())
    except ModelError as error:
        our_error = str(error)
    return Outcome(case=case, theirs=theirs, ours=ours, our_error=our_error)


def _their_logits(folder: Path, prompt: Tensor) -> Tensor:
    """float32 [tokens, vocab] of the model that config.json describes, whose weights depend on their names alone.

    Writes the weights, and those of the first model also to a file of their own.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Each layer multiplies what rounding does before it, and by less where weights are small.
    spread = 0.3 if config.num_hidden_layers <= 32 else 0.1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise if parameter.dim() > 1 else 0.2 * noise + ("norm" in name))
    tensors = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    if not (folder / "first.safetensors").exists():
        save_file(tensors, folder / "first.safetensors")
    with torch.inference_mode():
        logits: Tensor = model(prompt[None], use_cache=False).logits[0].float()
    return logits
