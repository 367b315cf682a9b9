"""Fields that clients of other servers send and look for: token ids, names of tokens, counts in a stream, templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanoflow.config import ServerConfig
from tests.fake_async_engine import BOS, MAX_MODEL_LEN, VOCAB_SIZE, FakeAsyncEngine
from tests.fake_server import CHAT, complete, error_of, served

PROMPTS: dict[str, dict[str, Any]] = {"/v1/completions": {"prompt": "abc"}, "/v1/chat/completions": {"messages": CHAT}}
QUICK = list(b"the quick")


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with served(FakeAsyncEngine()) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def generous() -> Iterator[httpx.Client]:
    """A server with every option on that widens what requests may do."""
    config = ServerConfig(
        served_model_name="toy",
        enable_tokenizer_info_endpoint=True,
        trust_request_chat_template=True,
        return_tokens_as_token_ids=True,
    )
    with served(FakeAsyncEngine(), config) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:
        yield client


def chat(http: httpx.Client, **fields: Any) -> Any:
    answer = http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 9, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(http: httpx.Client, path: str, **fields: Any) -> list[Any]:
    with http.stream("POST", path, json={**PROMPTS[path], "stream": True, **fields}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def tokens_of(http: httpx.Client, **fields: Any) -> list[int]:
    """The prompt's tokens, as the engine got them."""
    answer = complete(http, max_tokens=1, return_token_ids=True, **fields)
    ids: list[int] = answer["choices"][0]["prompt_token_ids"]
    return ids


# What is always there


def test_clients_may_look_for_what_was_not_asked_for(http: httpx.Client) -> None:
    """The official client raises AttributeError for fields that it does not know and that are not sent."""
    client = openai.OpenAI(base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key="none", max_retries=0)
    completion = client.completions.create(model="toy", prompt="a", max_tokens=1)
    for name in ("prompt_logprobs", "token_ids", "prompt_token_ids", "stop_reason"):
        assert getattr(completion.choices[0], name) is None
    conversation = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "a"}], max_tokens=1
    )
    for name in ("prompt_logprobs", "prompt_token_ids"):
        assert getattr(conversation, name) is None
    for name in ("token_ids", "stop_reason"):
        assert getattr(conversation.choices[0], name) is None
    for name in ("refusal", "reasoning", "reasoning_content", "tool_calls"):
        assert getattr(conversation.choices[0].message, name) is None
    (model,) = client.models.list()
    assert (model.root, model.parent) == ("toy", None)


def test_answers_say_what_made_them(http: httpx.Client) -> None:
    prints = {complete(http)["system_fingerprint"], chat(http)["system_fingerprint"]}
    for path in PROMPTS:
        prints |= {chunk["system_fingerprint"] for chunk in chunks(http, path, max_tokens=3)}
    (fingerprint,) = prints
    assert fingerprint.startswith("nanoflow-")


# Token ids


def test_token_ids_of_prompt_and_completion(http: httpx.Client) -> None:
    (choice,) = complete(http, max_tokens=9, return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS, *b"abc"], QUICK)
    answer = chat(http, return_token_ids=True)
    assert answer["prompt_token_ids"] == [BOS, *b"user: hi\nassistant: "]
    assert answer["choices"][0]["token_ids"] == QUICK
    (choice,) = complete(http, max_tokens=0, echo=True, return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS, *b"abc"], [])


@pytest.mark.parametrize("path", PROMPTS)
def test_token_ids_in_a_stream_add_up_and_the_prompts_come_once(http: httpx.Client, path: str) -> None:
    parts = chunks(http, path, max_tokens=9, n=2, return_token_ids=True)
    for index in (0, 1):
        choices = [choice for chunk in parts for choice in chunk["choices"] if choice["index"] == index]
        ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
        assert bytes(ids) == [b"the quick", b"he quick "][index]
    if path == "/v1/completions":
        firsts = [chunk["choices"][0] for chunk in parts]
        assert [choice["index"] for choice in firsts if "prompt_token_ids" in choice] == [0, 1]
    else:
        assert ["prompt_token_ids" in chunk for chunk in parts] == [True] + [False] * (len(parts) - 1)


