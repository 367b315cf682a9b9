"""The rate of copies between a GPU and pinned memory of the host, where KV pages can be kept."""

from __future__ import annotations

import torch

from nanoflow.profiler.sustained import Span, sustained

# As large as what a batch saves: a copy of little takes as long as one of more.
_COPY_BYTES = 64 << 20


@torch.inference_mode()
def host_link_bytes_per_s(device: torch.device, span: Span | None = None) -> float | None:
    """Bytes/s of the slower direction; None on a CPU, which copies nothing over a link."""
    if device.type != "cuda":
        return None
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    rates = []
    for into, of in ((here, there), (there, here)):

        def work(into: torch.Tensor = into, of: torch.Tensor = of) -> None:
            into.copy_(of, non_blocking=True)

        rates.append(_COPY_BYTES / sustained(work, device, span).time_s)
    return min(rates)
