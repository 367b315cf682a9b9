"""Mechanisms as data: whoever acts on their descriptions knows every value, and files and options have every name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from nanoflow.cli.profile import ProfileConfig
from nanoflow.executor import lanes
from nanoflow.kernels.reference import REFERENCE_KERNELS
from nanoflow.plan.mechanisms import KernelNeed, Measured, Mechanism, Opening, ShareOrigin
from nanoflow.plan.plan import Lane
from nanoflow.profile.table import Profile
from nanoflow.profiler import pairs
from nanoflow.profiler.pairs import PairTask
from nanoflow.profiler.work import Task
from nanoflow.search.carry import carry_plan
from nanoflow.search.shapes import least_predicted_gain, mechanisms_of
from tests.unit.test_simulate import GRAPH

SRC = Path(__file__).parents[2] / "src" / "nanoflow"
RESULTS = SRC.parents[1] / "benchmarks" / "results"


def test_each_mechanism_has_a_description_of_its_own() -> None:
    assert len({mechanism.traits for mechanism in Mechanism}) == len(Mechanism)
    assert Lane(name="any").mechanism.traits.opening is Opening.CURRENT_STREAM


def test_what_is_measured_has_a_margin_and_can_be_asked_for_by_name() -> None:
    measured = {mechanism for mechanism in Mechanism if mechanism.traits.measured is not Measured.NOTHING}
    options = {name for each in get_args(get_type_hints(ProfileConfig)["only"]) for name in get_args(each)}
    assert options == {"alone", "pairs", *measured}
    assert all((mechanism.traits.margin > 0) == (mechanism in measured) for mechanism in Mechanism)


def test_shares_that_are_kept_can_be_asked_for() -> None:
    """Else there would be no lane to measure an operation on alone."""
    for mechanism in Mechanism:
        if mechanism.traits.keeps_share:
            assert mechanism.traits.share_origin is ShareOrigin.ASKED_FOR
            assert mechanism.traits.opening is Opening.OWN_SMS


def test_a_lane_has_the_kernels_that_its_mechanism_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(lanes, "kernels_on", lambda kernels, num_sms: ("for SMs", kernels, num_sms))
    monkeypatch.setattr(lanes, "kernels_beside", lambda kernels, num_sms: ("small", kernels, num_sms))
    monkeypatch.setattr(lanes, "_with_carveout", lambda _device, kernels: ("with carve-out", *kernels))
    found = {need: lanes.lane_kernels(need, device, REFERENCE_KERNELS, 68) for need in list(KernelNeed)[:3]}
    assert found == {
        KernelNeed.ANY: REFERENCE_KERNELS,
        KernelNeed.FOR_SMS: ("for SMs", REFERENCE_KERNELS, 68),
        KernelNeed.SMALL: ("with carve-out", "small", REFERENCE_KERNELS, 68),
    }


@pytest.mark.parametrize(
    ("mechanism", "share"), [(Mechanism.PARTITION, 0.88), (Mechanism.BESIDE, 0.5), (Mechanism.STREAM, 0.31)]
)
def test_the_share_of_a_pair_is_what_its_origin_says(mechanism: Mechanism, share: float) -> None:
    """Of a lane on 88 % of the SMs whose operation kept 31 % of its speed."""
    task = Task(operation="o_proj", num_tokens=512)
    assert pairs._share(PairTask(first=task, second=task, mechanism=mechanism), 0.309, 0.88) == share


def test_a_margin_is_that_of_the_mechanism() -> None:
    plan = carry_plan(GRAPH, 512, 256, 0.8)
    assert mechanisms_of(plan) == {Mechanism.INSIDE}
    assert least_predicted_gain(plan) == 1.0 + Mechanism.INSIDE.traits.margin < 1.0 + Mechanism.BESIDE.traits.margin


def test_stored_profiles_have_what_their_mechanisms_are_measured_by() -> None:
    profile = Profile.load(RESULTS / "profile_llama-3-8b_h200.json")
    assert {pair.mechanism for pair in profile.pairs} == set(Mechanism) - {Mechanism.WHOLE}
    assert {point.mechanism for point in profile.points if not point.is_on_whole_device} == {
        mechanism for mechanism in Mechanism if mechanism.traits.keeps_share
    }
    shares = {mechanism: {p.share for p in profile.pairs if p.mechanism is mechanism} for mechanism in Mechanism}
    for mechanism, found in shares.items():
        if mechanism.traits.share_origin is ShareOrigin.HALF:
            assert found == {0.5}


@pytest.mark.parametrize("folder", ["search", "simulate", "trials", "executor", "profile", "profiler"])
def test_the_word_is_not_spread(folder: str) -> None:
    """One is named only where its streams are made, its plans built, or its pairs written; all else reads traits."""
    named = {
        f"{folder}/{path.name}"
        for path in (SRC / folder).glob("*.py")
        for mechanism in Mechanism
        if mechanism is not Mechanism.WHOLE and f"Mechanism.{mechanism.name}" in path.read_text(encoding="utf-8")
    }
    assert named <= {"executor/streams.py", "search/carry.py", "profiler/carry.py", "profile/estimate.py"}
