"""The disk tier of the KV cache by itself: bytes a second, CPU time a page, and what a start and a look-up take.

Pages are written all at once and read back all at once: from the file system ("cold", after its cache was told to let
go of them) and from the memory that the system keeps of files ("warm"). Times are of everything: queues, checksums,
copies. A second part opens a store with many pages and looks for every key.

    python -m benchmarks.engine.disk_tier --folder /a/folder/on/the/ssd --json disk_tier.json
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common.document import write_document
from nanoflow.cli.options import CommandParser
from nanoflow.kvcache.disk import DiskTier
from nanoflow.kvcache.segments import page_check

_NUM_ARRAYS = 64
_INDEXED_PAGE_BYTES = 10 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Writing or reading many pages.

    Attributes:
        what: What was done.
        page_bytes, num_pages: What with.
        wall_s, cpu_s: Time until all were done, and CPU time of all threads.
        asking_s: Of it, what the caller spent on asking.
    """

    what: str
    page_bytes: int
    num_pages: int
    wall_s: float
    cpu_s: float
    asking_s: float


def key_of(number: int) -> bytes:
    """The key of a page."""
    return hashlib.sha256(str(number).encode()).digest()


def rates(folder: Path, page_bytes: int, total_bytes: int) -> list[Rate]:
    """Write and read so many bytes in pages of a size."""
    keys = [key_of(number) for number in range(total_bytes // page_bytes)]
    arrays = np.random.default_rng(0).integers(0, 256, (_NUM_ARRAYS, page_bytes), dtype=np.uint8)
    tier = _open(folder, page_bytes, 2 * total_bytes)

    def measured(what: str, ask: Callable[[int], object], end: Callable[[], object] = lambda: None) -> Rate:
        begin_s, cpu_s = time.perf_counter(), time.process_time()
        futures = [ask(number) for number in range(len(keys))]
        asking_s = time.perf_counter() - begin_s
        if not all(future.result() for future in futures):  # type: ignore[attr-defined]
            raise SystemExit(f"a page was not stored or not found: {tier.counts}")
        end()
        wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - cpu_s
        return _shown(
            Rate(
                what=what,
                page_bytes=page_bytes,
                num_pages=len(keys),
                wall_s=wall_s,
                cpu_s=cpu_s,
                asking_s=asking_s,
            )
        )

    def read(number: int) -> object:
        return tier.read(0, keys[number], arrays[number % _NUM_ARRAYS])

    found = [measured("write", lambda number: tier.write(0, keys[number], arrays[number % _NUM_ARRAYS]))]
    os.sync()
    for path in tier.folder.glob("segment-*"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    found += [measured("read, cold", read), measured("read, warm", read)]
    tier.close()
    return found


def look_ups(folder: Path, num_pages: int) -> dict[str, float]:
    """What it takes to open a store with so many pages, and to look for keys in it."""
    keys = [key_of(number) for number in range(num_pages)]
    page = np.zeros(_INDEXED_PAGE_BYTES, dtype=np.uint8)
    capacity_bytes = 4 * num_pages * _INDEXED_PAGE_BYTES
    tier = _open(folder, _INDEXED_PAGE_BYTES, capacity_bytes)
    futures = [tier.write(0, key, page) for key in keys]
    if not all(future.result() for future in futures):
        raise SystemExit("a page was not stored")
    tier.close()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    tier = _open(folder, _INDEXED_PAGE_BYTES, capacity_bytes)
    found = {"open_s": time.perf_counter() - begin_s, "open_cpu_s": time.process_time() - cpu_s}
    found["open_kib"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
    cpu_s = time.process_time()
    num_found = sum([tier.contains(0, key) for key in keys])
    found["contains_cpu_s"] = (time.process_time() - cpu_s) / num_pages
    cpu_s = time.process_time()
    if num_found + tier.find(0, keys) != 2 * num_pages:
        raise SystemExit("pages are missing")
    found["find_cpu_s"] = (time.process_time() - cpu_s) / num_pages
    tier.close()
    print(f"{num_pages:,} pages: opened in {found['open_s']:.2f} s ({found['open_cpu_s']:.2f} s of CPU time)")
    print(f"contains: {1e9 * found['contains_cpu_s']:.0f} ns, find: {1e9 * found['find_cpu_s']:.0f} ns a key")
    return found


def checksum_rates() -> dict[str, float]:
    """Bytes a second of the checksum in one thread, by size of a page."""
    found = {}
    for page_bytes in (32 << 10, 2 << 20):
        page, key, count = np.zeros(page_bytes, dtype=np.uint8), key_of(0), (256 << 20) // page_bytes
        begin_s = time.perf_counter()
        for _ in range(count):
            page_check(0, key, page)
        found[str(page_bytes)] = count * page_bytes / (time.perf_counter() - begin_s)
        print(f"checksum of {page_bytes >> 10:,} KiB: {found[str(page_bytes)] / 1e9:.2f} GB/s")
    return found


def _open(folder: Path, page_bytes: int, capacity_bytes: int) -> DiskTier:
    return DiskTier.open(
        folder,
        capacity_bytes=capacity_bytes,
        fingerprint=f"benchmark {page_bytes}",
        page_bytes=[page_bytes],
        queue_bytes=capacity_bytes,
    )


def _shown(rate: Rate) -> Rate:
    bytes_per_s = rate.num_pages * rate.page_bytes / rate.wall_s
    times = (
        f"{1e6 * rate.cpu_s / rate.num_pages:6.0f} us of CPU time a page, {1e6 * rate.asking_s / rate.num_pages:4.0f}"
    )
    print(f"{rate.what:10} {rate.page_bytes >> 10:5,} KiB: {bytes_per_s / 1e9:6.2f} GB/s, {times} us to ask")
    return rate


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = CommandParser(prog="python -m benchmarks.engine.disk_tier", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where files are made (a folder for temporary files)")
    parser.add_argument("--gib", type=float, default=2.0, help="GiB to write in pages of each size (2)")
    parser.add_argument("--pages", type=int, default=100_000, help="pages of the store that is opened (100000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here")
    arguments = parser.parse_args(argv)
    total_bytes = int(arguments.gib * 2**30)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        checksums = checksum_rates()
        found = [rate for size in (2 << 20, 32 << 10) for rate in rates(Path(folder) / str(size), size, total_bytes)]
        looking = look_ups(Path(folder) / "look-ups", arguments.pages)
    if arguments.json:
        write_document(
            arguments.json,
            "disk_tier",
            options={"gib": arguments.gib, "pages": arguments.pages},
            checksum_bytes_per_s=checksums,
            rates=[asdict(rate) for rate in found],
            **looking,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
