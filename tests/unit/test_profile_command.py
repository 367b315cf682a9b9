"""`nanoflow profile` on the embedded model and a CPU, end to end, and what it says of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow.cli import profile
from nanoflow.cli.options import CommandParser
from nanoflow.models.config_json import ModelError, parse
from nanoflow.models.registry import build_graph
from nanoflow.profile.table import CostTable, Profile, ProfileError


def run(*argv: str) -> int:
    parser = CommandParser(prog="nanoflow")
    profile.add_parser(parser.add_subparsers())
    args = parser.parse_args(["profile", *argv])
    status: int = args.run(args)
    return status


def test_the_embedded_model_is_profiled_and_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    argv = ("default", "-o", str(path), "--quick", "--device", "cpu", "--max-batch-tokens", "32")
    assert run(*argv) == 0
    assert "points to measure, 0 known, about " in capsys.readouterr().out
    made = Profile.load(path)
    graph = build_graph(parse(made.config), None)
    assert CostTable(made, graph).cost("qkv_proj", 32).time_s > 0
    assert made.setup.gpu == "cpu" and made.setup.is_measured and made.setup.software["torch"]
    assert run(*argv) == 0
    assert f"0 points to measure, {len(made.points)} known" in capsys.readouterr().out
    assert Profile.load(path).points == made.points
    with pytest.raises(ProfileError, match="--fresh"):
        run(*argv, "--dtype", "bfloat16")


def test_an_estimate_needs_no_gpu_and_is_not_continued_by_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert run("default", "-o", str(path), "--estimate", "h200", "--max-batch-tokens", "64") == 0
    made = Profile.load(path)
    assert made.points and not made.setup.is_measured and made.setup.num_gpus == 1
    with pytest.raises(ProfileError, match="--fresh"):
        run("default", "-o", str(path), "--device", "cpu", "--dtype", "float32")


def test_bad_input(tmp_path: Path) -> None:
    path = str(tmp_path / "profile.json")
    with pytest.raises(ValueError, match="max_batch_tokens must be positive"):
        run("default", "-o", path, "--max-batch-tokens", "0")
    with pytest.raises(ModelError, match="did you mean 'llama-3-8b'"):
        run("preset:llama3-8b", "-o", path)
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(ProfileError, match="not a profile"):
        run("default", "-o", path, "--device", "cpu")


def test_the_output_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("default")
    assert "-o/--output" in capsys.readouterr().err
