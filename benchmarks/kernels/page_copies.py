"""KV pages between a GPU and host memory, in the layout of Llama-3-8B: GB/s beside that of one long pinned copy.

A page of 16 tokens has 2 MiB: keys and values of 32 layers. `save` gathers pages and copies them to host memory, `load`
brings them back; `in a row` copies to neighbouring slots, `scattered` to slots all over the memory. Each point runs for
at least half a second. Rates are those of the device's time, from the first step of a copy to the last; beside them is
the time that a caller waits who asks for one copy after the other. From the root of the repository, on a GPU:

    python -m benchmarks.kernels.page_copies --json benchmarks/results/kernels_page_copies.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.device.pinned import PinnedMemory
from nanoflow.executor.page_copies import GpuCopier
from nanoflow.kernels.launch import LayerCache
from nanoflow.kvcache.copies import PageCopies

_LAYERS, _HEADS, _PAGE_SIZE, _HEAD_DIM = 32, 8, 16, 128
_PAGE_BYTES = _LAYERS * 2 * _HEADS * _PAGE_SIZE * _HEAD_DIM * 2
_NUM_PAGES, _NUM_SLOTS = 2048, 4096
_COUNTS = (1, 4, 16, 64, 256, 1024)
_WINDOW_S = 0.5
_RAW_BYTES = 512 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all points, print them, and write them if asked to."""
    parser = CommandParser(prog="python -m benchmarks.kernels.page_copies", description=__doc__)
    parser.add_argument("--json", help="file to write the result to")
    args = parser.parse_args(argv)
    device = torch.device("cuda")
    raw = {name: _raw_rate(device, is_load=name == "load") for name in ("save", "load")}
    for name, rate in raw.items():
        print(f"{name}: one pinned copy of {_RAW_BYTES >> 20} MiB {rate / 1e9:.1f} GB/s")
    rows = _measure(device, raw)
    if args.json:
        write_document(Path(args.json), "page_copies", page_bytes=_PAGE_BYTES, raw_bytes_per_s=raw, rows=rows)
    return 0


def _measure(device: torch.device, raw: dict[str, float]) -> list[dict[str, Any]]:
    shape = (_NUM_PAGES, _HEADS, _PAGE_SIZE, _HEAD_DIM)
    caches = tuple(
        LayerCache(
            keys=torch.randn(shape, device=device, dtype=torch.bfloat16),
            values=torch.randn(shape, device=device, dtype=torch.bfloat16),
        )
        for _ in range(_LAYERS)
    )
    start_s = time.monotonic()
    memory = PinnedMemory([(_NUM_SLOTS, _PAGE_BYTES)], device)
    while memory.num_ready[0] < _NUM_SLOTS:
        time.sleep(0.01)
    print(f"{_NUM_SLOTS * _PAGE_BYTES >> 30} GiB pinned in {time.monotonic() - start_s:.1f} s")
    copier = GpuCopier(caches, memory, num_rows=1)
    rng, rows = np.random.default_rng(0), []
    for count in _COUNTS:
        for placed in ("in a row", "scattered"):
            slots = np.arange(count) if placed == "in a row" else rng.permutation(_NUM_SLOTS)[:count]
            pages = rng.permutation(_NUM_PAGES)[:count].astype(np.int32)
            for name in ("save", "load"):
                copies = PageCopies(number=0, is_load=name == "load", pages=(pages,), slots=(slots.astype(np.int32),))
                called_s, copied_s = _seconds(partial(_copy, copier, copies))
                rate = count * _PAGE_BYTES / copied_s
                rows.append({"copy": name, "pages": count, "slots": placed, "bytes_per_s": rate, "call_s": called_s})
                print(
                    f"{name} {count:>5} pages {placed:>9}: {rate / 1e9:5.1f} GB/s, {rate / raw[name]:.3f} of one copy,"
                    f" {called_s * 1e3:.2f} ms a call"
                )
    copier.close()
    return rows


def _copy(copier: GpuCopier, copies: PageCopies) -> float:
    return copier.copy(copies)()


def _raw_rate(device: torch.device, *, is_load: bool) -> float:
    """Bytes a second of one long copy."""
    host = torch.empty(_RAW_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_RAW_BYTES, dtype=torch.uint8, device=device)

    def copy() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        (there if is_load else host).copy_(host if is_load else there, non_blocking=True)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return _RAW_BYTES / _seconds(copy)[1]


def _seconds(work: Callable[[], float]) -> tuple[float, float]:
    """Mean time of a call over at least `_WINDOW_S` seconds, after a few to warm up, and mean of what it returns."""
    for _ in range(3):
        work()
    found, start_s = [], time.perf_counter()
    while time.perf_counter() - start_s < _WINDOW_S:
        found.append(work())
    return (time.perf_counter() - start_s) / len(found), sum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())
