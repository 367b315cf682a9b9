"""GPUs as data: the rates of each, with the source of every number, and how users write them (`NAME` or `NAMExN`).

Rates are those of dense 16-bit products; in FP8 a GPU that can is faster by a factor. `cost/` computes what a model
costs on them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

_DATASHEET = "datasheet"
_PAPER = "NanoFlow paper, table 1"
_ONE_WAY = f"{_PAPER}, one of its two directions (as in table 2)"
_MEASURED = "measured, one H200"


class HardwareError(ValueError):
    """Unknown GPU; the message is one line with the nearest known name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number and its source."""

    value: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRates:
    """Rates of one or several GPUs: FLOP/s, bytes/s of memory, bytes/s sent to other GPUs (one direction).

    `fp8_speedup` is by how much products in FP8 are faster.
    """

    compute_flops_per_s: float
    memory_bytes_per_s: float
    network_bytes_per_s: float
    fp8_speedup: float = 1.0

    def compute_s(self, flops: float, fp8_flops: float = 0.0) -> float:
        """Time of so many FLOPs, some of which are in FP8."""
        return (flops - fp8_flops + fp8_flops / self.fp8_speedup) / self.compute_flops_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One kind of GPU.

    Attributes:
        title: Its full name.
        memory_bytes: Device memory.
        compute_flops_per_s, memory_bytes_per_s: Peak rates.
        network_bytes_per_s: Peak rate to other GPUs of the host, one direction.
        host_link_bytes_per_s: Rate of copies between the GPU and pinned memory of the host, one direction.
        power_limit_w: Power limit of the card.
        num_sms: Number of streaming multiprocessors.
        sustained_compute_flops_per_s, sustained_memory_bytes_per_s: What GEMMs and copies reach once power and clocks
            have settled; None if not measured.
        static_power_w: Power drawn whatever runs; None if not measured, and then `flop_j` and `byte_j` include it.
        flop_j, byte_j: Energy of one FLOP of a product in 16 bits, and of one byte from or to device memory; None if
            unknown.
        fp8_speedup: Peak rate of products in FP8 over that in 16 bits; None if it has none. No sustained rate of them
            was measured: the same factor is assumed.
    """

    title: str
    memory_bytes: Figure
    compute_flops_per_s: Figure
    memory_bytes_per_s: Figure
    network_bytes_per_s: Figure
    host_link_bytes_per_s: Figure
    power_limit_w: Figure
    num_sms: Figure
    sustained_compute_flops_per_s: Figure | None = None
    sustained_memory_bytes_per_s: Figure | None = None
    static_power_w: Figure | None = None
    flop_j: Figure | None = None
    byte_j: Figure | None = None
    fp8_speedup: Figure | None = None

    @property
    def has_sustained(self) -> bool:
        """True if any sustained rate is known."""
        return self.sustained_compute_flops_per_s is not None or self.sustained_memory_bytes_per_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuGroup:
    """Equal GPUs of one host that share a model by tensor parallelism."""

    name: str
    spec: GpuSpec
    num_gpus: int = 1

    @property
    def memory_bytes(self) -> float:
        """Device memory of all GPUs together."""
        return self.spec.memory_bytes.value * self.num_gpus

    def peak_rates(self) -> ResourceRates:
        """Rates of all GPUs together by the datasheet."""
        return self._rates(self.spec.compute_flops_per_s, self.spec.memory_bytes_per_s)

    def sustained_rates(self) -> ResourceRates:
        """Sustained rates of all GPUs together; the peak rate where none was measured."""
        return self._rates(
            self.spec.sustained_compute_flops_per_s or self.spec.compute_flops_per_s,
            self.spec.sustained_memory_bytes_per_s or self.spec.memory_bytes_per_s,
        )

    def _rates(self, compute: Figure, memory: Figure) -> ResourceRates:
        return ResourceRates(
            compute_flops_per_s=compute.value * self.num_gpus,
            memory_bytes_per_s=memory.value * self.num_gpus,
            network_bytes_per_s=self.spec.network_bytes_per_s.value * self.num_gpus,
            fp8_speedup=1.0 if self.spec.fp8_speedup is None else self.spec.fp8_speedup.value,
        )

    def require_fp8(self) -> None:
        """Raise HardwareError unless the GPUs multiply in FP8."""
        if self.spec.fp8_speedup is None:
            raise HardwareError(f"{self.spec.title} has no products in FP8: use quantization none, or another GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """The device that a model runs on.

    Attributes:
        name: Name shown to users.
        is_gpu: False for a CPU.
        memory_bytes, free_bytes: Its memory, and how much of it can be allocated now.
        flops_per_s: Rough sustained rate of matrix products.
    """

    name: str
    is_gpu: bool
    memory_bytes: int
    free_bytes: int
    flops_per_s: float


def _card(
    title: str,
    *,
    gb: float,
    tflops: float,
    gb_per_s: float,
    link: tuple[float, str],
    host: Figure,
    watts: float,
    sms: int,
) -> GpuSpec:
    """A card of which only the datasheet is known.

    Args:
        title: Its full name.
        gb, tflops, gb_per_s, watts, sms: Figures of the datasheet; TFLOP/s are dense, 16-bit, summed in 32 bits.
        link: GB/s to other GPUs in one direction, and the name of the link.
        host: Bytes/s that copies from and to the host reach.
    """
    return GpuSpec(
        title=title,
        memory_bytes=Figure(value=gb * 1e9, source=_DATASHEET),
        compute_flops_per_s=Figure(value=tflops * 1e12, source=_DATASHEET),
        memory_bytes_per_s=Figure(value=gb_per_s * 1e9, source=_DATASHEET),
        network_bytes_per_s=Figure(value=link[0] * 1e9, source=f"{_DATASHEET}, one direction of {link[1]}"),
        host_link_bytes_per_s=host,
        power_limit_w=Figure(value=watts, source=_DATASHEET),
        num_sms=Figure(value=sms, source=_DATASHEET),
    )


_PCIE_3, _PCIE_4, _PCIE_5 = (16.0, "PCIe 3 x16"), (32.0, "PCIe 4 x16"), (64.0, "PCIe 5 x16")
_HOST_3, _HOST_4, _HOST_5, _HOST_C2C = (
    Figure(value=rate, source=f"estimate of copies from and to pinned memory over {link}")
    for rate, link in ((11e9, "PCIe 3 x16"), (22e9, "PCIe 4 x16"), (50e9, "PCIe 5 x16"), (300e9, "NVLink-C2C"))
)
_BRIDGE = (300.0, "an NVLink bridge between two")
_NVLINK_3, _NVLINK_4, _NVLINK_5 = (300.0, "NVLink 3"), (450.0, "NVLink 4"), (900.0, "NVLink 5")

_GPUS: Mapping[str, GpuSpec] = {
    "a100-80": GpuSpec(
        title="NVIDIA A100 80 GB SXM",
        memory_bytes=Figure(value=80e9, source=_DATASHEET),
        compute_flops_per_s=Figure(value=312e12, source=_DATASHEET),
        memory_bytes_per_s=Figure(value=2.0e12, source=f"{_PAPER} (the datasheet says 2.039e12)"),
        network_bytes_per_s=Figure(value=300e9, source=_ONE_WAY),
        host_link_bytes_per_s=_HOST_4,
        power_limit_w=Figure(value=400.0, source=_DATASHEET),
        num_sms=Figure(value=108, source=_DATASHEET),
        # The paper says 280e12, but its printed optima follow from 260e12.
        sustained_compute_flops_per_s=Figure(value=260e12, source="what the optima of the paper's figures 7, 11 fit"),
    ),
    "h100": GpuSpec(
        title="NVIDIA H100 80 GB SXM",
        memory_bytes=Figure(value=80e9, source=_DATASHEET),
        compute_flops_per_s=Figure(value=989e12, source=_DATASHEET),
        memory_bytes_per_s=Figure(value=3.352e12, source=_PAPER),
        network_bytes_per_s=Figure(value=450e9, source=_ONE_WAY),
        host_link_bytes_per_s=_HOST_5,
        power_limit_w=Figure(value=700.0, source=_DATASHEET),
        num_sms=Figure(value=132, source=_DATASHEET),
    ),
    "h200": GpuSpec(
        title="NVIDIA H200 SXM",
        memory_bytes=Figure(value=141e9, source=_DATASHEET),
        compute_flops_per_s=Figure(value=989e12, source=_DATASHEET),
        memory_bytes_per_s=Figure(value=4.8e12, source=_DATASHEET),
        network_bytes_per_s=Figure(value=450e9, source=_ONE_WAY),
        host_link_bytes_per_s=_HOST_5,
        power_limit_w=Figure(value=700.0, source=_DATASHEET),
        num_sms=Figure(value=132, source=_DATASHEET),
        sustained_compute_flops_per_s=Figure(
            value=673e12, source=f"{_MEASURED}: GEMMs of Llama-3-8B on 8,192 tokens (648e12 on 1,024)"
        ),
        sustained_memory_bytes_per_s=Figure(
            value=4.45e12, source=f"{_MEASURED}: decode attention, 768 to 2,112 keys each (4.41 to 4.52e12)"
        ),
        # We solve two equations for the two energies. At the limit of 700 W, the four GEMMs of a Llama-3-8B layer on
        # 1,024 tokens (447 GFLOP, 0.58 GB), repeated, took 480 mJ. Its decode attention to 340 x 1,280 tokens (7.1
        # GFLOP, 1.79 GB) took 405 us, so 283 mJ. (A slower kernel took 417 us and by the counter 303 mJ, more than the
        # limit allows.) Both energies include static power, which was not measured on its own.
        flop_j=Figure(value=0.874e-12, source=f"{_MEASURED}: 480 mJ for 447 GFLOP less what their bytes take"),
        byte_j=Figure(value=155e-12, source=f"{_MEASURED}: 283 mJ for 1.79 GB less what their FLOPs take"),
    ),
    "b200": GpuSpec(
        title="NVIDIA B200",
        memory_bytes=Figure(value=192e9, source=_PAPER),
        compute_flops_per_s=Figure(value=2250e12, source=_DATASHEET),
        memory_bytes_per_s=Figure(value=8.0e12, source=_DATASHEET),
        network_bytes_per_s=Figure(value=900e9, source=_ONE_WAY),
        host_link_bytes_per_s=_HOST_5,
        power_limit_w=Figure(value=1000.0, source=_DATASHEET),
        num_sms=Figure(value=148, source=_DATASHEET),
    ),
    "ada6000": GpuSpec(
        title="NVIDIA RTX 6000 Ada",
        memory_bytes=Figure(value=48e9, source=_DATASHEET),
        compute_flops_per_s=Figure(value=182e12, source=_PAPER),
        memory_bytes_per_s=Figure(value=0.96e12, source=_DATASHEET),
        network_bytes_per_s=Figure(value=32e9, source=_ONE_WAY),
        host_link_bytes_per_s=_HOST_4,
        power_limit_w=Figure(value=300.0, source=_DATASHEET),
        num_sms=Figure(value=142, source=_DATASHEET),
    ),
    "a100-40": _card(
        "NVIDIA A100 40 GB SXM", gb=40, tflops=312, gb_per_s=1555, link=_NVLINK_3, host=_HOST_4, watts=400, sms=108
    ),
    "a100-pcie-40": _card(
        "NVIDIA A100 40 GB PCIe", gb=40, tflops=312, gb_per_s=1555, link=_PCIE_4, host=_HOST_4, watts=250, sms=108
    ),
    "a100-pcie-80": _card(
        "NVIDIA A100 80 GB PCIe", gb=80, tflops=312, gb_per_s=1935, link=_PCIE_4, host=_HOST_4, watts=300, sms=108
    ),
    "h100-pcie": _card(
        "NVIDIA H100 80 GB PCIe", gb=80, tflops=756, gb_per_s=2000, link=_PCIE_5, host=_HOST_5, watts=350, sms=114
    ),
    "h100-nvl": _card(
        "NVIDIA H100 NVL", gb=94, tflops=835, gb_per_s=3900, link=_BRIDGE, host=_HOST_5, watts=400, sms=132
    ),
    "h20": _card("NVIDIA H20", gb=96, tflops=148, gb_per_s=4000, link=_NVLINK_4, host=_HOST_5, watts=400, sms=78),
    "gb200": _card(
        "NVIDIA GB200 (one of its GPUs)",
        gb=186,
        tflops=2500,
        gb_per_s=8000,
        link=_NVLINK_5,
        host=_HOST_C2C,
        watts=1200,
        sms=148,
    ),
    "l40s": _card("NVIDIA L40S", gb=48, tflops=362, gb_per_s=864, link=_PCIE_4, host=_HOST_4, watts=350, sms=142),
    "l4": _card("NVIDIA L4", gb=24, tflops=121, gb_per_s=300, link=_PCIE_4, host=_HOST_4, watts=72, sms=58),
    "a10": _card("NVIDIA A10", gb=24, tflops=125, gb_per_s=600, link=_PCIE_4, host=_HOST_4, watts=150, sms=72),
    "t4": _card("NVIDIA T4", gb=16, tflops=65, gb_per_s=320, link=_PCIE_3, host=_HOST_3, watts=70, sms=40),
    "rtx3090": _card(
        "NVIDIA GeForce RTX 3090", gb=24, tflops=71, gb_per_s=936, link=_PCIE_4, host=_HOST_4, watts=350, sms=82
    ),
    "rtx4090": _card(
        "NVIDIA GeForce RTX 4090", gb=24, tflops=165.2, gb_per_s=1008, link=_PCIE_4, host=_HOST_4, watts=450, sms=128
    ),
    "rtx5090": _card(
        "NVIDIA GeForce RTX 5090", gb=32, tflops=209.5, gb_per_s=1792, link=_PCIE_5, host=_HOST_5, watts=575, sms=170
    ),
}
_WITHOUT_FP8 = ("a100-80", "a100-40", "a100-pcie-40", "a100-pcie-80", "a10", "t4", "rtx3090")
_FP8_SPEEDUP = Figure(value=2.0, source=f"{_DATASHEET}: peak rate in FP8 over that in 16 bits")
GPUS: Mapping[str, GpuSpec] = {
    name: spec if name in _WITHOUT_FP8 else replace(spec, fp8_speedup=_FP8_SPEEDUP) for name, spec in _GPUS.items()
}


def parse_gpus(text: str) -> GpuGroup:
    """The GPUs that a text names: NAME is one, NAMExN are N.

    Raises:
        HardwareError: The GPU is unknown (the message names the nearest), or N is 0.
    """
    written = text.strip().lower()
    # A name may contain an x and end in digits, as rtx4090 does: the whole text is looked up first.
    split = re.fullmatch(r"(.+)x(\d+)", written, flags=re.DOTALL)
    whole = _by_name(written)
    name, num_gpus = (whole, 1) if whole or split is None else (_by_name(split[1]), int(split[2]))
    if name is None:
        raise HardwareError(_unknown(written, split[1] if split else written))
    if num_gpus == 0:
        raise HardwareError(f"GPUs must be NAME or NAMExN with N from 1 (as h200 or a100-80x8), got {text!r}")
    return GpuGroup(name=f"{name}x{num_gpus}" if num_gpus > 1 else name, spec=GPUS[name], num_gpus=num_gpus)


def _by_name(written: str) -> str | None:
    """The known GPU of a name, ignoring its maker, blanks, "-" and "_"; None if unknown."""
    return {_plain(name): name for name in GPUS}.get(_plain(written))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).removeprefix("nvidia").removeprefix("geforce")


def _unknown(written: str, without_count: str) -> str:
    """One-line error for an unknown GPU: a suggestion, and all known names."""
    turned = re.fullmatch(r"(\d+)\s*x\s*(.+)", written, flags=re.DOTALL)
    if turned is not None and _by_name(turned[2]):
        return f"GPUs are written NAMExN, got {written!r}; did you mean '{_by_name(turned[2])}x{turned[1]}'?"
    name, nearest = max(((name, _nearest(name)) for name in (without_count, written)), key=lambda pair: pair[1][1])
    begun = [known for known in GPUS if without_count and known.startswith(without_count)]
    found = begun[0] if begun and name == without_count else nearest[0] if nearest[1] >= _LIKELY else None
    hint = f"did you mean {found!r}? " if found else ""
    return f"unknown GPU {name!r}; {hint}known: {', '.join(GPUS)}"


# Similarity (0 to 1) from which on a known name is suggested.
_LIKELY = 0.5


def _nearest(name: str) -> tuple[str, float]:
    """The most similar known name, and its similarity from 0 to 1."""
    likeness = {known: difflib.SequenceMatcher(None, _plain(name), _plain(known)).ratio() for known in GPUS}
    best = max(likeness, key=lambda known: likeness[known])
    return best, likeness[best]