def test_tokens_are_named_by_their_ids_if_asked_for(http: httpx.Client, generous: httpx.Client) -> None:
    for server, fields in ((http, {"return_tokens_as_token_ids": True}), (generous, {})):
        shown = complete(server, prompt="a", max_tokens=1, logprobs=2, echo=True, **fields)["choices"][0]["logprobs"]
        assert shown["tokens"] == [f"token_id:{BOS}", "token_id:97", "token_id:116"]
        assert shown["top_logprobs"][1:] == [
            {"token_id:97": -0.5, "token_id:98": -2.0},
            {"token_id:116": -0.5, "token_id:117": -2.0},
        ]
        (entry,) = chat(server, max_tokens=1, logprobs=True, top_logprobs=1, **fields)["choices"][0]["logprobs"][
            "content"
        ]
        assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("token_id:116", "token_id:116")
    named = complete(generous, prompt="a", max_tokens=1, logprobs=0, return_tokens_as_token_ids=False)
    assert named["choices"][0]["logprobs"]["tokens"] == ["t"]


def test_special_tokens_of_a_prompt_are_a_choice(http: httpx.Client) -> None:
    assert tokens_of(http) == tokens_of(http, add_special_tokens=True) == [BOS, *b"abc"]
    assert tokens_of(http, add_special_tokens=False) == [*b"abc"]
    for path in ("/v1/chat/completions", "/tokenize"):
        counts = []
        for adds in (False, None, True):
            answer = http.post(path, json={"messages": CHAT, "add_special_tokens": adds}).json()
            counts.append(answer["count"] if path == "/tokenize" else answer["usage"]["prompt_tokens"])
        assert counts[0] == counts[1] == counts[2] - 1


# Truncation


def test_a_prompt_keeps_its_end_or_its_beginning(http: httpx.Client) -> None:
    assert tokens_of(http, prompt="abcdef", truncate_prompt_tokens=2) == [*b"ef"]
    assert tokens_of(http, prompt=[97, 98, 99], truncate_prompt_tokens=2, truncation_side="right") == [97, 98]
    ids = chat(http, return_token_ids=True, truncate_prompt_tokens=4, max_tokens=1)["prompt_token_ids"]
    assert ids == [*b"nt: "]


def test_minus_one_keeps_what_the_context_has_room_for(http: httpx.Client) -> None:
    long = "a" * (2 * MAX_MODEL_LEN)
    answer = complete(http, prompt=long, truncate_prompt_tokens=-1, max_tokens=6)
    assert answer["usage"] == {
        "prompt_tokens": MAX_MODEL_LEN - 6,
        "completion_tokens": 6,
        "total_tokens": MAX_MODEL_LEN,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    answer = chat(http, messages=[{"role": "user", "content": long}], truncate_prompt_tokens=-1, max_tokens=None)
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("path", PROMPTS)
def test_more_than_the_context_cannot_be_kept(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={**PROMPTS[path], "max_tokens": 6, "truncate_prompt_tokens": MAX_MODEL_LEN})
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "truncate_prompt_tokens is 256, and there is room for 250 tokens"


# Streams


@pytest.mark.parametrize("path", PROMPTS)
def test_every_chunk_has_token_counts_if_asked_for(http: httpx.Client, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(http, path, max_tokens=5, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in parts if chunk["choices"]]
    assert counts == sorted(counts) and counts[-1] == 5 and parts[-1]["usage"]["completion_tokens"] == 5
    assert len({chunk["usage"]["prompt_tokens"] for chunk in parts}) == 1
    assert all(
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        for usage in (chunk["usage"] for chunk in parts)
    )
    for other in ({"include_usage": False, "continuous_usage_stats": True}, {"continuous_usage_stats": True}, {}):
        assert all("usage" not in chunk for chunk in chunks(http, path, max_tokens=5, stream_options=other))


# Chat


def test_a_last_message_is_echoed(http: httpx.Client) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "Well, "}]
    fields = {"messages": messages, "echo": True, "continue_final_message": True}
    assert chat(http, **fields)["choices"][0]["message"]["content"] == "Well, the quick"
    parts = chunks(http, "/v1/chat/completions", max_tokens=9, n=2, **fields)
    texts = ["", ""]
    for chunk in parts:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["Well, the quick", "Well, he quick "]
    assert chat(http, messages=messages, continue_final_message=True)["choices"][0]["message"]["content"] == "the quick"
    assert chat(http, echo=True)["choices"][0]["message"]["content"] == "the quick"


