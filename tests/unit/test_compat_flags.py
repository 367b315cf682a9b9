"""Flags as people write them for `vllm serve`: spellings, short forms, JSON, and those that there are not."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow.cli import main
from nanoflow.cli.foreign_flags import with_dashes
from nanoflow.config import EngineConfig, ServerConfig


class Served(Exception):
    """The command line was read."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What `nanoflow serve` would start with."""
    found: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr("nanoflow.server.serve.run_server", lambda engine, server, **_: found.append((engine, server)))
    return found


def run(line: str) -> int:
    try:
        return main.main(["serve", *line.split()])
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        return leave.code


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model --max_num_batched_tokens 4096", {"model": "model", "max_batch_tokens": 4096}),
        ("--max-num-batched-tokens=4096", {"max_batch_tokens": 4096}),
        ("--block-size 32 -tp 1", {"page_size": 32}),
        ("-tp=1 -pp 1 -dp 1 model", {"model": "model"}),
        ("--enforce-eager", {"cuda_graphs": False}),
        ("--enforce_eager --dtype half", {"cuda_graphs": False, "dtype": "float16"}),
        ("--load-format dummy", {"load_format": "random"}),
        ("--no-enable-prefix-caching --enable-chunked-prefill", {"enable_prefix_caching": False}),
        ("--no-trust-remote-code", {}),
        ("--tensor-parallel-size 1.0", {}),
        ("--compilation-config {}", {}),
        ("--hf-token", {}),
        ("--speculative-config null", {}),
        ("-O3", {}),
        ("-O=3", {}),
        ("--swap-space 4 --seed 5", {"seed": 5}),
        ("--kv-cache-memory-bytes 2G", {"kv_cache_gib": 2.0}),
        ("--disable-log-requests --disable_log_stats", {}),
        ("--skip-tokenizer-init", {"skip_tokenizer_init": True}),
        ("--max-logprobs 5 --generation-config vllm", {"max_logprobs": 5, "generation_config": "vllm"}),
    ],
)
def test_flags_that_are_taken(line: str, expected: dict[str, Any], served: list[Any]) -> None:
    assert run(line) == 0
    ((engine, _),) = served
    assert engine == EngineConfig(**expected)


def test_flags_of_the_server(served: list[Any]) -> None:
    assert run("--uvicorn-log-level warning -asc 2 --response-role assistant --chat-template-content-format auto") == 0
    ((_, server),) = served
    assert server == ServerConfig(log_level="warning", api_servers=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-tp 2", "-tp 2 is not possible: one GPU serves a model"),
        ("--tensor-parallel-size=2", "--tensor-parallel-size 2 is not possible: one GPU"),
        ("--tensor_parallel_size 2", "--tensor-parallel-size 2 is not possible: one GPU"),
        ("--trust-remote-code", "--trust-remote-code is not possible: no Python of a model folder"),
        (
            "--prefix-caching-hash-algo xxhash",
            "--prefix-caching-hash-algo xxhash is not possible: pages are found by",
        ),
        ("--no-enable-chunked-prefill", "--no-enable-chunked-prefill is not possible: prompts are always"),
        ("--hf-overrides.rope_theta 3", '--hf-overrides {"rope_theta": 3} is not possible: what config.json says'),
        ("--compilation-config.mode=3", '--compilation-config {"mode": 3} is not possible: torch compiles no kernels'),
        ("-O0", "-O 0 is not possible: torch compiles no kernels"),
        ("--tool-parser-plugin a.py", "--tool-parser-plugin a.py is not possible: formats of calls are those of"),
        ("--lora-modules a=b c=d", "--lora-modules a=b c=d is not possible: there are no LoRA"),
        ("--quantization fp6", "invalid choice: 'fp6'"),
        ("-q fp6", "invalid choice: 'fp6'"),
        ("--hf-token secret", "--hf-token is not possible: set HF_TOKEN"),
        ("--uds /tmp/x", "--uds /tmp/x is not possible: the server listens at a port"),
        ("--tensor-parallel-sizes 2", "; tensor_parallel_size, if that is meant: one GPU"),
        ("--temperature 1", "here: it is one of `SamplingParams`"),
    ],
)
def test_flags_that_are_refused(line: str, message: str, capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    assert run(line) == 2 and not served
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 2 and "secret" not in error


def test_help_shows_ours_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "--tensor-parallel-size" not in shown and "--max-num-batched-tokens" in shown


def test_the_sampling_flags_of_generate_are_read_by_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["generate", "x", "--use-beam-search"])
    assert "--use-beam-search is not possible: there is no beam search" in capsys.readouterr().err


def test_only_names_of_flags_are_rewritten() -> None:
    argv = ["--a_b=c_d", "e_f", "--", "--g_h", "-i_j"]
    assert with_dashes(argv) == ["--a-b=c_d", "e_f", "--", "--g_h", "-i_j"]
    assert with_dashes(["--a.b_c.d", "x", "--e"]) == ['--a={"b_c": {"d": "x"}}', "--e"]
