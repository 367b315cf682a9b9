"""What was used between two times, by a counter that moves in ticks."""

from __future__ import annotations

import time

import pytest

from nanoflow.device.energy import EnergySampler, energy_of

TICK_S, BUSY_W, IDLE_W = 0.1, 700.0, 120.0


def sampled(ticks: list[tuple[float, float]]) -> EnergySampler:
    energy = EnergySampler(lambda: None)
    energy._ticks = ticks
    return energy


def used_by(time_s: float) -> float:
    """Idle until 1 s, busy until 2 s, idle again."""
    return IDLE_W * time_s + (BUSY_W - IDLE_W) * min(max(time_s - 1.0, 0.0), 1.0)


@pytest.mark.parametrize("offset_s", [0.0, 0.03, 0.05, 0.099])
def test_a_window_has_the_power_between_its_ticks(offset_s: float) -> None:
    times_s = [offset_s + TICK_S * place for place in range(30)]
    energy = sampled([(time_s, used_by(time_s)) for time_s in times_s])
    assert energy.used_j(1.0, 2.0) == pytest.approx(BUSY_W, rel=1e-6)
    assert energy.used_j(1.25, 1.75) == pytest.approx(BUSY_W / 2, rel=1e-6)
    assert energy.used_j(2.0, 2.5) == pytest.approx(IDLE_W / 2, rel=1e-6)


def test_a_window_with_few_ticks_lies_between_those_around_it() -> None:
    energy = sampled([(0.0, 0.0), (0.1, 70.0), (0.2, 140.0)])
    assert energy.used_j(0.02, 0.05) == pytest.approx(21.0)
    assert energy.used_j(0.05, 0.15) == pytest.approx(70.0)


def test_ticks_that_span_little_of_a_window_do_not_stand_for_it() -> None:
    """700 W for two ticks, then 100 W until a last one."""
    energy = sampled([(0.0, 0.0), (0.1, 70.0), (0.2, 140.0), (1.0, 220.0)])
    assert energy.used_j(0.05, 0.95) == pytest.approx(215 - 35)


def test_what_no_ticks_enclose_has_the_power_of_what_they_do() -> None:
    energy = sampled([(0.2, 0.0), (0.3, 70.0)])
    assert energy.used_j(0.0, 0.4) == pytest.approx(280.0)
    assert energy.used_j(0.25, 0.5) == pytest.approx(175.0)
    assert energy.used_j(0.4, 0.5) is None


@pytest.mark.timing
def test_ticks_are_seen_when_they_come() -> None:
    """100 W by the clock, in ticks of 50 ms."""
    with EnergySampler(lambda: 5.0 * (time.monotonic() // 0.05), interval_s=0.002) as energy:
        start_s = time.monotonic()
        time.sleep(0.33)
        stop_s = time.monotonic()
        assert energy.used_so_far_j() == pytest.approx(33, rel=0.05)
        assert 5 <= len(energy._ticks) <= 7
    assert energy.used_j(start_s, stop_s) == pytest.approx((stop_s - start_s) * 100, rel=0.05)


def test_a_counter_that_stands_still_tells_nothing() -> None:
    with EnergySampler(lambda: 3.0, interval_s=0.001) as energy:
        time.sleep(0.01)
    assert energy.used_j(0.0, 1.0) is None
    assert sampled([(1.0, 70.0)]).used_j(0.0, 2.0) is None


def test_of_a_cpu_nothing_is_known() -> None:
    with energy_of("cpu") as energy:
        pass
    assert energy.used_so_far_j() is None


def test_no_counter_means_no_energy_and_no_thread() -> None:
    with EnergySampler(lambda: None) as energy:
        assert not energy._thread.is_alive()
    assert energy.used_j(0.0, 1.0) is None
