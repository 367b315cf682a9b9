"""Which card the driver's management library is asked about; on stand-ins for the library and for torch's devices."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from nanoflow.device import nvml
from nanoflow.device.energy import energy_of, gpu_clock_mhz, gpu_energy_j, gpu_power_limit_w


class NVMLError(Exception):
    """Of the library."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card and what is counted of it, in the library's units; `is_divided` is None where it never can be."""

    uuid: str
    energy_mj: int
    clock_mhz: int = 1980
    limit_mw: int = 700_000
    is_divided: bool | None = False


class Library:
    """The names of the library that are used. It knows cards by UUID alone: an index would name another one."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_DEVICE_MIG_ENABLE = 1, 1

    def __init__(self, cards: list[Card]) -> None:
        self._cards = {f"GPU-{card.uuid}": card for card in cards}

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        if uuid not in self._cards:
            raise NVMLError("not found")
        return self._cards[uuid]

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if card.is_divided is None:
            raise NVMLError("not supported")
        return [int(card.is_divided), 0]

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        return card.energy_mj

    def nvmlDeviceGetClockInfo(self, card: Card, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        return card.clock_mhz

    def nvmlDeviceGetEnforcedPowerLimit(self, card: Card) -> int:
        return card.limit_mw


CARDS = [
    Card(uuid="aa", energy_mj=1_000),
    Card(uuid="bb", energy_mj=2_500, clock_mhz=1410, limit_mw=350_000),
    Card(uuid="cc", energy_mj=4_000, is_divided=None),
    Card(uuid="dd", energy_mj=8_000, is_divided=True),
]


def see(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """Have torch see these devices, in this order; the second is the current one."""

    def properties(device: torch.device | str) -> SimpleNamespace:
        index = torch.device(device).index
        return SimpleNamespace(uuid=uuids[1 if index is None else index])

    monkeypatch.setattr(nvml, "_nvml", lambda: Library(CARDS))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


@pytest.mark.parametrize(
    ("visible", "energies_j"),
    [
        (("aa", "bb", "cc"), (1.0, 2.5, 4.0)),
        (("bb", "cc"), (2.5, 4.0)),  # CUDA_VISIBLE_DEVICES=1,2, or the UUIDs of these
        (("cc", "aa"), (4.0, 1.0)),  # CUDA_VISIBLE_DEVICES=2,0, or CUDA_DEVICE_ORDER=FASTEST_FIRST
    ],
)
def test_the_card_that_torch_means_is_asked(
    visible: tuple[str, ...], energies_j: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, *visible)
    assert tuple(gpu_energy_j(f"cuda:{index}") for index in range(len(visible))) == energies_j
    assert gpu_energy_j(torch.device("cuda", 1)) == energies_j[1]
    assert gpu_energy_j("cuda") == energies_j[1], "the current one"


def test_the_current_card_is_that_of_the_thread_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thread that watches it is the first."""
    see(monkeypatch, "aa", "bb", "cc")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert energy_of("cuda")._read_j() == 4.0


def test_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library counts millijoules and milliwatts."""
    see(monkeypatch, "aa", "bb")
    assert (gpu_energy_j("cuda:1"), gpu_power_limit_w("cuda:1"), gpu_clock_mhz("cuda:1")) == (2.5, 350.0, 1410.0)


@pytest.mark.parametrize("uuid", ["dd", "part of dd"], ids=["that of its card", "its own"])
def test_of_a_part_of_a_card_nothing_is_known(uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card in parts (MIG) counts what all of them use; which UUID torch says depends on its version."""
    see(monkeypatch, uuid)
    assert (gpu_energy_j("cuda:0"), gpu_power_limit_w("cuda:0"), gpu_clock_mhz("cuda:0")) == (None, None, None)


def test_a_cpu_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch)
    with energy_of("cpu") as energy:
        assert energy.used_so_far_j() is None
    assert gpu_power_limit_w("cpu") is None


def test_without_the_library_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "aa")
    monkeypatch.setattr(nvml, "_nvml", lambda: None)
    assert gpu_energy_j("cuda:0") is None
