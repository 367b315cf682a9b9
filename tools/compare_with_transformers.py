"""Compare a real model here with the same model in transformers: templates, greedy tokens, prompt log probabilities.

    python -m tools.compare_with_transformers FOLDER

FOLDER holds a small chat model of which both can run a copy in float32 on this machine; CI has none. Greedy tokens may
differ only where the two most probable ones are closer than `--tie`: from there on both are right and go ways of their
own.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoflow import LLM, SamplingParams
from nanoflow.outputs import RequestOutput

_SUBJECTS = (
    "the sea",
    "a prime number",
    "Köln",
    "東京",
    "photosynthesis",
    "an old map",
    "café ☕",
    "the stack",
    "Πυθαγόρας",
    "rain",
)
_FORMS = (
    "Tell me about {}.",
    "def explain():\n    return '''{} ",
    "{} is",
    "Q: What is {}?\nA:",
    "  A list of words:\n- {}\n- ",
)
_SYSTEMS = (None, "You answer in one sentence.")
NUM_PROMPTS = len(_SUBJECTS) * len(_FORMS)

Message = dict[str, str]


def prompts() -> list[str]:
    """Plain prompts: prose, code, lists, several scripts."""
    return [form.format(subject) for form, subject in itertools.product(_FORMS, _SUBJECTS)]


def conversations() -> Iterator[list[Message]]:
    """With and without a system message, of one turn and of two."""
    for place, (system, subject) in enumerate(itertools.product(_SYSTEMS, _SUBJECTS)):
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": f"What do you know of {subject}?"})
        if place % 2:
            messages.append({"role": "assistant", "content": f"Much, above all that {subject} is well known."})
            messages.append({"role": "user", "content": "Say it shorter.\n"})
        yield messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The model in transformers."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: str) -> Reference:
        """Load it in float32 on the CPU."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a completion."""
        ids = self.model.generation_config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or ())

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Natural log probabilities of what follows each token, float64 [tokens, vocabulary]."""
        logits = self.model(torch.tensor([token_ids])).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)


@dataclass(slots=True, kw_only=True)
class Report:
    """What was compared and what differs."""

    max_tokens: int
    eos_token_ids: frozenset[int]
    problems: list[str]
    num_tokens: int = 0
    num_ties: int = 0
    largest_logprob_error: float = 0.0

    def add(self, reference: Reference, output: RequestOutput, tie: float) -> None:
        """Compare one output: its tokens and its prompt's log probabilities with one pass over both."""
        prompt, new = output.prompt_token_ids, output.outputs[0].token_ids
        logprobs = reference.logprobs([*prompt, *new])
        for place, position in enumerate(output.prompt_logprobs or []):
            for token_id, entry in (position or {}).items():
                error = abs(entry.logprob - float(logprobs[place - 1, token_id]))
                self.largest_logprob_error = max(self.largest_logprob_error, error)
        ends = {token_id for token_id in new if token_id in self.eos_token_ids}
        is_cut = len(new) == self.max_tokens or new[-1] in ends
        if not is_cut or ends & {*new[:-1]}:
            self.problems.append(f"the completion of {output.prompt!r} ends elsewhere")
        for place, token_id in enumerate(new, start=len(prompt) - 1):
            best = float(logprobs[place].max())
            behind = best - float(logprobs[place, token_id])
            self.num_tokens += 1
            self.num_ties += 0 < behind <= tie
            if behind > tie:
                self.problems.append(f"token {place} of {output.prompt!r} is {behind:.2e} behind the most probable")


def check_templates(reference: Reference, llm: LLM) -> list[str]:
    """Conversations whose token ids differ."""
    tokenizer, problems = llm.tokenizer, []
    for messages in conversations():
        for opens in (True, False):
            options = {"add_generation_prompt": opens}
            text = reference.tokenizer.apply_chat_template(messages, tokenize=False, **options)
            expected = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer.apply_chat_template(messages, add_generation_prompt=opens) != expected:
                problems.append(f"the template gives other tokens for {messages}")
    return problems


def main() -> int:
    """Print what was compared; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--tie", type=float, default=1e-4, help="log probabilities this close are equal (0.0001)")
    parser.add_argument("--logprob-error", type=float, default=1e-3, help="largest error of one (0.001)")
    args = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, prompt_logprobs=1)
    reference = Reference.load(args.folder)
    with LLM(args.folder, dtype="float32", device="cpu", max_model_len=2048) as llm:
        encoded = [reference.tokenizer(prompt)["input_ids"] for prompt in prompts()]
        outputs = llm.generate(prompts(), params)
        report = Report(
            max_tokens=args.max_tokens,
            eos_token_ids=reference.eos_token_ids,
            problems=check_templates(reference, llm),
        )
        for output, expected in zip(outputs, encoded, strict=True):
            if output.prompt_token_ids != expected:
                report.problems.append(f"{output.prompt!r} is encoded otherwise")
        outputs += llm.chat(list(conversations()), params)
    for output in outputs:
        report.add(reference, output, args.tie)
    if report.largest_logprob_error > args.logprob_error:
        report.problems.append("log probabilities of prompts differ")
    for problem in report.problems:
        print(problem)
    print(
        f"{NUM_PROMPTS} prompts and {len(outputs) - NUM_PROMPTS} conversations: {report.num_tokens} greedy tokens, "
        f"{report.num_ties} of them ties; largest error of a prompt's log probability "
        f"{report.largest_logprob_error:.1e}; {len(report.problems)} differences"
    )
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
