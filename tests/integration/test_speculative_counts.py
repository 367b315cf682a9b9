"""What statistics say of an engine that speculates: tokens behind a stop string in a draft are nobody's."""

from __future__ import annotations

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.scheduler.gain import Gain

PROMPT = "a b c d e f " * 6


def generated(llm: LLM) -> int:
    """Tokens that outputs have got so far."""
    return next(int(metric.value) for metric in llm.get_metrics() if metric.name.endswith(":generation_tokens"))


def test_generated_tokens_are_those_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gain, "allows", lambda *_: True)
    with LLM(max_num_seqs=4, speculative="ngram:6:3:1") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        (whole,) = llm.generate(PROMPT, params, use_tqdm=False)
        text, num_shown = whole.outputs[0].text, len(whole.outputs[0].token_ids)
        # Stop strings at many places, some of them amid a draft.
        for start in range(4, len(text) - 2, 2):
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=[text[start : start + 3]])
            (output,) = llm.generate(PROMPT, params, use_tqdm=False)
            num_shown += len(output.outputs[0].token_ids)
        assert generated(llm) == num_shown
