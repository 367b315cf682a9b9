"""Text, tokens and offsets of a completion with its prompt before it agree, whatever the tokens are."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanoflow.config import ServerConfig
from nanoflow.engine.tokenizer import REPLACEMENT, Tokenizer
from nanoflow.server.app import create_app
from tests.all_cases import num_examples
from tests.local_engine import LocalEngine
from tests.toy_tokenizers import (
    EOS,
    byte_fallback_backend,
    byte_level_backend,
    metaspace_backend,
    toy_tokenizer,
    wordpiece_backend,
)

TOKENIZERS: dict[str, Tokenizer] = {
    "byte-level": toy_tokenizer(byte_level_backend()),
    "byte-fallback": toy_tokenizer(byte_fallback_backend()),
    "metaspace": toy_tokenizer(metaspace_backend()),
    "wordpiece": toy_tokenizer(wordpiece_backend()),
}
APPS: dict[str, FastAPI] = {
    kind: create_app(LocalEngine(tokenizer), ServerConfig(served_model_name="toy"))
    for kind, tokenizer in TOKENIZERS.items()
}


def post(kind: str, **body: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=APPS[kind])
        async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
            return await client.post("/v1/completions", json=body)

    return asyncio.run(call())


def choice_of(kind: str, **body: Any) -> dict[str, Any]:
    answer = post(kind, **body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def check_agreement(tokenizer: Tokenizer, choice: dict[str, Any], ids: list[int], *, hidden: set[int]) -> None:
    """Each token stands in the text where its offset says.

    Args:
        tokenizer: Of the tokens.
        choice: The answer.
        ids: The tokens it should have.
        hidden: Places of tokens that are not part of the text.
    """
    text, logprobs = choice["text"], choice["logprobs"]
    offsets = [*logprobs["text_offset"], len(text)]
    assert len(logprobs["tokens"]) == len(ids) == len(logprobs["text_offset"]) == len(logprobs["token_logprobs"])
    assert offsets == sorted(offsets) and (not ids or offsets[0] == 0)
    for place, (token_id, name) in enumerate(zip(ids, logprobs["tokens"], strict=True)):
        shown = text[offsets[place] : offsets[place + 1]]
        data = tokenizer.bytes_of(token_id)
        if name.startswith("bytes:"):
            assert data.decode(errors="replace") != data.decode(errors="ignore")
            assert name == "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        elif place in hidden:
            assert name == data.decode() and not shown.strip(REPLACEMENT)
        else:
            # Decoders drop spaces at the very beginning; bytes behind a token that are no text show as U+FFFD.
            own = shown.rstrip(REPLACEMENT) if REPLACEMENT not in name else shown
            assert data.decode() == name
            assert own == name or (not text[: offsets[place]].strip() and own.strip(" #") == name.strip(" "))
        alternatives, logprob = logprobs["top_logprobs"][place], logprobs["token_logprobs"][place]
        assert alternatives is None or alternatives[name] == logprob


def any_ids(kind: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, TOKENIZERS[kind].vocab_size), min_size=1, max_size=20)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), skips=st.booleans(), max_tokens=st.integers(0, 6))
@settings(max_examples=num_examples(60), deadline=None)
def test_prompts_of_any_token_ids(kind: str, data: st.DataObject, skips: bool, max_tokens: int) -> None:
    """The prompt shows its special tokens, as it is what its user gave; the completion shows them if wanted."""
    tokenizer, prompt = TOKENIZERS[kind], data.draw(any_ids(kind))
    body = {"prompt": prompt, "skip_special_tokens": skips, "ignore_eos": True, "temperature": 0}
    choice = choice_of(kind, **body, echo=True, logprobs=1, max_tokens=max_tokens)
    new = [prompt[place % len(prompt)] for place in range(max_tokens)]
    silent = {0} if skips else set()
    hidden = {place for place, token_id in enumerate(new, start=len(prompt)) if token_id in silent}
    check_agreement(tokenizer, choice, prompt + new, hidden=hidden)
    if max_tokens == 0:
        whole = tokenizer.decode(prompt, skip_special_tokens=False)
        assert choice["text"] == whole or (kind == "byte-fallback" and REPLACEMENT in whole)
    plain = choice_of(kind, **body, echo=True, max_tokens=max_tokens)
    assert plain["text"] == choice["text"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.sampled_from("hello world,.\n 漢字é🎓▁\ufffd" + EOS), min_size=1, max_size=20))
@example(text="hello  world <|end|>hello")
@settings(max_examples=num_examples(60), deadline=None)
def test_prompts_of_any_text_are_echoed_as_they_were_given(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    if ids:
        choice = choice_of(kind, prompt=text, echo=True, logprobs=0, max_tokens=0)
        offsets = [*choice["logprobs"]["text_offset"], len(text)]
        assert choice["text"] == text and offsets == sorted(offsets)
        if kind == "byte-level":
            check_agreement(tokenizer, choice, ids, hidden=set())


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_stream_counts_the_same_offsets(kind: str, data: st.DataObject) -> None:
    body = {"prompt": data.draw(any_ids(kind)), "echo": True, "logprobs": 1, "max_tokens": 5, "ignore_eos": True}
    whole = choice_of(kind, **body)
    lines = post(kind, **body, stream=True).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "text_offset", "top_logprobs"):
        assert [entry for part in parts for entry in part["logprobs"][name]] == whole["logprobs"][name]


def test_a_prompt_that_ends_inside_a_character_is_completed_once() -> None:
    ids = TOKENIZERS["byte-fallback"].encode("h") + [1 + byte for byte in "🎓".encode()[:2]]
    rest = [1 + byte for byte in "🎓".encode()[2:]]
    prompt = [*rest, *ids]
    choice = choice_of("byte-fallback", prompt=prompt, echo=True, logprobs=0, max_tokens=2, temperature=0)
    assert choice["text"].endswith("h🎓")
    alone = choice_of("byte-fallback", prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert alone["text"] == "h" + 2 * REPLACEMENT
