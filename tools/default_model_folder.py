"""The default model's folder: its settings, how it is written and read back, and its model card.

A model folder in the Hugging Face layout is the contract between training and serving. This module
holds that contract for ``train_default_model.py``: which files there are, what they say, and the card
(``README.md`` for people, ``model_card.json`` for programs) that records how the weights came to be.
The card's samples are made from the folder as written, by ``transformers``, not from the weights in
memory: a mistake in the export would show in them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>")  # the last three are reserved
MAX_CONTEXT = 2048
# This model only completes code, so a "chat" is its messages as plain text; a system message is a comment.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'] | map(attribute='text') | join %}{% endif %}"
    "{% if message['role'] == 'system' %}{{ '# ' + text | replace('\\n', '\\n# ') }}"
    "{% else %}{{ text }}{% endif %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
PROMPTS = ("def ", "class ", "import ")
CHECKED_COMPLETIONS = 64
CARD = """\
---
license: apache-2.0
language: code
---

# nanoflow default model

A very small language model of Python code, made so that an inference engine can be tried with no
download. It continues Python text in the style of the standard library. It is no assistant: it knows no
facts, follows no instructions, and its code is not meant to be used.

| | |
| --- | --- |
| architecture | LlamaForCausalLM, {num_hidden_layers} layers, hidden size {hidden_size}, MLP size \
{intermediate_size}, {num_attention_heads} query heads and {num_key_value_heads} key/value heads of \
{head_dim}, tied embeddings |
| parameters | {parameters:,} (bf16) |
| context | {max_position_embeddings:,} tokens |
| tokenizer | byte-level BPE, {vocab_size:,} token types; a space is always a token of its own |
| training data | the standard library of Python {python}: {files} files, {bytes:,} bytes (without tests), \
of which {held_out_files} files are held out |
| data sha256 | `{sha256}` (of each file's path, a zero byte, its content, a zero byte, in path order) |
| tokens seen | {tokens_seen:,} ({epochs} epochs of {train_tokens:,} tokens, {steps:,} steps; \
the weights are those of step {best_step:,}, the best on the held-out files) |
| training time | {train_seconds} s on {hardware} |
| loss, training text | {train_loss:.3f} nats per token |
| loss, held-out files | {validation_loss:.3f} nats per token, {validation_bits_per_byte:.3f} bits per byte |
| {count} samples of `def ` at temperature 0.8 | {finished} end within {limit} tokens; \
{parsed} of these parse as Python |

Documents (the module's head, then each top-level function or class) end in `<|endoftext|>`. The chat
template renders messages as plain text, to be continued. `<|user|>`, `<|assistant|>` and `<|end|>` are
reserved and untrained.

Made by `python tools/train_default_model.py` ({versions}; settings: {settings}).

## Licence

The weights are released under the Apache License 2.0, as the project is. The training text, Python's
standard library, is under the Python Software Foundation License.

## Samples

`<|endoftext|>` shows where the model stopped by itself.
{samples}"""


def model_config(vocab_size: int) -> dict[str, Any]:
    """Give the contents of config.json.

    No padding token is named: the embedding row of a padding token gets no gradient from its use as an
    input, and the only candidate, end-of-text, needs it.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_model(
    out: Path,
    config: dict[str, Any],
    tokenizer: tokenizers.Tokenizer,
    weights: dict[str, Tensor],
) -> None:
    """Write the weights (bf16, Hugging Face names), the tokenizer and their settings."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_CONTEXT,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    # The output head is the embedding, so it is stored once, as Hugging Face does for tied weights.
    stored = {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in weights.items()
        if name != "lm_head.weight"
    }
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner only; the package is for all


def load(folder: Path, device: str) -> LlamaForCausalLM:
    """Load the written weights, in float32 so that only their own rounding counts."""
    transformers.utils.logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()


def complete(
    folder: Path, model: LlamaForCausalLM, prompt: str, temperature: float, limit: int, count: int = 1
) -> list[str]:
    """Continue a prompt `count` times (temperature 0: greedily) and give the texts up to their end."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer([prompt] * count, return_tensors="pt", return_token_type_ids=False).to(model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(**inputs, **how, max_new_tokens=limit)
    texts = []
    for text in tokenizer.batch_decode(output):
        body, end, _padding = text.partition(END_OF_TEXT)
        texts.append(body + end)
    return texts


def count_parsed(texts: list[str]) -> tuple[int, int]:
    """Count the texts that came to an end, and those of them that are Python by its own parser."""
    finished = [text.removesuffix(END_OF_TEXT) for text in texts if text.endswith(END_OF_TEXT)]
    parsed = 0
    for text in finished:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as an odd escape in a string: not an error
                ast.parse(text)
            parsed += 1
        except (SyntaxError, ValueError, RecursionError):
            pass
    return len(finished), parsed


def write_card(folder: Path, model: LlamaForCausalLM, facts: dict[str, Any], limit: int = 256) -> str:
    """Draw samples, write README.md and model_card.json, and return the samples as text."""
    samples = [
        {"prompt": prompt, "temperature": temperature, "text": text}
        for prompt in PROMPTS
        for temperature in (0.0, 0.8)
        for text in complete(folder, model, prompt, temperature, limit=128)
    ]
    checked = complete(folder, model, PROMPTS[0], 0.8, limit, CHECKED_COMPLETIONS)
    finished, parsed = count_parsed(checked)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shown = "".join(
        f"\nPrompt `{sample['prompt']}`, "
        + (f"temperature {sample['temperature']}" if sample["temperature"] else "greedy")
        + f":\n\n~~~~~python\n{sample['text']}\n~~~~~\n"
        for sample in samples
    )
    facts = {
        "name": "nanoflow default model",
        "architecture": config["architectures"][0],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "license": "Apache-2.0",
        "data_license": "PSF-2.0",
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "hardware": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        **facts,
        "checked_completions": {
            "prompt": PROMPTS[0],
            "temperature": 0.8,
            "limit": limit,
            "count": len(checked),
            "finished": finished,
            "parsed": parsed,
        },
        "samples": samples,
    }
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items())
    fields = {**config, **facts, **facts["data"], **facts["checked_completions"]}
    fields |= {"versions": versions, "settings": settings, "samples": shown}
    (folder / "README.md").write_text(CARD.format(**fields), encoding="utf-8")
    write_json(folder / "model_card.json", facts)
    return shown
