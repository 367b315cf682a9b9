"""Names read from a tokenizer's files are those that `transformers` has; where they may not be, it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow.engine.tokenizer_files import _names_by_class
from nanoflow.engine.tokenizer_names import read_names
from nanoflow.models.locate import locate_model
from tests.toy_tokenizers import EOS, write_tokenizer

_ALL = {"bos_token": None, "eos_token": EOS, "unk_token": EOS, "pad_token": None}
_TOKEN = {"content": EOS, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write(folder: Path, files: dict[str, Any], **options: Any) -> Path:
    """A folder with a tokenizer and further files."""
    write_tokenizer(folder, **options)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, {}),
        ({"bos_token": EOS, "chat_template": "{{ 1 }}"}, {}),
        ({"eos_token": {"__type": "AddedToken", **_TOKEN}}, {}),
        ({"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}, {}),
        ({"chat_template": "a"}, {"chat_template.jinja": "b\n"}),
        ({}, {"special_tokens_map.json": {"bos_token": _TOKEN, "pad_token": EOS}}),
        ({"added_tokens_decoder": {"0": {**_TOKEN, "special": True}}}, {"special_tokens_map.json": {"bos_token": "x"}}),
        ({"tokenizer_class": "GPT2Tokenizer", **_ALL}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer", **_ALL}, {}),
        ({"tokenizer_class": "LlamaTokenizer", **_ALL, "add_bos_token": True}, {}),
        ({"additional_special_tokens": [EOS], "sep_token": EOS}, {}),
    ],
)
def test_same_as_transformers(tmp_path: Path, options: dict[str, Any], files: dict[str, Any]) -> None:
    folder = write(tmp_path, files, **options)
    ours, theirs = read_names(folder), _names_by_class(folder)
    assert ours is not None
    assert dict(ours.special_tokens_map) == {name: str(text) for name, text in theirs.special_tokens_map.items()}
    assert ours.eos_token == theirs.eos_token and ours.chat_template == theirs.chat_template


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, {}),
        ({"tokenizer_class": "GPT2Tokenizer", "bos_token": None}, {}),
        ({"image_token": "<image>"}, {}),
        ({"extra_special_tokens": {"image_token": "<image>"}}, {}),
        ({"eos_token": 5}, {}),
        ({"chat_template": 5}, {}),
        ({"chat_template": [{"name": "default"}]}, {}),
        ({"tokenizer_class": 5}, {}),
        ({}, {"tokenizer_config.json": []}),
    ],
)
def test_what_a_class_would_add_is_left_to_it(tmp_path: Path, options: dict[str, Any], files: dict[str, Any]) -> None:
    assert read_names(write(tmp_path, files, **options)) is None


def test_the_embedded_model_needs_no_class() -> None:
    ours = read_names(locate_model("default"))
    assert ours is not None and ours.eos_token == "<|endoftext|>"
