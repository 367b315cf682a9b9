"""KV pages in host memory and on disk, end to end on a CPU: answers are those of an engine without them."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.engine.llm import LLM
from nanoflow.outputs import RequestOutput
from nanoflow.request import SamplingParams
from nanoflow.scheduler.load_gain import LoadGain
from tests.all_cases import part
from tests.driving import Prompt, expect_less
from tests.families import make_model
from tests.server_process import ServerProcess, running_server, start_server
from tests.toy_models import ENGINE_OPTIONS, VOCAB_SIZE, write_toy_model

PAGE_SIZE = 16
SMALL = {"num_pages": 34, "max_batch_tokens": 96, "max_model_len": 256, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes are loaded, however fast the toy is that could compute them."""
    monkeypatch.setattr(LoadGain, "is_worth", lambda *_: True)


def open_llm(model: Path | str, **options: Any) -> LLM:
    return LLM(str(model), **{**ENGINE_OPTIONS, **SMALL, **options})


def tokens(count: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Prompt:
    rng = random.Random(seed)
    return [rng.randrange(4, vocab_size) for _ in range(count)]


def sampled(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=5, max_tokens=max_tokens, ignore_eos=True, **options)


def generate(llm: LLM, prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    llm._engine.check_integrity()
    return outputs


def said(outputs: Sequence[RequestOutput]) -> list[Any]:
    """Tokens and log probabilities of all completions, and how often the prompt's were computed."""
    return [
        [
            (completion.token_ids, [{token: round(one.logprob, 3) for token, one in each.items()} for each in logprobs])
            for completion in output.outputs
            if (logprobs := completion.logprobs or []) is not None
        ]
        + [len(output.prompt_logprobs or [])]
        for output in outputs
    ]


def talk(llm: LLM, params: SamplingParams, *, num_talks: int = 7, num_rounds: int = 3) -> list[Any]:
    """Conversations with common beginnings, some with a salt, of several rounds."""
    system = [tokens(count, 20 + count) for count in (0, 40, 80)]
    talks = [[*system[place % 3], *tokens(70, 40 + place)] for place in range(num_talks)]
    rounds = []
    for turn in range(num_rounds):
        prompts = [
            {"prompt_token_ids": each, "cache_salt": "mine" if place % 4 == 3 else None}
            for place, each in enumerate(talks)
        ]
        outputs = generate(llm, prompts, params)
        rounds.append(said(outputs))
        talks = [
            [*each, *output.outputs[0].token_ids, *tokens(3, 60 + turn)]
            for each, output in zip(talks, outputs, strict=True)
        ]
    return rounds


TALKS: dict[str, tuple[dict[str, Any], SamplingParams]] = {
    "async": ({}, sampled(20, logprobs=0)),
    "sync, n=2": ({"async_scheduling": False}, sampled(20, n=2)),
    "drafts": ({"speculative": "ngram:3:3:1"}, sampled(20)),
    "scored": ({}, sampled(12, prompt_logprobs=1, n=2)),
}


@pytest.mark.parametrize("name", part(["drafts", "scored"], of=TALKS))
def test_conversations_in_a_small_cache_get_the_same_tokens(
    always_worth_it: None, model: Path, tmp_path: Path, name: str
) -> None:
    options, params = TALKS[name]
    with closing(open_llm(model, **options)) as llm:
        expected = talk(llm, params)
    for tiers in ({"kv_host_gib": 0.02}, {"kv_host_gib": 0.0005, "kv_dir": str(tmp_path)}):
        with closing(open_llm(model, **tiers, **options)) as llm:
            expect_less(llm._engine, 10)
            assert talk(llm, params) == expected
            stats = llm._engine.stats()
            assert stats.num_preemptions > 0 and stats.pages_in_use == 0
            host = stats.tiers["host"]
            assert host.stored_bytes > 0
            # Prompts that are scored are computed in full.
            assert params.prompt_logprobs is not None or host.hits > 0 < host.loaded_bytes


def test_the_embedded_model_finds_in_host_memory_what_the_device_had_to_give_up(always_worth_it: None) -> None:
    options = {**SMALL, "num_pages": 16, "max_batch_tokens": 256, "device": "cpu"}
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompts = ["def fibonacci(n):\n    " * 12, "import os\nimport sys\n" * 14, "class Tree:\n    pass\n" * 14]
    found: dict[float | None, list[Any]] = {}
    for host_gib in (None, 0.25):
        with closing(LLM("default", kv_host_gib=host_gib, **options)) as llm:
            outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in (*prompts, *prompts)]
            found[host_gib] = [output.outputs[0].token_ids for output in outputs]
            again = [output.num_cached_tokens or 0 for output in outputs[3:]]
            if host_gib is None:
                assert again[0] == 0, "the device must be too small for all of them"
            else:
                # All full pages but the last, if that is the prompt's end.
                assert all(
                    count >= (len(output.prompt_token_ids or []) - 1) // PAGE_SIZE * PAGE_SIZE
                    for count, output in zip(again, outputs[3:], strict=True)
                ), again
                assert llm._engine.stats().tiers["host"].hits > 0
    assert found[None] == found[0.25]


def test_layers_with_a_sliding_window_are_loaded_too(always_worth_it: None, tmp_path: Path) -> None:
    folder = make_model("gemma3", tmp_path, seed=1)
    options = {**ENGINE_OPTIONS, "max_num_seqs": 4, "num_pages": 12, "max_model_len": 160, "skip_tokenizer_init": True}
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [tokens(120, seed, vocab_size=100) for seed in (9, 10, 9, 10)]
    with closing(LLM(str(folder), kv_host_gib=0.02, **options)) as llm:
        outputs = [generate(llm, [prompt], params)[0] for prompt in prompts]
        assert llm._engine.stats().tiers["host"].hits > 0
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 112, 112]
    assert said(outputs[:2]) == said(outputs[2:])


