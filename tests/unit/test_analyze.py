"""`nanoflow analyze`: the table, what it says of bad input, and that it needs neither torch nor a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoflow.cli import main
from nanoflow.hardware import GPUS
from tests.toy_models import write_toy_model


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main.main(["analyze", *argv]) == 0
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_the_table_is_table_2_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("preset:llama-2-70b", "--gpu", "a100-80x8", "--workload", "512/1024", "--max-batch-tokens", "2048")
    text = shown(capsys, *argv)
    assert row(text, "qkv_proj")[1:] == ["27,487.8", "19.5", "0.0", "11.01", "1.22", "0.00", "-", "-", "compute"]
    assert row(text, "decode_attention")[-1] == "memory"
    assert row(text, "down_proj_all_reduce")[-1] == "network"
    assert "2,048 tokens, 1,365 of them decodes, context 1024" in text
    assert "(memory would allow 2,244 tokens, 1,496 of them decodes)" in text
    assert "compute-bound; memory / compute 0.33" in text
    assert "at sustained rates: 2,080 TFLOP/s, 16.00 TB/s, 2,400 GB/s of network" in text
    assert "1,885 tokens/s/GPU" in text
    gathered = shown(capsys, *argv, "--exchange", "all-gather")
    assert row(gathered, "o_proj_input_all_gather")[3] == "18.8"


def test_on_the_h200_it_speaks_of_power(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "preset:llama-3-8b", "--workload", "1024/512")
    assert "power-bound" in text and "memory would allow" not in text
    assert row(text, "gate_up_proj")[-1] == "power"
    assert re.search(r"serial bound +28,\d{3} tokens/s/GPU, 24\.\d mJ/token", text)
    assert "all_reduce" not in text and "GB/s of network" not in text
    assert re.search(r"flop_j +8\.74e-13 +measured, one H200: 480 mJ", text)


def test_a_card_without_measurements_has_peak_rates_only(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "preset:llama-3-8b", "--gpu", "h100")
    assert "at peak rates" in text and "at sustained rates" not in text


def test_experts_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "preset:mixtral-8x7b", "--gpu", "a100-80x8")
    assert "MixtralForCausalLM 46.7B, 12.88e9 of 46.70e9 parameters a token, weights 93.4 GB" in text
    argv = ("preset:qwen3-30b-a3b", "--max-batch-tokens", "32")
    even, uneven = shown(capsys, *argv), shown(capsys, *argv, "--expert-skew", "1")
    assert (
        "8 of 128 a token; the batch reads 111.8 of a layer, each with 2.0 tokens on average, the busiest with 2.0"
        in even
    )
    assert float(row(uneven, "experts_in")[2]) < 0.9 * float(row(even, "experts_in")[2])
    assert row(uneven, "experts_in")[1] == row(even, "experts_in")[1]
    assert "experts " not in shown(capsys, "preset:llama-3-8b")


def test_folders_the_embedded_model_and_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "LlamaForCausalLM" in shown(capsys, str(write_toy_model(tmp_path)))
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,100,10\nXXX,200,30\nXXX,99999,9\n")
    text = shown(capsys, "default", "--workload", f"trace:{trace}")
    assert "150 prompt and 20 output tokens a request" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preset:llama3-8b"], "unknown preset 'llama3-8b'; did you mean 'llama-3-8b'?"),
        (["llama-3-8b"], "model 'llama-3-8b': no such folder; did you mean 'preset:llama-3-8b'?"),
        (["meta-llama/Llama-2-70b"], "did you mean 'preset:llama-2-70b'?"),
        (["/nowhere/zz"], "model '/nowhere/zz': no such folder; give a folder with a config.json, or preset:NAME"),
        (["preset:llama-3-8b", "--gpu", "h300"], "unknown GPU 'h300'; did you mean 'h100'?"),
        (["preset:llama-3-8b", "--gpu", "h200x0"], "GPUs must be NAME or NAMExN"),
        (["preset:llama-3-8b", "--workload", "512"], "workload must be IN/OUT (as 512/512)"),
        (["preset:llama-3-8b", "--workload", "trace:/nowhere"], "cannot read trace /nowhere"),
        (["preset:llama-3-8b", "--max-batch-tokens", "0"], "max_batch_tokens must be positive, got 0"),
        (["preset:qwen3-30b-a3b", "--expert-skew", "-1"], "expert_skew must be a number from 0 to 10, got -1"),
        (["preset:qwen3-30b-a3b", "--expert-skew", "nan"], "expert_skew must be a number from 0 to 10, got nan"),
        (["preset:llama-3-70b", "--gpu", "h100"], "it takes 2 of these GPUs"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["analyze", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nanoflow: error: ") and message in error and error.count("\n") == 1


def test_help_teaches_and_names_every_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["analyze", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and all(name in text for name in GPUS)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from nanoflow.cli.main import main; main(['analyze', 'preset:llama-3-8b'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
