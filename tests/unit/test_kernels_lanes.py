"""`benchmarks/kernels/lanes.py`: every kind of work can be made and runs; on no GPU."""

from __future__ import annotations

import pytest
import torch
from benchmarks.kernels import lanes
from benchmarks.kernels.lanes import FIRST, SECOND, Case

from tests.unit.test_profiler import SITE


@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_every_kind_of_work_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_MIN_WEIGHT_BYTES", 1)
    monkeypatch.setattr(lanes, "_COPY_BYTES", 64)
    side = {**FIRST, **SECOND}[name](SITE, Case(num_tokens=16, num_requests=3, num_keys=20))
    assert side.num_calls >= 1
    with torch.inference_mode():
        side.work_on(None)()


def test_without_a_card_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        lanes.main([])
    assert "needs a Hopper card or a later one" in capsys.readouterr().err
