"""A folder with config and tokenizer of a tiny Llama, to be loaded with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.toy_tokenizers import TEMPLATE, write_tokenizer

VOCAB_SIZE = 320
MAX_MODEL_LEN = 256
ENGINE_OPTIONS: dict[str, Any] = {"load_format": "random", "device": "cpu", "num_threads": 1, "max_num_seqs": 16}


def write_toy_model(folder: Path) -> Path:
    """Write the files; return the folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": 0,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder
