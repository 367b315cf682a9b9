"""Checkpoints loaded to a GPU by several threads: the same weights as on a CPU, whatever the type and the sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

import nanoflow
from nanoflow.device.transfer import StagedCopier
from nanoflow.models import config_json as model_config
from nanoflow.models.registry import build_graph
from nanoflow.models.weights import load_weights

pytestmark = pytest.mark.gpu
DEFAULT_MODEL = Path(nanoflow.__file__).parent / "default_model"
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1000, 8 * 2**20 // 2, 8 * 2**20 + 3, 50 * 2**20])
def test_a_copy_has_every_element(size: int, stored: torch.dtype) -> None:
    source = torch.randn(size).to(stored)
    target = torch.full((size + 1,), 7.0, dtype=torch.bfloat16, device=GPU)
    torch.cuda.synchronize()
    copier = StagedCopier(GPU)
    copier.copy(target[:size], source)
    copier.wait()
    assert torch.equal(target[:size].cpu(), source.bfloat16())
    assert target[size].item() == 7.0


def test_a_checkpoint_is_the_same_as_on_a_cpu() -> None:
    graph = build_graph(model_config.load(DEFAULT_MODEL), None)
    on_gpu, on_cpu = (
        load_weights(graph, DEFAULT_MODEL, torch.bfloat16, device, show_progress=False, make_copier=make_copier)
        for device, make_copier in ((GPU, StagedCopier), (CPU, None))
    )
    for group, expected in zip((on_gpu.shared, *on_gpu.layers), (on_cpu.shared, *on_cpu.layers), strict=True):
        for name, tensor in group.items():
            assert torch.equal(tensor.cpu(), expected[name]), name


def test_an_error_of_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device has gone")

    monkeypatch.setattr(StagedCopier, "copy", fail)
    graph = build_graph(model_config.load(DEFAULT_MODEL), None)
    with pytest.raises(RuntimeError, match="the device has gone"):
        load_weights(graph, DEFAULT_MODEL, torch.bfloat16, GPU, show_progress=False, make_copier=StagedCopier)