def test_variables_of_the_template_come_with_the_request(http: httpx.Client) -> None:
    fields = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = http.post("/tokenize", json=fields).json()["tokens"][1:]
    assert bytes(tokens) == b"user: hi\nassistant {'enable_thinking': False}: "
    assert chat(http, **fields, return_token_ids=True)["prompt_token_ids"][1:] == tokens


def test_a_template_of_a_request_needs_trust(http: httpx.Client, generous: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = http.post(path, json={"messages": CHAT, "chat_template": "{{ 1 }}"})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "chat_template")
        assert "--trust-request-chat-template" in error_of(refused)["message"]
        assert generous.post(path, json={"messages": CHAT, "chat_template": "{{ 1 }}"}).status_code == 200
    tokens = generous.post("/tokenize", json={"messages": CHAT, "chat_template": "{{ 1 }}"}).json()["tokens"]
    assert bytes(tokens[1:]).startswith(b"{{ 1 }}\nuser: hi")


# Log probabilities


def test_all_log_probabilities(generous: httpx.Client) -> None:
    content = chat(generous, max_tokens=1, logprobs=True, top_logprobs=-1)["choices"][0]["logprobs"]["content"]
    assert len(content[0]["top_logprobs"]) == VOCAB_SIZE


# The tokenizer


def test_the_tokenizer_is_described_if_the_server_allows_it(http: httpx.Client, generous: httpx.Client) -> None:
    assert http.get("/tokenizer_info").status_code == 404
    assert generous.get("/tokenizer_info").json()["tokenizer_class"] == "ByteTokenizer"
    assert "/tokenizer_info" in generous.get("/openapi.json").json()["paths"]


# Who goes first


@pytest.mark.parametrize("path", PROMPTS)
def test_priority_and_service_tier_reach_the_engine(path: str) -> None:
    engine = FakeAsyncEngine()
    with served(engine) as root_url, httpx.Client(base_url=root_url, timeout=10) as client:

        def post(**fields: Any) -> httpx.Response:
            return client.post(path, json={**PROMPTS[path], "max_tokens": 1, **fields})

        for fields in (
            {"priority": -3},
            {"priority": 2.0},
            {"priority": "batch"},
            {"service_tier": "flex"},
            {"service_tier": "flex", "priority": "batch"},
            {"service_tier": "priority", "priority": 7},
        ):
            assert post(**fields).status_code == 200
        # Without a priority, or with that of everybody, the prompt has none.
        assert post(service_tier="default", priority=0).status_code == 200
        assert engine.seen_priorities == [-3, 2, "batch", "batch", "batch", 7]
        refused: tuple[tuple[dict[str, Any], str], ...] = (
            ({"priority": "low"}, "priority"),
            ({"priority": 1.5}, "priority"),
            ({"priority": True}, "priority"),
            ({"priority": 2**40}, "priority"),
            ({"service_tier": "gold"}, "service_tier"),
            ({"service_tier": "flex", "priority": 0}, "priority"),
        )
        for fields, param in refused:
            answer = post(**fields)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
