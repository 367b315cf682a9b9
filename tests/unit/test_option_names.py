"""Other names of options and of their values: as flags, as keywords, in the help, and what is refused."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from nanoflow.cli import main, options
from nanoflow.config import ConfigError, EngineConfig, ServerConfig, read_count
from nanoflow.option_names import from_kwargs, names_of


def run_cli(*argv: str) -> int:
    try:
        return main.main(argv)
    except SystemExit as leave:
        assert isinstance(leave.code, int)
        return leave.code


# For each alias a value under that name, and what the option has then.
ALIASES: dict[str, tuple[str, Any]] = {
    "performance_mode": ("interactivity", "latency"),
    "max_num_batched_tokens": ("4K", 4096),
    "speculative_config": ('{"method": "ngram", "num_speculative_tokens": 4}', "ngram:4:4:2"),
    "block_size": ("32", 32),
    "kv_cache_memory_bytes": ("2G", 2.0),
    "num_gpu_blocks_override": ("77", 77),
    "enforce_eager": ("", False),
    "disable_log_stats": ("", False),
    "uvicorn_log_level": ("warning", "warning"),
    "api_server_count": ("3", 3),
}
OF_CONFIGS = [
    (kind, name, field.name)
    for kind in (EngineConfig, ServerConfig)
    for name, (field, alias) in names_of(kind).items()
    if alias is not None
]


def read_flags(kind: type[Any], *argv: str) -> Any:
    group = options.OptionGroup(kind=kind, title="t")
    parser = options.CommandParser(prog="t")
    group.add_to(parser)
    return group.read(parser.parse_args(argv))


@pytest.mark.parametrize(("kind", "alias", "name"), OF_CONFIGS)
def test_an_alias_is_a_flag_and_a_keyword(kind: type[Any], alias: str, name: str) -> None:
    text, expected = ALIASES[alias]
    flag = "--" + alias.replace("_", "-")
    assert getattr(read_flags(kind, flag, *filter(None, [text])), name) == expected
    value: Any = True if not text else int(text) if text.isdigit() else text
    assert getattr(from_kwargs(kind, {alias: value}), name) == expected
    assert getattr(from_kwargs(kind, {alias: value, name: expected}), name) == expected


@pytest.mark.parametrize(("kind", "alias", "name"), OF_CONFIGS)
def test_help_names_the_alias(kind: type[Any], alias: str, name: str) -> None:
    (field, _) = names_of(kind)[name]
    parser = options.CommandParser(prog="t")
    options.OptionGroup(kind=kind, title="t").add_to(parser)
    shown = {action.dest: action.help or "" for action in parser._actions}
    assert "--" + alias.replace("_", "-") in shown[field.name] and shown[alias] == argparse.SUPPRESS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_batch_tokens": 5, "max_num_batched_tokens": 6},
            "max_batch_tokens (5) and max_num_batched_tokens (6) are two names of one option: give one of them",
        ),
        (
            {"enforce_eager": True, "cuda_graphs": True},
            "enforce_eager (True) and cuda_graphs (True) are two names of one option: give one of them",
        ),
        (
            {"max_num_batched_token": 6},
            "unknown option 'max_num_batched_token'; did you mean 'max_num_batched_tokens'?",
        ),
        ({"max_model_len": "4kk"}, "max_model_len: '4kk' is no whole number, as 4096, 4k (4,000) or 4K (4,096)"),
        ({"max_batch_tokens": 4.5}, "max_batch_tokens: '4.5' is no whole number, as 4096, 4k (4,000) or 4K (4,096)"),
        ({"max_model_len": -5}, "max_model_len: '-5' is no whole number, as 4096, 4k (4,000) or 4K (4,096)"),
        ({"kv_cache_memory_bytes": "many"}, "kv_cache_memory_bytes: 'many' is no whole number"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"goal": "speed"}, "goal must be one of throughput, balanced, latency, got 'speed'"),
    ],
)
def test_names_and_values_that_do_not_go_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as problem:
        from_kwargs(EngineConfig, values)
    assert str(problem.value).startswith(message) and "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--max-batch-tokens", "5", "--max-num-batched-tokens", "6"], "are two names of one option"),
        (["serve", "--block-size", "5", "--page-size", "6"], "block_size (5) and page_size (6) are two names"),
    ],
)
def test_two_flags_of_one_option_are_told(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*argv) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("nanoflow: error: ") and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("512", 512), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2M", 2 << 20), ("1g", 10**9)]
)
def test_counts_may_have_a_suffix(text: str, expected: int) -> None:
    assert read_count(text) == expected
    assert read_flags(EngineConfig, "--max-model-len", text).max_model_len == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_model_len", "auto", None),
        ("max_model_len", "-1", None),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", "bfloat16", "bfloat16"),
        ("load_format", "dummy", "random"),
        ("load_format", "auto", "safetensors"),
        ("goal", "interactivity", "latency"),
    ],
)
def test_values_have_other_names_too(name: str, value: str, expected: Any) -> None:
    flag = "--" + name.replace("_", "-")
    assert getattr(read_flags(EngineConfig, flag, value), name) == expected
    assert getattr(from_kwargs(EngineConfig, {name: value}), name) == expected


def test_a_value_that_is_no_number_is_named_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("serve", "--max-model-len", "long") == 2
    assert "argument --max-model-len: 'long' is no whole number" in capsys.readouterr().err


def test_a_type_of_torch_is_understood() -> None:
    assert from_kwargs(EngineConfig, {"dtype": "torch.bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize("command", [("generate", "x"), ("bench", "throughput")])
def test_where_nobody_watches_the_goal_is_throughput(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*command[:-1] if command[0] == "generate" else command, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: throughput)" in shown
    run_cli("serve", "--help")
    assert "(default: balanced)" in " ".join(capsys.readouterr().out.split())
