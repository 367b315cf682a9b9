"""Sampling parameters: what each may be, as what it is kept, and in which words it is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import msgspec
import numpy as np
import pytest

from nanoflow.parameters import did_you_mean, shown
from nanoflow.request import KINDS, MAX_BAD_WORDS, RequestError, SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "thinking_token_budget")
FLAGS = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
OTHERS = ("output_kind", "pooling", "truncate_prompt_tokens", "structured_outputs")
LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logit_bias")


def test_every_parameter_has_a_kind() -> None:
    assert sorted((*NUMBERS, *INTEGERS, *FLAGS, *LISTS, *OTHERS)) == sorted(KINDS)
    assert list(KINDS) == [field.name for field in dataclasses.fields(SamplingParams)]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value", [2.5, True, "2", [2], np.float32(2.5), float("nan"), float("inf"), np.bool_(True), 10**30, -(10**30)]
)
def test_what_is_no_integer_of_the_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1", True, float("nan"), float("inf"), -3, 10**400, [1.0], 1j, np.float16("nan")])
def test_what_is_no_number_of_the_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0, 1, "true", 1.0, [], np.int64(1)])
def test_what_is_no_truth_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be true or false, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5),
        ("stop", [5]),
        ("stop", ["a", ""]),
        ("stop", b"a"),
        ("stop", {"a": 1}),
        ("stop", "\ud800"),
        ("stop", ["a"] * 17),
        ("bad_words", "abc"),
        ("bad_words", [""]),
        ("bad_words", ["x"] * (MAX_BAD_WORDS + 1)),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [float("nan")]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 7),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [-(10**40)]),
        ("stop_token_ids", [0] * 129),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [[1]]),
        ("allowed_token_ids", {1: 2}),
        ("logit_bias", [1]),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {2**31: 1.0}),
        ("logit_bias", {1: "1"}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: 1.0, "01": 2.0}),
        ("logit_bias", dict.fromkeys(range(301), 0.0)),
    ],
)
def test_lists_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}"):
        SamplingParams(**{name: value})


def test_numpy_is_taken_and_kept_as_pythons_own() -> None:
    given: dict[str, Any] = {
        "n": np.int8(2),
        "temperature": np.float32(0.5),
        "top_k": np.uint64(7),
        "seed": np.int64(-3),
        "ignore_eos": np.bool_(True),
        "logit_bias": {np.int32(4): np.float64(1.5), "5": 2},
        "stop_token_ids": np.array([1, 2]),
        "allowed_token_ids": range(3),
        "bad_words": ("a",),
    }
    params = SamplingParams(**given)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    kept = (params.n, params.temperature, params.top_k, params.seed, params.ignore_eos)
    assert kept == (2, 0.5, 7, -3, True) and [type(one) for one in kept] == [int, float, int, int, bool]
    assert params.logit_bias == {4: 1.5, 5: 2.0} and params.stop_token_ids == [1, 2]
    assert params.allowed_token_ids == [0, 1, 2] and params.bad_words == ["a"]


def test_every_bound_is_inside_and_crosses_to_the_engine() -> None:
    """Whatever is let in can be sent, and is read as what it was."""
    for name, kind in KINDS.items():
        for bound in (getattr(kind, "low", None), getattr(kind, "high", None)):
            if bound is None or name in LISTS:
                continue
            params = SamplingParams(**{"max_tokens": None, name: bound})
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
            for beyond in (kind.low - 1, kind.high * 2 + 1):  # type: ignore[attr-defined]
                with pytest.raises(RequestError, match=f"^{name} must be in "):
                    SamplingParams(**{name: beyond})


def test_none_is_the_default() -> None:
    nothing: dict[str, Any] = dict.fromkeys(set(KINDS) - {"max_tokens"})
    assert SamplingParams(**nothing) == SamplingParams()
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_a_second_reading_changes_nothing() -> None:
    params = SamplingParams(stop="a", stop_token_ids=[3], logit_bias={7: 1}, top_k=-1, temperature=0)
    assert dataclasses.replace(params) == copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"no parameter 'tempreature'; did you mean 'temperature'\?"):
        SamplingParams(tempreature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no parameter 'zzzz'; there are n, presence_penalty, "):
        SamplingParams(zzzz=1)  # type: ignore[call-arg]


def test_parameters_that_do_not_go_together() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(20\) must not exceed max_tokens \(16\)"):
        SamplingParams(min_tokens=20)
    with pytest.raises(RequestError, match="stop strings need detokenize=True"):
        SamplingParams(stop="a", detokenize=False)


def test_top_p_0_keeps_the_most_probable_token() -> None:
    assert SamplingParams(top_p=0).top_p == 0.0


def test_values_are_shown_short_whatever_they_are() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in ("x" * 10**6, [1] * 10**6, 10**5000, Odd(), {"a": {"b": "c" * 1000}}):
        assert len(shown(value)) < 200
    assert did_you_mean("top_pp", KINDS) == "; did you mean 'top_p'?" and did_you_mean("zzzz", KINDS) is None
