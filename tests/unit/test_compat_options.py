"""Options as users of vLLM write them: which are ours, which are taken at some values, which end in a line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow.compat.engine_options import ENGINE
from nanoflow.compat.entries import Alias, Foreign, Same, Table, read_text
from nanoflow.compat.sampling_options import SAMPLING
from nanoflow.compat.server_options import SERVER
from nanoflow.compat.speculative_config import SPECULATIVE
from nanoflow.compat.unknown import unknown_option
from nanoflow.config import ConfigError, EngineConfig, ServerConfig
from nanoflow.option_names import from_kwargs, names_of
from nanoflow.request import KINDS
from tests.vllm_defaults import ENGINE_DEFAULTS, SERVER_DEFAULTS

TABLES = {"engine": (ENGINE, EngineConfig), "server": (SERVER, ServerConfig)}

# What is given to `LLM`, and what the engine has then.
OURS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_num_batched_tokens": 4096}, {"max_batch_tokens": 4096}),
    ({"block_size": 32}, {"page_size": 32}),
    ({"kv_cache_memory_bytes": 2**31}, {"kv_cache_gib": 2.0}),
    ({"num_gpu_blocks_override": 100}, {"num_pages": 100}),
    ({"enforce_eager": True}, {"cuda_graphs": False}),
    ({"enforce_eager": False}, {"cuda_graphs": True}),
    ({"performance_mode": "interactivity"}, {"goal": "latency"}),
    ({"performance_mode": "throughput"}, {"goal": "throughput"}),
    ({"load_format": "dummy"}, {"load_format": "random"}),
    ({"load_format": "auto"}, {"load_format": "safetensors"}),
    ({"dtype": "half"}, {"dtype": "float16"}),
    ({"dtype": "float"}, {"dtype": "float32"}),
    ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"max_model_len": 2048}, {"max_model_len": 2048}),
    ({"kv_cache_memory_bytes": None, "max_num_batched_tokens": None, "performance_mode": None}, {}),
    ({"max_model_len": None}, {"max_model_len": None}),
    ({"max_num_seqs": 64}, {"max_num_seqs": 64}),
    ({"gpu_memory_utilization": 0.5}, {"gpu_memory_utilization": 0.5}),
    ({"seed": None}, {"seed": 0}),
    ({"seed": 7}, {"seed": 7}),
    ({"max_logprobs": -1}, {"max_logprobs": -1}),
    ({"tokenizer": "folder"}, {"tokenizer": "folder"}),
    ({"revision": "main"}, {"revision": "main"}),
    ({"generation_config": "vllm"}, {"generation_config": "vllm"}),
    ({"skip_tokenizer_init": True}, {"skip_tokenizer_init": True}),
    ({"async_scheduling": False}, {"async_scheduling": False}),
    ({"device": "cpu"}, {"device": "cpu"}),
    ({"speculative": "ngram:4"}, {"speculative": "ngram:4:4:2"}),
    ({"speculative": "none"}, {"speculative": None}),
    ({"speculative_config": {}}, {"speculative": None}),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, {"speculative": "ngram:3:4:2"}),
    (
        {"speculative_config": '{"model": "[ngram]", "num_speculative_tokens": 5, "prompt_lookup_max": 3}'},
        {"speculative": "ngram:5:3:3"},
    ),
    (
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 5,
                "prompt_lookup_min": 1,
                "disable_by_batch_size": None,
                "disable_padded_drafter_batch": True,
                "enforce_eager": False,
                "draft_tensor_parallel_size": 1,
                "rejection_sample_method": "strict",
            }
        },
        {"speculative": "ngram:4:5:1"},
    ),
]
# What asks for what is so anyway.
TAKEN: list[dict[str, Any]] = [
    {"tensor_parallel_size": 1},
    {"pipeline_parallel_size": 1, "data_parallel_size": 1},
    {"trust_remote_code": False},
    {"enable_chunked_prefill": True},
    {"enable_prefix_caching": None},
    {"prefix_caching_hash_algo": "sha256"},
    {"quantization": None},
    {"quantization": "gptq_marlin"},
    {"tokenizer_mode": "auto"},
    {"swap_space": 0},
    {"swap_space": 4},
    {"cpu_offload_gb": 0},
    {"max_seq_len_to_capture": 8192},
    {"disable_custom_all_reduce": True},
    {"disable_log_stats": True},
    {"hf_overrides": {}},
    {"compilation_config": {}},
    {"kv_cache_dtype": "auto"},
    {"enable_lora": False, "max_lora_rank": 16},
    {"speculative_config": None},
    {"task": "generate"},
    {"runner": "generate"},
    {"logprobs_mode": "raw_logprobs"},
    {"scheduling_policy": "fcfs"},
    {"distributed_executor_backend": "mp"},
    {"limit_mm_per_prompt": {}},
    {"model_impl": "auto", "config_format": "auto"},
    {"hf_token": True},
]
# What cannot be done, and a part of what is said.
REFUSED: list[tuple[str, Any, str]] = [
    ("tensor_parallel_size", 2, "one GPU serves a model"),
    ("tensor_parallel_size", True, "one GPU"),
    ("trust_remote_code", True, "no Python of a model folder"),
    ("prefix_caching_hash_algo", "xxhash", "pages are found by SHA-256"),
    ("enable_chunked_prefill", False, "always computed in chunks"),
    ("enable_lora", True, "merge the adapter"),
    ("num_lookahead_slots", 4, "`speculative`, as ngram:4"),
    ("hf_overrides", {"a": 1}, "config.json"),
    ("rope_scaling", {"rope_type": "yarn"}, "config.json"),
    ("download_dir", "/tmp", "HF_HOME"),
    ("tokenizer_mode", "slow", "tokenizer.json"),
    ("swap_space", 8, "preempted requests are computed again"),
    ("task", "embed", "models generate text"),
    ("scheduling_policy", "shortest", "requests run by their `priority`"),
    ("compilation_config", 3, "torch compiles no kernels"),
    ("served_model_name", "x", "`nanoflow serve`"),
    ("logits_processors", ["a:b"], "no Python of"),
]


def test_no_option_stands_in_two_places() -> None:
    with pytest.raises(ValueError, match="a stands twice"):
        Table.of("t", [Same(name="a")], [Same(name="a")])
    assert len(ENGINE.entries) > 200 and len(SERVER.entries) > 50


@pytest.mark.parametrize("name", TABLES)
def test_what_is_ours_by_the_table_is_ours(name: str) -> None:
    table, kind = TABLES[name]
    own = {field.name for field in dataclasses.fields(kind)}
    for entry in table.entries.values():
        if isinstance(entry, Same):
            assert entry.name in own
        if isinstance(entry, Alias):
            assert entry.to in own and names_of(kind)[entry.name][0].name == entry.to


def test_every_parameter_of_ours_is_in_the_table() -> None:
    assert {entry.name for entry in SAMPLING.entries.values() if isinstance(entry, Same)} == set(KINDS)


@pytest.mark.parametrize("table", [ENGINE, SERVER, SAMPLING, SPECULATIVE], ids=lambda table: str(table.title))
def test_reasons_are_lines_and_values_are_taken(table: Table) -> None:
    for entry in table.foreign:
        assert (entry.reason and "\n" not in entry.reason and entry.reason[0] != entry.reason[0].upper()) or (
            entry.reason.startswith(("`", "KV", "CUDA", "SIGTERM"))
        )
        assert entry.changes_nothing(None)
        assert all(entry.changes_nothing(value) for value in entry.takes)
        assert not entry.changes_nothing("something else") and not entry.changes_nothing(object())


@pytest.mark.parametrize(("given", "expected"), OURS, ids=str)
def test_what_is_ours_is_done(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = from_kwargs(EngineConfig, given)
    assert config == dataclasses.replace(EngineConfig(), **expected)


@pytest.mark.parametrize("given", TAKEN, ids=str)
def test_what_is_so_anyway_is_taken(given: dict[str, Any]) -> None:
    assert from_kwargs(EngineConfig, given) == EngineConfig()


@pytest.mark.parametrize(("name", "value", "reason"), REFUSED)
def test_what_cannot_be_done_is_refused_by_its_line(name: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as problem:
        from_kwargs(EngineConfig, {name: value})
    message = str(problem.value)
    assert message.startswith(f"{name}=") and " is not possible: " in message and reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("disable_by_batch_size", 8, "disable_by_batch_size=8 is not possible: there are no drafts in iterations"),
        ("speculative_disable_by_batch_size", 8, "speculative_disable_by_batch_size=8 is not possible: there are no"),
        ("enforce_eager", 1, "enforce_eager=1 is not possible: there is no draft model"),
        ("parallel_drafting", True, "parallel_drafting=True is not possible: there is no draft model"),
        ("draft_tensor_parallel_size", 2, "draft_tensor_parallel_size=2 is not possible: there is no draft model"),
        ("rejection_sample_method", "probabilistic", "a drafted token counts only if the model would have drawn it"),
        ("prompt_lookup_mix", 3, "'prompt_lookup_mix' is not possible with ngram; did you mean"),
        (("a",), 3, "is not possible with ngram"),
    ],
)
def test_keys_of_the_speculative_config_are_refused_if_they_ask_for_more(key: Any, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as problem:
        from_kwargs(EngineConfig, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, key: value}})
    message = str(problem.value)
    assert message.startswith("speculative_config") and reason in message and "\n" not in message


# What vLLM does if nobody says otherwise, and this does not.
OTHERWISE = {
    *("h11_max_incomplete_event_size", "h11_max_header_count"),
    "disable_uvicorn_access_log",
    "exclude_tools_when_tool_choice_none",
}


@pytest.mark.parametrize("kind", [EngineConfig, ServerConfig])
def test_defaults_of_vllm_are_not_refused(kind: type[Any]) -> None:
    defaults = ENGINE_DEFAULTS if kind is EngineConfig else SERVER_DEFAULTS
    for name, value in defaults.items():
        is_ours = name in {field.name for field in dataclasses.fields(kind)}
        if name in OTHERWISE and not is_ours:
            with pytest.raises(ConfigError, match=f"^{name}="):
                from_kwargs(kind, {name: value})
        else:
            from_kwargs(SERVER_KINDS.get(name, kind), {name: value})


# In vLLM an option of the server, here one of the engine, and the other way round.
SERVER_KINDS = {"chat_template": EngineConfig, "shutdown_timeout": ServerConfig, "tokens_only": ServerConfig}


def test_numbers_of_numpy_are_numbers() -> None:
    assert from_kwargs(EngineConfig, {"tensor_parallel_size": np.int64(1)}) == EngineConfig()
    with pytest.raises(ConfigError, match="tensor_parallel_size="):
        from_kwargs(EngineConfig, {"tensor_parallel_size": np.int64(2)})


def test_a_model_is_named(tmp_path: Path) -> None:
    assert from_kwargs(EngineConfig, {"model": tmp_path}).model == str(tmp_path)
    with pytest.raises(ConfigError, match="model must be a folder or a name, got None"):
        from_kwargs(EngineConfig, {"model": None})


def test_secrets_are_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"^hf_token is not possible: set HF_TOKEN") as problem:
        from_kwargs(EngineConfig, {"hf_token": "hf_abcdef"})
    assert "abcdef" not in str(problem.value)


@pytest.mark.parametrize("value", ["mistral", "pt", "tensorizer", "bitsandbytes", "sharded_state"])
def test_formats_of_weights_that_there_are_not(value: str) -> None:
    with pytest.raises(ConfigError, match=f"^load_format: '{value}' is not possible: weights are read "):
        from_kwargs(EngineConfig, {"load_format": value})


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_flags_are_truth_values(value: Any) -> None:
    if value is None:
        assert from_kwargs(EngineConfig, {"skip_tokenizer_init": None}) == EngineConfig()
        return
    for name in ("enforce_eager", "skip_tokenizer_init", "async_scheduling"):
        with pytest.raises(ConfigError, match="must be true or false"):
            from_kwargs(EngineConfig, {name: value})


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("--tensor-parallel-size", ["--page-size"], "unknown option '--tensor-parallel-size': one GPU serves a model"),
        ("tensor_paralel_size", ["page_size"], "; tensor_parallel_size, if that is meant: one GPU"),
        ("best_of", ["page_size"], "unknown option 'best_of': all n completions"),
        ("temperature", ["page_size"], "here: it is one of `SamplingParams`"),
        ("host", ["page_size"], "here: it is one of `nanoflow serve`"),
        ("page_sizes", ["page_size"], "; did you mean 'page_size'?"),
        ("batch_tokens", ["max_batch_tokens", "page_size"], "; did you mean 'max_batch_tokens'?"),
        ("path_mode", ["page_size", "cache_mode"], "unknown option 'path_mode'; known: page_size, cache_mode"),
        ("nothing", [f"option_{i}" for i in range(40)], "unknown option 'nothing'; --help lists all"),
    ],
)
def test_a_hint_is_near_in_meaning(name: str, known: list[str], message: str) -> None:
    shown = unknown_option(name, known)
    assert message in shown and "\n" not in shown and len(shown) < 250


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("0.5", 0.5), ("true", True), ("None", None), ("null", None), ('{"a": 1}', {"a": 1}), ("auto", "auto")],
)
def test_values_on_the_command_line(text: str, value: Any) -> None:
    assert read_text(text) == value and type(read_text(text)) is type(value)


def test_numbers_of_any_kind_are_compared_and_truth_values_are_none() -> None:
    one = Foreign(name="x", reason="r", takes=(1, [], "a"))
    assert one.changes_nothing(1.0) and one.changes_nothing(()) and one.changes_nothing("a")
    assert not any(map(one.changes_nothing, (True, 2, "1", [1], {}, "", b"a")))
