"""Host memory and disk for KV pages: sizes them by the options, and makes what copies to them and what decides.

`build.py` puts the parts together; the tiers' rules are in `scheduler/lower_tiers.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoflow.config import ConfigError, EngineConfig
from nanoflow.device.host_memory import free_host_bytes
from nanoflow.device.pinned import PinnedMemory
from nanoflow.executor.page_copies import STAGING_BYTES, CpuCopier, GpuCopier, PageCopier
from nanoflow.kernels.launch import LayerCache
from nanoflow.kvcache.disk import DiskError, DiskTier
from nanoflow.kvcache.host import HostPages
from nanoflow.kvcache.pools import PagePools
from nanoflow.scheduler.disk_copies import DiskCopies
from nanoflow.scheduler.lower_tiers import LowerTiers

logger = logging.getLogger(__name__)

_GIB = 2**30
# With a disk and no size given: pages go through host memory in any case.
_DEFAULT_HOST_GIB = 1.0
_LAYOUT = 1  # of a page in a slot; a change makes earlier pages on disk another store's


@dataclass(frozen=True, slots=True, kw_only=True)
class TierMemory:
    """Memory below the device.

    Attributes:
        pinned: Host memory of each KV group.
        page_bytes: Bytes of a page of each group.
        page_size: Tokens a page.
        disk: The files; None without.
        disk_bytes: Most bytes of these.
    """

    pinned: PinnedMemory
    page_bytes: tuple[int, ...]
    page_size: int
    disk: DiskTier | None
    disk_bytes: int

    def copier(self, caches: Sequence[LayerCache], *, num_rows: int) -> PageCopier:
        """What copies between the caches of all layers and this memory."""
        if caches[0].keys.is_cuda:
            return GpuCopier(caches, self.pinned, num_rows=num_rows)
        return CpuCopier(caches, self.pinned)

    def tiers(self, pools: PagePools) -> LowerTiers:
        """What decides which pages are kept here."""
        slots = self.pinned.arrays
        host = [HostPages(len(array), has_disk=self.disk is not None) for array in slots]
        disk = None
        if self.disk is not None:
            disk = DiskCopies(self.disk, slots, page_size=self.page_size, capacity_bytes=self.disk_bytes)
        return LowerTiers(
            pools,
            host,
            page_bytes=self.page_bytes,
            page_size=self.page_size,
            disk=disk,
            num_ready=lambda: self.pinned.num_ready,
        )

    def close(self) -> None:
        """Give back all that was not given to an engine."""
        if self.disk is not None:
            self.disk.close()
        self.pinned.close()


def staging_bytes(config: EngineConfig, page_bytes: Sequence[int]) -> int:
    """Bytes that copies take on the device."""
    return 4 * max(STAGING_BYTES, *page_bytes) if _host_gib(config) else 0


@contextlib.contextmanager
def opened_tiers(
    config: EngineConfig, page_bytes: Sequence[int], *, device: torch.device, fingerprint: str
) -> Iterator[TierMemory | None]:
    """The memory below the device that the options ask for; None if they ask for none.

    It is closed at the end of the block only if that fails.

    Args:
        config: The options.
        page_bytes: Bytes of a page of each KV group.
        device: Of the model.
        fingerprint: See `fingerprint_of`.

    Raises:
        ConfigError: Host memory has no room for so much, or so little would hold no page.
    """
    memory = _open_tiers(config, page_bytes, device, fingerprint)
    try:
        yield memory
    except BaseException:
        if memory is not None:
            memory.close()
        raise


def _open_tiers(
    config: EngineConfig, page_bytes: Sequence[int], device: torch.device, fingerprint: str
) -> TierMemory | None:
    host_gib = _host_gib(config)
    if not host_gib:
        return None
    num_bytes, free_bytes = int(host_gib * _GIB), free_host_bytes()
    num_slots = num_bytes // sum(page_bytes)
    if num_slots < 1:
        raise ConfigError(f"kv_host_gib is {host_gib:g}, a KV page alone takes {sum(page_bytes) / _GIB:.4f} GiB")
    if num_bytes > free_bytes:
        raise ConfigError(f"kv_host_gib is {host_gib:g}, the host has {free_bytes / _GIB:.1f} GiB free: lower it")
    try:
        pinned = PinnedMemory([(num_slots, size) for size in page_bytes], device)
    except MemoryError:
        raise ConfigError(f"the system does not let this process reserve {host_gib:g} GiB: lower kv_host_gib") from None
    disk_bytes = int(config.kv_disk_gib * _GIB)
    return TierMemory(
        pinned=pinned,
        page_bytes=tuple(page_bytes),
        page_size=config.page_size,
        disk=_open_disk(config.kv_dir, disk_bytes, page_bytes, fingerprint),
        disk_bytes=disk_bytes,
    )


def fingerprint_of(folder: Path | None, config: EngineConfig, *, name: str, device: str, dtype: str) -> str:
    """Text that two engines share only if the bytes of a KV page with the same tokens are the same in both.

    Args:
        folder: Of the model, or its GGUF file; None if its weights are drawn at random.
        config: Options.
        name: Of the model's architecture; it says whether products are in FP8.
        device, dtype: Kind of device, and type of activations.
    """
    parts = [f"layout {_LAYOUT}", name, device, dtype, f"page {config.page_size}", f"length {config.max_model_len}"]
    if config.kv_cache_dtype != "auto":
        parts.append(f"keys and values {config.kv_cache_dtype}")
    if config.quantization != "auto":
        parts.append(f"quantization {config.quantization}")
    if folder is None or config.load_format == "random":
        parts.append(f"random weights of {config.model}, seed {config.seed}")
    if folder is not None:
        is_file = folder.is_file()
        if not is_file:
            parts.append(hashlib.sha256((folder / "config.json").read_bytes()).hexdigest())
        for path in [folder] if is_file else sorted(folder.glob("*.safetensors")):
            stat = path.stat()
            parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return "; ".join(parts)


def _host_gib(config: EngineConfig) -> float:
    if config.kv_host_gib is not None:
        return config.kv_host_gib
    return _DEFAULT_HOST_GIB if config.kv_dir is not None else 0.0


def _open_disk(folder: str | None, num_bytes: int, page_bytes: Sequence[int], fingerprint: str) -> DiskTier | None:
    """The files below host memory. An engine serves without them where they cannot be used."""
    if folder is None:
        return None
    try:
        return DiskTier.open(Path(folder), capacity_bytes=num_bytes, fingerprint=fingerprint, page_bytes=page_bytes)
    except DiskError as error:
        logger.warning("KV pages are not kept on disk: %s", error)
        return None
