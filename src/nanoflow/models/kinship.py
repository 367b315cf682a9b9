"""The error for an architecture that is not served: the kind of model, and the most similar served one.

Data and one function. `registry.py` has the served architectures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoflow.models.fields import shown

_Config = Mapping[str, Any]
_DECODER = "LlamaForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind of model that is not served.

    Attributes:
        what: A description in a few words.
        has_kin: Whether a served architecture does the same job, which is to continue text.
        types: Prefixes of the `model_type`s of this kind, in lower case.
        suffixes: Suffixes of its class names.
        fields: Fields of config.json that only this kind has.
    """

    what: str
    has_kin: bool
    types: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def is_of(self, architecture: str, name: str, config: _Config) -> bool:
        """Whether a class is of this kind, by the plain form of its `model_type` (else of its name) or its fields."""
        ends = architecture.endswith(self.suffixes or ("\0",)) and not architecture.endswith("LMHeadModel")
        begins = name.startswith(tuple(_plain(each) for each in self.types) or ("\0",))
        return begins or ends or any(config.get(field) not in (None, False, 0) for field in self.fields)


# The first match is used, so kinds that do another job come before kinds that do the same job in another way.
_KINDS: tuple[_Kind, ...] = (
    _Kind(
        what="a model of sound",
        has_kin=False,
        types=("whisper", "wav2vec", "wavlm", "hubert", "speech", "musicgen", "encodec", "seamless", "bark", "moshi"),
        fields=("num_mel_bins",),
    ),
    _Kind(
        what="a model of images or of several media, and only text is served",
        has_kin=False,
        types=(
            *("clip", "siglip", "vit", "deit", "swin", "convnext", "dino", "resnet", "detr", "sam", "blip", "beit"),
            *("llava", "idefics", "paligemma", "mllama", "pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "fuyu"),
            *("internvl", "florence", "kosmos", "trocr", "git", "phi4_multimodal", "phi3_v", "gemma3n", "qwen2_5_omni"),
            "phi4mm",
        ),
        suffixes=("ForImageClassification", "ForObjectDetection", "ForVision2Seq", "ForImageTextToText"),
        fields=("vision_config", "audio_config", "image_token_id", "image_token_index"),
    ),
    _Kind(
        what="an encoder and a decoder in one",
        has_kin=False,
        types=(
            *("t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian", "m2m", "led"),
            *("blenderbot", "prophetnet", "plbart", "mvp", "nllb", "encoder-decoder", "fsmt", "bigbird_pegasus"),
        ),
        suffixes=("ForConditionalGeneration",),
        fields=("is_encoder_decoder",),
    ),
    _Kind(
        what="an encoder, which writes no text",
        has_kin=False,
        types=(
            *("bert", "roberta", "distilbert", "albert", "electra", "deberta", "xlm", "mpnet", "modernbert", "nomic"),
            *("camembert", "convbert", "longformer", "big_bird", "funnel", "layoutlm", "esm", "ernie_m", "squeezebert"),
            *("jina", "gte", "roformer", "rembert", "data2vec", "mobilebert", "megatron-bert", "luke"),
        ),
        suffixes=("ForMaskedLM",),
    ),
    _Kind(
        what="a classifier, which writes no text",
        has_kin=True,
        suffixes=(
            *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
            *("RewardModel", "ForRewardModel", "ForProcessRewardModel"),
        ),
    ),
    _Kind(
        what="a state-space or recurrent model, or one that is so in part",
        has_kin=True,
        types=(
            *("mamba", "falcon_mamba", "falcon_h1", "rwkv", "jamba", "zamba", "recurrent_gemma", "nemotron_h", "bamba"),
            *("xlstm", "qwen3_next", "qwen3_5", "kimi_linear", "lfm2", "granitemoehybrid", "plamo2", "bailing_hybrid"),
            "olmo_hybrid",
        ),
        fields=("ssm_cfg", "state_size", "mamba_d_state", "linear_num_key_heads"),
    ),
    _Kind(
        what="a mixture of experts of another kind",
        has_kin=True,
        types=("dbrx", "olmoe", "phimoe", "deepseek", "grok", "llama4"),
        fields=("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ),
    _Kind(what="a model with latent attention", has_kin=True, types=("minicpm3",), fields=("kv_lora_rank",)),
    _Kind(what="a decoder whose layers are built otherwise", has_kin=True, types=("gpt_neox",)),
    _Kind(
        what="a decoder with learned positions in place of rotary ones",
        has_kin=True,
        types=("gpt2", "gpt-sw3", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "xglm", "openai-gpt", "ctrl", "imagegpt"),
    ),
    _Kind(
        what="a decoder with positions by ALiBi in place of rotary ones",
        has_kin=True,
        types=("bloom", "mpt", "baichuan"),
    ),
    _Kind(what="a model without an output projection onto tokens", has_kin=True, suffixes=("Model",)),
    _Kind(
        what="a decoder whose layers are built otherwise",
        has_kin=True,
        types=(
            *("gemma", "phi", "gptj", "codegen", "falcon", "stablelm", "cohere", "starcoder", "olmo", "granite", "glm"),
            *("chatglm", "nemotron", "persimmon", "internlm", "exaone", "smollm3", "minicpm", "starcoder2", "ernie4_5"),
            *("hunyuan", "seed_oss", "apertus", "arcee", "helium", "bitnet", "qwen", "aquila", "xverse", "orion"),
        ),
    ),
)
# Prefixes of names, and the most similar served family; the first match is used.
_FAMILIES: Mapping[str, str] = {
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "ministral": "MistralForCausalLM",
}


def not_known(architecture: str | None, model_type: object, config: _Config, known: Sequence[str]) -> str:
    """One line on an architecture that is not served: its name, its kind, the most similar one, all served ones.

    Args:
        architecture: The class in config.json; None if it names none.
        model_type: The field of this name, of any type.
        config: The whole object, whose fields help to find the kind.
        known: Served architectures.
    """
    kind_name = _plain(model_type if isinstance(model_type, str) and model_type else architecture or "")
    kind = next((kind for kind in _KINDS if kind.is_of(architecture or "", kind_name, config)), None)
    name = f"architecture {shown(architecture)}" if architecture else f"model_type {shown(model_type)}"
    what = f" ({kind.what})" if kind is not None else ""
    nearest = _nearest(architecture or "", kind_name, known) if kind is None or kind.has_kin else None
    near = f"nearest known: {nearest}" if nearest is not None else "none of the known ones is similar"
    return f"{name} is not known{what}; {near}; known: {', '.join(known)}"


def _plain(name: str) -> str:
    """A form that names of types and classes share: both GPT2LMHeadModel and gpt2 begin with it."""
    return name.lower().replace("_", "").replace("-", "")


def _nearest(architecture: str, model_type: str, known: Sequence[str]) -> str:
    """The served architecture of the same family, else the plainest decoder."""
    names = (model_type, _plain(architecture))
    own = next((name for name in known if any(part.startswith(_family(name)) for part in names)), None)
    kin = (found for start, found in _FAMILIES.items() if any(part.startswith(start) for part in names))
    return next((name for name in kin if name in known), own or _DECODER)


def _family(architecture: str) -> str:
    return architecture.lower().removesuffix("forcausallm")
