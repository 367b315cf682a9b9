"""Seconds from `nanoflow serve` to the first token, with the weights in the page cache.

First a checkpoint with random weights is written to a folder. Each repeat starts the server twice: once with an empty
cache of compiled kernels, so that all kernels are compiled, and once with the cache that the first start has filled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.config import DEFAULT_MODEL
from nanoflow.models.presets import PRESETS, preset_config, preset_name
from nanoflow.models.registry import build_graph

_READY = re.compile(r"\(weights and cache in ([\d.]+) s, kernels in ([\d.]+) s\b.*\) at (http://\S+)/v1")
_INDEX = "model.safetensors.index.json"
_PROMPT_TOKENS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint, start the server twice in each repeat, print and write the times."""
    args = parse_args(argv)
    with checkpoint(preset_name(args.model) or "", args.checkpoint) as folder:
        starts = [each for _ in range(args.repeats) for each in start_twice(folder, args.options)]
    for place, parts in enumerate(starts):
        label = "kernels in the cache" if place % 2 else "nothing compiled"
        print(f"{label}: " + ", ".join(f"{key} {value:.1f}" for key, value in parts.items()), flush=True)
    if args.json is not None:
        write_document(args.json, "startup", model=args.model, options=args.options, starts=starts)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = CommandParser(prog="python -m benchmarks.engine.startup", description=__doc__)
    parser.add_argument("--model", default="preset:llama-3-8b", help="an architecture preset")
    parser.add_argument("--repeats", type=int, default=1, help="pairs of starts")
    parser.add_argument("--checkpoint", type=Path, help="folder for the weights, which stay there for the next time")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="further options of nanoflow serve; after all others"
    )
    args = parser.parse_args(argv)
    if preset_name(args.model) is None or args.repeats < 1:
        parser.error("--model must be preset:NAME, --repeats at least 1")
    return args


@contextmanager
def checkpoint(name: str, kept: Path | None) -> Iterator[Path]:
    """A folder with weights, written unless they exist; a temporary folder, removed at the end, if none is given."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _INDEX).exists():
            write_checkpoint(name, folder)
        yield folder


def start_twice(folder: Path, options: Sequence[str]) -> list[dict[str, float]]:
    """Times of a start with an empty cache of kernels, and of one with the cache of the first."""
    with tempfile.TemporaryDirectory() as cache:
        return [start(folder, options, cache) for _ in range(2)]


def write_checkpoint(name: str, folder: Path) -> None:
    """Write random bfloat16 weights under the architecture's names: a file for each layer, and one for the rest."""
    graph = build_graph(preset_config(name), None)
    (folder / "config.json").write_text(json.dumps(PRESETS[name]), encoding="utf-8")
    groups = {"shared": [part for parameter in graph.parameters for part in parameter.parts]}
    for layer in range(graph.num_layers):
        parts = [part for parameter in graph.layers[layer].parameters for part in parameter.parts]
        groups[f"layer-{layer}"] = [dataclasses.replace(part, source=part.source.format(layer=layer)) for part in parts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    for group, parts in tqdm(groups.items(), desc="Writing weights", unit="file"):
        tensors = {
            part.source: torch.randn(part.shape, dtype=torch.bfloat16, device=device).mul_(0.02).cpu() for part in parts
        }
        save_file(tensors, folder / f"{group}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{group}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def start(folder: Path, options: Sequence[str], cache: str) -> dict[str, float]:
    """Start a server with this cache of kernels, request one token and stop the server; seconds of each step."""
    begin_s = time.monotonic()
    command = [sys.executable, "-m", "nanoflow", "serve", str(folder), "--port", "0", "--tokenizer", DEFAULT_MODEL]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        ready = next((match for match in map(_READY.search, server.stdout) if match), None)
        if ready is None:
            raise SystemExit(f"the server ended with status {server.wait()}")
        ready_s = time.monotonic() - begin_s
        first_token_s = ask(ready[3], str(folder))
        server.terminate()
    load_s, warm_up_s = float(ready[1]), float(ready[2])
    return {
        "weights and cache": load_s,
        "kernels and graphs": warm_up_s,
        "processes, imports and the rest": ready_s - load_s - warm_up_s,
        "ready": ready_s,
        "first token": first_token_s,
    }


def ask(url: str, model: str) -> float:
    """Seconds of a request for one token."""
    body: dict[str, Any] = {"model": model, "prompt": list(range(100, 100 + _PROMPT_TOKENS)), "max_tokens": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    begin_s = time.monotonic()
    with urllib.request.urlopen(request) as answer:
        json.load(answer)
    return time.monotonic() - begin_s


if __name__ == "__main__":
    sys.exit(main())
