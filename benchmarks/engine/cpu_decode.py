"""Decode speed on the CPU: nanoflow against `generate` of transformers; same model, batch, threads and process.

The model has the shape of Qwen2.5-0.5B and random weights. Only decoding counts: the time of a run that generates one
token a request (prefill and first token) is subtracted from the time of a run that generates all of them. The rest is
the time of (tokens - 1) decodes a request. The two sides take turns, so that both run under the same conditions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common.document import write_document
from nanoflow import LLM, SamplingParams
from nanoflow.bench.machine import detect_machine
from nanoflow.cli.options import CommandParser

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison. Exit status 1 if --check is given and nanoflow is slower."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), args)
        sides = {"nanoflow": nanoflow_side(folder, args), "transformers": transformers_side(folder, args)}
        rates = measure(sides, args)
    ratios = [ours / theirs for ours, theirs in zip(rates["nanoflow"], rates["transformers"], strict=True)]
    report(rates, ratios, args)
    return 1 if args.check and statistics.median(ratios) < 1.0 else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.engine.cpu_decode", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights")
    parser.add_argument("--batch", type=int, default=8, help="requests decoded together")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens generated for each, at least 2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of both sides")
    parser.add_argument("--layers", type=int, default=24, help="layers of the model")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--check", action="store_true", help="exit with 1 if nanoflow is slower")
    args = parser.parse_args(argv)
    if args.output < 2 or min(args.batch, args.prompt, args.threads, args.layers, args.repeats) < 1:
        parser.error("--output must be at least 2, the other numbers at least 1")
    return args


def save_model(folder: Path, args: argparse.Namespace) -> None:
    """Write a random model with the shape of Qwen2.5-0.5B (which has biases on q, k and v)."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=args.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(folder)


def nanoflow_side(folder: str, args: argparse.Namespace) -> Generate:
    """Generation by nanoflow."""
    llm = LLM(
        model=folder, tokenizer="default", dtype=args.dtype, device="cpu", num_threads=args.threads, max_model_len=4096
    )

    def generate(prompts: Prompts, num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    return generate


def transformers_side(folder: str, args: argparse.Namespace) -> Generate:
    """Generation by transformers, with its default cache and PyTorch's own attention kernel."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).eval()

    def generate(prompts: Prompts, num_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        new_tokens: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return new_tokens

    return generate


def measure(sides: dict[str, Generate], args: argparse.Namespace) -> dict[str, list[float]]:
    """Decoded tokens/s of each side in each repeat, after a warm-up."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(151936, (args.batch, args.prompt), generator=generator).tolist()
    warm = {name: generate(prompts, 4) for name, generate in sides.items()}
    num_same = sum(ours == theirs for ours, theirs in zip(*warm.values(), strict=True))
    print(f"warm-up: the first 4 greedy tokens agree in {num_same} of {args.batch} requests", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats):
        for name, generate in sides.items():
            rates[name].append(decode_rate(generate, prompts, args.output))
            print(f"repeat {repeat}: {name:<14}{rates[name][-1]:8.2f} tokens/s", flush=True)
    return rates


def decode_rate(generate: Generate, prompts: Prompts, num_tokens: int) -> float:
    """Decoded tokens/s: tokens after the first / (time of a run - time of a run that stops at the first token)."""
    first_s, whole_s = run_s(generate, prompts, 1), run_s(generate, prompts, num_tokens)
    return len(prompts) * (num_tokens - 1) / (whole_s - first_s)


def run_s(generate: Generate, prompts: Prompts, num_tokens: int) -> float:
    """Seconds of one run."""
    start_s = time.perf_counter()
    completions = generate(prompts, num_tokens)
    elapsed_s = time.perf_counter() - start_s
    if [len(token_ids) for token_ids in completions] != [num_tokens] * len(prompts):
        raise RuntimeError("a completion has not the length asked for")
    return elapsed_s


def report(rates: dict[str, list[float]], ratios: list[float], args: argparse.Namespace) -> None:
    """Print medians with their range, and write the document."""
    for name, values in (*rates.items(), ("ratio", ratios)):
        unit = "" if name == "ratio" else " tokens/s"
        spread = f"({min(values):.2f} to {max(values):.2f})"
        print(f"{name:<14}{statistics.median(values):8.2f}{unit} {spread}")
    if args.json is None:
        return
    machine = detect_machine()
    write_document(
        args.json,
        "cpu_decode",
        headline={
            "what": f"CPU decode, Qwen2.5-0.5B shape, random weights, {args.dtype}, {args.batch} requests together",
            "measured": f"{statistics.median(rates['nanoflow']):.1f} tokens/s, "
            f"{statistics.median(ratios):.2f}x transformers ({min(ratios):.2f} to {max(ratios):.2f})",
            "target": "1x",
            "hardware": f"{machine.cpu_name}, {args.threads} threads",
        },
        options={name: value for name, value in vars(args).items() if name not in ("json", "check")},
        decoded_tokens_per_s=rates,
        ratio=ratios,
    )


if __name__ == "__main__":
    sys.exit(main())
