"""What a model recommends to sample with, and what is said about a file that makes no sense."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nanoflow.models.fields import ModelError
from nanoflow.models.generation import NO_DEFAULTS, SamplingDefaults, load_sampling_defaults
from nanoflow.request import SamplingParams
from nanoflow.server.protocol import ChatCompletionRequest, CompletionRequest

# As models of Qwen have it, with fields that are none of ours.
RECOMMENDED = {
    "bos_token_id": 1,
    "do_sample": False,
    "eos_token_id": [1, 2],
    "max_new_tokens": 300,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.51.0",
}
DEFAULTS = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.05, max_tokens=300)


def write(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_the_model_s_own_file(tmp_path: Path) -> None:
    assert load_sampling_defaults("auto", tmp_path) == NO_DEFAULTS
    assert load_sampling_defaults("auto", None) == NO_DEFAULTS
    assert load_sampling_defaults("auto", write(tmp_path, RECOMMENDED)) == DEFAULTS
    assert load_sampling_defaults("vllm", tmp_path) == NO_DEFAULTS


def test_a_file_of_another_folder(tmp_path: Path) -> None:
    write(tmp_path, RECOMMENDED)
    other = write(tmp_path / "other", {"temperature": 0, "top_k": None})
    assert load_sampling_defaults(str(other), tmp_path) == SamplingDefaults(temperature=0.0)
    assert load_sampling_defaults(str(other), None) == SamplingDefaults(temperature=0.0)
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path}/nowhere/generation_config.json: no such file")):
        load_sampling_defaults(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"])
@pytest.mark.parametrize("value", ["1", [0.5], True, float("nan"), float("inf"), 10**400, -2])
def test_a_value_that_no_request_could_have_is_one_line_with_file_and_field(
    field: str, value: Any, tmp_path: Path
) -> None:
    if (field, value) == ("top_k", -2):
        pytest.skip("keeps all tokens, as 0 does")
    write(tmp_path, {field: value})
    with pytest.raises(ModelError) as caught:
        load_sampling_defaults("auto", tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "generation_config.json"))
    assert field.replace("max_new_tokens", "max_") in message
    assert "\n" not in message
    assert len(message) < 400


def test_what_is_told_to_people() -> None:
    assert (
        str(SamplingDefaults(temperature=0.6, top_k=20)) == "sampling defaults of the model: temperature=0.6, top_k=20"
    )
    assert str(NO_DEFAULTS) == "no sampling defaults of the model"


def test_a_request_has_the_model_s_values_where_it_gives_none() -> None:
    body = CompletionRequest.model_validate({"prompt": "a", "temperature": 0.0, "top_k": 0})
    expected = SamplingParams(temperature=0.0, top_p=0.8, top_k=0, min_p=0.05, repetition_penalty=1.05, max_tokens=300)
    assert body.to_params(defaults=DEFAULTS) == expected
    assert body.to_params() == SamplingParams(temperature=0.0)
    short = CompletionRequest.model_validate({"prompt": "a", "max_tokens": 7})
    assert short.to_params(defaults=DEFAULTS).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 300), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 9, "max_tokens": 7}, 9)],
)
def test_a_chat_ends_where_the_model_recommends_if_it_does_not_say(fields: dict[str, int], expected: int) -> None:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    assert body.to_params(defaults=DEFAULTS).max_tokens == expected
    assert body.to_params(defaults=DEFAULTS).temperature == 0.7
    assert body.to_params(defaults=SamplingDefaults(top_k=3)).max_tokens == fields.get(
        "max_completion_tokens", fields.get("max_tokens")
    )