def test_an_engine_that_is_started_again_finds_what_it_had_on_disk(
    always_worth_it: None, model: Path, tmp_path: Path
) -> None:
    prompt, outputs = tokens(10 * PAGE_SIZE + 3, 1), []
    for _ in range(2):
        with closing(open_llm(model, kv_dir=str(tmp_path), kv_disk_gib=0.1)) as llm:
            outputs += generate(llm, [prompt], sampled(8))
            llm.close()
    assert [output.num_cached_tokens for output in outputs] == [0, 10 * PAGE_SIZE]
    assert said(outputs[:1]) == said(outputs[1:])


def test_what_was_forgotten_is_in_no_tier(model: Path, tmp_path: Path) -> None:
    prompt = tokens(10 * PAGE_SIZE, 2)
    for _ in range(2):
        with closing(open_llm(model, kv_dir=str(tmp_path), kv_disk_gib=0.1)) as llm:
            assert generate(llm, [prompt], sampled(1))[0].num_cached_tokens == 0
            assert llm.reset_prefix_cache() is True


# Over HTTP

SERVED = ("default", "--device", "cpu", "--num-pages", "48", "--max-model-len", "512", "--max-num-seqs", "8")
TEXT = "def fibonacci(n):\n    if n < 2:\n        return n\n" * 8
OTHERS = [f"import module_{place}\nfrom package_{place} import name\n" * 12 for place in range(4)]


def complete(http: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}
    answer: dict[str, Any] = http.post("/v1/completions", json=body).raise_for_status().json()
    return answer


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def tier_metrics(http: httpx.Client) -> dict[str, float]:
    return {
        f"{sample.name.partition(':')[2]} {sample.labels['tier']}": sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if "tier" in sample.labels
    }


def client_of(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.root_url, timeout=60)


def test_loads_and_advice_over_http() -> None:
    with running_server([*SERVED, "--kv-host-gib", "0.25"]) as server, client_of(server) as http:
        first = complete(http, TEXT, session_id="s")
        for other in OTHERS:
            complete(http, other)
        again = complete(http, TEXT, session_id="s")
        assert again["choices"] == first["choices"] and cached(first) == 0
        assert cached(again) == (again["usage"]["prompt_tokens"] - 1) // PAGE_SIZE * PAGE_SIZE
        metrics = tier_metrics(http)
        assert metrics["kv_tier_hits_total host"] == cached(again) <= metrics["kv_tier_queries_total host"]
        assert metrics["kv_tier_loaded_bytes_total host"] > 0 and metrics["kv_tier_load_seconds_total host"] > 0
        assert metrics["kv_tier_stored_bytes_total host"] > metrics["kv_tier_loaded_bytes_total host"]
        for other in OTHERS:
            complete(http, other)
        num_hits = tier_metrics(http)["kv_tier_hits_total host"]
        advice = http.post("/v1/prefetch", json={"session_id": "s"}).json()
        assert advice["num_prefetched_tokens"] > 0
        # An answer comes before its pages do.
        num_hits += advice["num_prefetched_tokens"]
        deadline_s = time.monotonic() + 10
        while tier_metrics(http)["kv_tier_hits_total host"] < num_hits:
            assert time.monotonic() < deadline_s, "what was prefetched does not arrive"
            time.sleep(0.02)
        turn = complete(http, TEXT + first["choices"][0]["text"] + "\n", session_id="s")
        assert cached(turn) >= cached(again)
        assert tier_metrics(http)["kv_tier_hits_total host"] == num_hits, "the next turn had nothing left to load"


def keep_busy(url: str, stop: threading.Event) -> None:
    """Requests until told to stop, or until nobody answers."""
    number = 0
    with suppress(httpx.HTTPError), httpx.Client(base_url=url, timeout=60) as http:
        while not stop.is_set():
            complete(http, OTHERS[number % len(OTHERS)] + f"# {number}\n")
            number += 1


def test_a_server_that_ends_or_is_killed_goes_on_with_what_is_on_disk(tmp_path: Path) -> None:
    options = [*SERVED, "--kv-dir", str(tmp_path), "--kv-host-gib", "0.01", "--kv-disk-gib", "0.2"]
    answers: list[dict[str, Any]] = []
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        server = start_server(*options, "--port", "0")
        try:
            server.wait_ready(120)
            with client_of(server) as http:
                answers.append(complete(http, TEXT))
                if number == signal.SIGKILL:
                    stop = threading.Event()
                    busy = [threading.Thread(target=keep_busy, args=(server.root_url, stop)) for _ in range(2)]
                    for thread in busy:
                        thread.start()
                    time.sleep(0.7)
                    server.stop(number)
                    stop.set()
                    for thread in busy:
                        thread.join()
                else:
                    assert server.stop(number) == 0, "".join(server.lines)
        finally:
            server.process.kill()
    assert all(answer["choices"] == answers[0]["choices"] for answer in answers)
    full = (answers[0]["usage"]["prompt_tokens"] - 1) // PAGE_SIZE * PAGE_SIZE
    assert [cached(answer) for answer in answers] == [0, full, full]
