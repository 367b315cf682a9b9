"""The embedded default model: its folder is complete and small, and its card tells the truth about it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

import nanoflow

FOLDER = Path(nanoflow.__file__).parent / "default_model"
SIZE_LIMIT = 8_000_000
TEXTS = [
    "def f(x):\n    return x\n",
    "\tif a:\r\n\t\t  b = 'é'  # 日本語 🙂‍↔️\x00\x7f\u200b\ufeff",
    "   leading and trailing   ",
    "e\u0301 \u00e9 ﷽ \U0010ffff\u2028\u2029\n\n\n",
    "",
    "".join(map(chr, range(0x20, 0x250))),
]


def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    facts: dict[str, Any] = read_json("model_card.json")
    return facts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model_card.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= SIZE_LIMIT


def test_card_matches_the_weights(card: dict[str, Any]) -> None:
    path = FOLDER / "model.safetensors"
    assert card["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        dtypes = {weights.get_slice(name).get_dtype() for name in shapes}
    config = read_json("config.json")
    assert dtypes == {"BF16"}
    assert card["parameters"] == sum(math.prod(shape) for shape in shapes.values())
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert "lm_head.weight" not in shapes
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]


def test_card_records_the_training(card: dict[str, Any]) -> None:
    data = card["data"]
    assert re.fullmatch(r"[0-9a-f]{64}", data["sha256"])
    assert data["files"] > data["held_out_files"] > 0
    assert data["bytes"] >= 1_000_000
    assert card["tokens_seen"] > 0
    assert card["train_seconds"] > 0
    assert card["hardware"]
    nats_per_byte = card["validation_bits_per_byte"] * math.log(2)
    assert 0 < card["train_loss"] < math.log(read_json("config.json")["vocab_size"])
    assert 1.5 < card["validation_loss"] / nats_per_byte < 4.0, "implausible bytes per token"
    # A byte-wise order-0 model of Python needs about 4.5 bits per byte; a usable one far fewer.
    assert card["validation_bits_per_byte"] < 2.0


def test_readme_states_the_facts_and_no_local_path(card: dict[str, Any]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for fact in (card["data"]["sha256"], card["python"], card["hardware"], f"{card['parameters']:,}"):
        assert fact in readme
    assert "Python Software Foundation License" in readme
    stated = readme.split("## Samples")[0] + json.dumps({**card, "samples": []})
    assert not re.search(r"(^|[\s\"'`(])/(home|root|usr|opt|tmp|Users)/|[A-Z]:\\", stated)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_keeps_spaces_apart_and_adds_nothing(tokenizer: Any) -> None:
    config = read_json("config.json")
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.eos_token_id == read_json("generation_config.json")["eos_token_id"]
    ids = tokenizer("def name")["input_ids"]
    assert ids[:2] == tokenizer("def ")["input_ids"]
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]


def test_chat_is_plain_text_to_continue(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Write\nPython."},
        {"role": "user", "content": [{"type": "text", "text": "def "}]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "# Write\n# Python.\ndef "
    assert tokenizer.apply_chat_template([{"role": "user", "content": "def "}], tokenize=False) == "def "


def test_prompt_continues_as_python(tokenizer: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    inputs = tokenizer("def ", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert re.match(r"def [A-Za-z_]\w*\(", tokenizer.decode(output[0]))
