"""Plans: what is wrong with one is said with its name, and JSON gives back what was written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.graph.graph import OpGraph
from nanoflow.graph.nanobatch import Access, TokenRange, depends, split
from nanoflow.graph.operation import BatchShape
from nanoflow.models.config_json import parse
from nanoflow.models.registry import build_graph
from nanoflow.plan.book import PlanBook, PlanEntry
from nanoflow.plan.plan import Lane, NanoOperation, PipelinePlan, PlanError
from nanoflow.plan.sequential import nanobatch_plan, sequential_plan
from tests.graphs import graphs, valid_plans

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def _graph() -> OpGraph:
    return build_graph(parse(LLAMA), None)


def _replace_nano(plan: PipelinePlan, name: str, **changes: object) -> PipelinePlan:
    place = next(i for i, nano in enumerate(plan.nano_operations) if nano.operation == name)
    nanos = list(plan.nano_operations)
    nanos[place] = dataclasses.replace(nanos[place], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(plan, nano_operations=tuple(nanos))


def _with_nanos(plan: PipelinePlan, change: Callable[[list[NanoOperation]], object]) -> PipelinePlan:
    nanos = list(plan.nano_operations)
    change(nanos)
    return dataclasses.replace(plan, nano_operations=tuple(nanos))


def _swap(first: str, second: str) -> Callable[[list[NanoOperation]], None]:
    def swap(nanos: list[NanoOperation]) -> None:
        i, j = (next(k for k, nano in enumerate(nanos) if nano.operation == name) for name in (first, second))
        nanos[i], nanos[j] = nanos[j], nanos[i]

    return swap


_PLAN = nanobatch_plan(_graph(), 64, [32])
_TWO_LANES = (Lane(name="whole", share=0.7), Lane(name="other", share=0.7))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            _replace_nano(_PLAN, "o_proj", operation="p_proj"),
            "p_proj[0:32]: LlamaForCausalLM 0.1M has no operation 'p_proj'",
        ),
        (_replace_nano(_PLAN, "o_proj", lane="fast"), "o_proj[0:32]: there is no lane 'fast'"),
        (_replace_nano(_PLAN, "o_proj", stop=40), "operation 'o_proj': token 32 is computed twice"),
        (_replace_nano(_PLAN, "o_proj", stop=30), "operation 'o_proj': token 30 is left out"),
        (_replace_nano(_PLAN, "o_proj", stop=65), "o_proj[0:65]: its token range is not inside 0:64"),
        (_replace_nano(_PLAN, "o_proj", stop=0), "o_proj[0:0]: its token range is not inside 0:64 or is empty"),
        (_replace_nano(_PLAN, "o_proj", stage=-1), "its stage is negative"),
        (_replace_nano(_PLAN, "attn_norm", waits=(0,)), "attn_norm[0:32]: it can wait only for other nano-operations"),
        (_with_nanos(_PLAN, lambda nanos: nanos.pop()), "operation 'down_proj': token 32 is left out"),
        (_with_nanos(_PLAN, lambda nanos: nanos.append(nanos[0])), "operation 'attn_norm': token 0 is computed twice"),
        (
            _with_nanos(_PLAN, _swap("qkv_proj", "rope_append")),
            "rope_append[0:32] of layer 0 is issued before qkv_proj",
        ),
        (_with_nanos(_PLAN, _swap("attn_norm", "down_proj")), "down_proj[0:32] of layer 0 is issued before"),
        (_replace_nano(_PLAN, "attn_norm", stage=1), "qkv_proj[0:32] of layer 0 is issued before attn_norm[0:32]"),
        (_replace_nano(_PLAN, "down_proj", stage=1), "issued before down_proj[0:32] (stage 1) of layer 0"),
        (dataclasses.replace(_PLAN, lanes=()), "has no lane"),
        (dataclasses.replace(_PLAN, lanes=(Lane(name="whole"), Lane(name="whole"))), "lane 'whole' is there twice"),
        (dataclasses.replace(_PLAN, lanes=(Lane(name="whole", share=1.5),)), "lane 'whole' has share 1.5"),
        (dataclasses.replace(_PLAN, version=7), "has version 7"),
    ],
)
def test_an_invalid_plan_is_refused_with_the_culprit_named(plan: PipelinePlan, message: str) -> None:
    _PLAN.validate(_graph())
    with pytest.raises(PlanError, match=re.escape(message)):
        plan.validate(_graph())


def test_shares_that_run_together_may_not_exceed_the_device() -> None:
    def timed(operation: str, lane: str, plan: PipelinePlan) -> PipelinePlan:
        return _replace_nano(plan, operation, lane=lane, predicted_start_s=1.0, predicted_end_s=2.0)

    plan = dataclasses.replace(_PLAN, lanes=_TWO_LANES)
    plan.validate(_graph())
    plan = timed("o_proj", "whole", timed("decode_attention", "other", plan))
    with pytest.raises(PlanError, match=r"lanes \['other', 'whole'\] together hold 1.40 > 1"):
        plan.validate(_graph())


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.0 + 1e-6, float("nan"), float("inf")])
def test_a_share_is_a_part_of_the_device(share: float) -> None:
    with pytest.raises(PlanError, match=rf"lane 'whole' has share {share}, must be in \(0, 1\]"):
        dataclasses.replace(_PLAN, lanes=(Lane(name="whole", share=share),)).validate(_graph())
    for possible in (1e-3, 1.0):
        dataclasses.replace(_PLAN, lanes=(Lane(name="whole", share=possible),)).validate(_graph())


@pytest.mark.parametrize(
    ("shares", "begin_s", "is_too_much"),
    [
        ((0.7, 0.3), 1.0, False),
        ((0.7, 0.3 + 1e-9), 1.0, False),  # 1 but for rounding
        ((0.7, 0.31), 1.0, True),
        ((0.7, 0.31), 1.9, True),
        ((0.7, 0.31), 2.0, False),  # one begins as the other ends
    ],
)
def test_shares_that_run_together_sum_to_at_most_one(
    shares: tuple[float, float], begin_s: float, is_too_much: bool
) -> None:
    lanes = tuple(Lane(name=name, share=share) for name, share in zip(("whole", "other"), shares, strict=True))
    plan = dataclasses.replace(_PLAN, lanes=lanes)
    plan = _replace_nano(plan, "decode_attention", lane="other", predicted_start_s=1.0, predicted_end_s=2.0)
    plan = _replace_nano(plan, "o_proj", predicted_start_s=begin_s, predicted_end_s=3.0)
    with pytest.raises(PlanError, match=r"together hold 1\.01 > 1") if is_too_much else nullcontext():
        plan.validate(_graph())


def test_prefill_attention_waits_for_the_keys_of_earlier_nano_batches() -> None:
    """The second nano-batch's queries see the first one's keys; the first one's do not see the second's."""
    graph = _graph()
    ops = {op.name: op for op in graph.layer}
    first, second = split(64, [32])
    append, attend = ops["rope_append"], ops["prefill_attention"]
    assert depends(graph, Access(op=append, tokens=first), Access(op=attend, tokens=second))
    assert not depends(graph, Access(op=append, tokens=second), Access(op=attend, tokens=first))
    assert not depends(graph, Access(op=append, tokens=first), Access(op=ops["decode_attention"], tokens=second))
    assert not depends(graph, Access(op=append, tokens=first, layer=1), Access(op=attend, tokens=second, layer=0))
    assert not depends(graph, Access(op=ops["decode_attention"], tokens=first), Access(op=attend, tokens=first))


def test_a_plan_may_run_one_layers_end_beside_the_next_ones_beginning() -> None:
    """Nano-batch 1 a layer ahead of nano-batch 2: valid only as long as prefill keys are there, which they are."""
    graph = _graph()
    second = TokenRange(start=32, stop=64)
    ahead = [nano for nano in _PLAN.nano_operations if nano.tokens != second]
    behind = [dataclasses.replace(nano, stage=1) for nano in _PLAN.nano_operations if nano.tokens == second]
    plan = dataclasses.replace(_PLAN, nano_operations=(*behind, *ahead))
    plan.validate(graph)
    issued = list(plan.issue_order(3))
    assert len(issued) == 3 * len(_PLAN.nano_operations)
    assert [layer for layer, nano in issued if nano.operation == "o_proj"] == [0, 0, 1, 1, 2, 2]
    assert [nano.start for _, nano in issued if nano.operation == "o_proj"] == [0, 32, 0, 32, 0, 32]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_json_round_trip(data: st.DataObject) -> None:
    plan = data.draw(valid_plans(data.draw(graphs()), 8))
    again = PipelinePlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest


@pytest.mark.parametrize("document", [b"", b"[]", b'{"name": "x"}', b'{"name": 3}'])
def test_a_document_that_is_no_plan_is_refused(document: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(document)
    with pytest.raises(PlanError, match="not a pipeline plan"):
        PipelinePlan.load(path)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read plan .*nowhere\.json: No such file"):
        PipelinePlan.load(tmp_path / "nowhere.json")


def test_the_plan_book_chooses_by_size_and_falls_back() -> None:
    graph = _graph()
    fallback, small = sequential_plan(graph, 128), nanobatch_plan(graph, 64, [32])
    book = PlanBook(fallback=fallback, entries=(PlanEntry(plan=small, min_tokens=32, max_tokens=64),))
    chosen = [book.choose(BatchShape(num_tokens=tokens)).name for tokens in (31, 32, 64, 65)]
    assert chosen == ["sequential", "nano-batches", "nano-batches", "sequential"]
    with pytest.raises(PlanError, match="is for 64 tokens, not for 65"):
        PlanBook(fallback=fallback, entries=(PlanEntry(plan=small, min_tokens=1, max_tokens=65),))


@pytest.mark.parametrize("boundaries", [[0], [64], [40, 20], [20, 20]])
def test_boundaries_must_increase_inside_the_batch(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="must increase strictly"):
        split(64, boundaries)
