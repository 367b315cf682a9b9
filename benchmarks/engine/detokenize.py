"""CPU time of the front end for each token: taking in the tokens of an iteration, and turning them into text.

There is no engine: a stub gives every running request one token an iteration. The parts, in CPU time a token:
  process    taking in the iteration; for requests with stop strings also making and searching their text
  refresh    making text and log probabilities when a stream is read, every few tokens
  end        making the rest of the text at the end; for requests that nobody streams, all of it
Each is measured after few and after many generated tokens, and should cost the same. A second table compares ways to
decode: from the tokens' bytes, from a window of tokens by the tokenizer, and by the function of `tokenizers`.

Run it on one core: OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.engine.detokenize
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from benchmarks.common.document import write_document
from benchmarks.common.stub_facts import stub_facts
from nanoflow.cli.options import CommandParser
from nanoflow.config import DEFAULT_MODEL, EngineConfig
from nanoflow.engine.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer
from nanoflow.engine.messages import EngineStats, PlaceLogprobs, StepOutput
from nanoflow.engine.observer import FinishedRequest
from nanoflow.engine.output import OutputProcessor
from nanoflow.engine.prompts import Prompt
from nanoflow.engine.tokenizer import Tokenizer, load_tokenizer
from nanoflow.outputs import Finished, FinishReason, RequestOutput
from nanoflow.request import SamplingParams

TEXT = (
    "The committee met on Tuesday (the 14th), and nobody could say why. `for i in range(10): print(i)` came up twice.\n"
    "Straße, café, naïve; 漢字かな交じり文。Привет, мир! 👍🏽 and then, at last, the vote: 17 to 4.\n\n"
)
NUM_LOGPROBS = 5
NUM_PROMPT_TOKENS = 128
# Sizes in the comparison of ways to decode.
NUM_DECODED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the requests ask for.

    Attributes:
        params: Sampling parameters of each request.
        refresh_tokens: Tokens between two readings of an output; None if nothing is read before the end.
    """

    params: SamplingParams
    refresh_tokens: int | None = None


def _params(**options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=None, ignore_eos=True, **options)


CASES = {
    "no text": Case(params=_params(detokenize=False)),
    "read at the end": Case(params=_params()),
    "every 16 tokens": Case(params=_params(), refresh_tokens=16),
    "every 4 tokens": Case(params=_params(), refresh_tokens=4),
    "every token": Case(params=_params(), refresh_tokens=1),
    "2 stops, at the end": Case(params=_params(stop=["\n\nUser:", "<|im_end|>"])),
    "2 stops, every 16": Case(params=_params(stop=["\n\nUser:", "<|im_end|>"]), refresh_tokens=16),
    "16 stops, at the end": Case(params=_params(stop=[f"{char} never" for char in " ,.:;!?()`\n漢abc"])),
    f"{NUM_LOGPROBS} logprobs, at the end": Case(params=_params(logprobs=NUM_LOGPROBS)),
    f"{NUM_LOGPROBS} logprobs, every 16": Case(params=_params(logprobs=NUM_LOGPROBS), refresh_tokens=16),
}


class Recorder:
    """An observer that records nothing."""

    def observe_step(self, stats: EngineStats) -> None:
        """An iteration has ended."""

    def observe_first_token(self, ttft_s: float, num_prompt_tokens: int) -> None:
        """A request got its first token."""

    def observe_tokens(self, num_tokens: int) -> None:
        """Not used."""

    def observe_next_tokens(self, latencies_s: Sequence[float]) -> None:
        """Requests got a token that is not their first."""

    def observe_finished(self, request: FinishedRequest) -> None:
        """A request ended."""


class Bench:
    """Running requests that have generated some tokens.

    Args:
        tokenizer: Makes the text.
        case: What the requests ask for.
        num_requests: Number of running requests.
        num_before: Tokens that each has generated.
    """

    def __init__(self, tokenizer: Tokenizer, case: Case, *, num_requests: int, num_before: int) -> None:
        self._case = case
        self._processor = OutputProcessor(stub_facts(vocab_size=tokenizer.vocab_size), tokenizer)
        self._processor.observer = Recorder()
        text_ids = tokenizer.encode(TEXT, add_special_tokens=False)
        prompt = Prompt(text=None, token_ids=list(itertools.islice(itertools.cycle(text_ids), NUM_PROMPT_TOKENS)))
        self._outputs: list[RequestOutput] = []
        self._ids: list[int] = []
        for number in range(num_requests):
            output, requests = self._processor.add(str(number), prompt, case.params)
            self._outputs.append(output)
            self._ids += [request.request_id for request in requests]
        # Requests begin at different places of the text.
        self._next = [itertools.islice(itertools.cycle(text_ids), i % len(text_ids), None) for i in range(num_requests)]
        for _ in range(num_before):
            self._processor.process(self._step())
        if case.refresh_tokens is not None:
            for output in self._outputs:
                self._processor.refresh(output)

    def run(self, num_iterations: int) -> dict[str, float]:
        """CPU seconds of a number of iterations, and of ending all requests."""
        process_s = refresh_s = 0.0
        every = self._case.refresh_tokens
        for iteration in range(1, num_iterations + 1):
            step = self._step()
            start_s = time.process_time()
            grown = self._processor.process(step)
            middle_s = time.process_time()
            if every is not None and iteration % every == 0:
                for output in grown:
                    self._processor.refresh(output)
            process_s += middle_s - start_s
            refresh_s += time.process_time() - middle_s
        end = StepOutput(finished={engine_id: Finished(reason=FinishReason.LENGTH) for engine_id in self._ids})
        start_s = time.process_time()
        self._processor.process(end)
        return {"process": process_s, "refresh": refresh_s, "end": time.process_time() - start_s}

    def _step(self) -> StepOutput:
        token_ids = [next(tokens) for tokens in self._next]
        logprobs = {}
        if self._case.params.logprobs is not None:
            logprobs = {i: _scores(token_id) for i, token_id in zip(self._ids, token_ids, strict=True)}
        return StepOutput(request_ids=self._ids, token_ids=token_ids, logprobs=logprobs)


def _scores(token_id: int) -> PlaceLogprobs:
    top = [token_id, *range(token_id % 64, token_id % 64 + NUM_LOGPROBS)]
    return PlaceLogprobs(first_position=0, token_ids=[top], logprobs=[[-0.5] * len(top)], ranks=[1])


def measure_cases(tokenizer: Tokenizer, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each case and number of tokens before: microseconds a token, minima over repeats for each part."""
    for (name, case), num_before in itertools.product(CASES.items(), arguments.tokens_before):
        num_timed = arguments.requests * arguments.iterations
        # The time of the end is divided by all tokens, not only by those of the timed iterations.
        num_tokens = {"process": num_timed, "refresh": num_timed, "end": num_timed + arguments.requests * num_before}
        least = {"process": float("inf"), "refresh": float("inf"), "end": float("inf")}
        for _ in range(arguments.repeats):
            bench = Bench(tokenizer, case, num_requests=arguments.requests, num_before=num_before)
            spent = bench.run(arguments.iterations)
            least = {part: min(least[part], spent[part] / num_tokens[part] * 1e6) for part in least}
        parts = {f"{part}_us": round(us, 3) for part, us in least.items()}
        yield {"case": name, "tokens_before": num_before, **parts, "token_us": round(sum(least.values()), 3)}


def measure_ways(tokenizer: Tokenizer, num_repeats: int) -> dict[str, float]:
    """Microseconds a token of each way to decode: tokens of one stream, and one token of each of many streams."""
    text_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    token_ids = list(itertools.islice(itertools.cycle(text_ids), NUM_DECODED))
    backend = tokenizer._backend
    pairs = [token_ids[i : i + 2] for i in range(NUM_DECODED - 1)]

    def decode_stream() -> None:
        stream = DecodeStream(skip_special_tokens=True)
        for token_id in token_ids:
            stream.step(backend, token_id)

    def in_groups(kind: Callable[[Tokenizer, Sequence[int]], Detokenizer], size: int) -> Callable[[], None]:
        def decode() -> None:
            detokenizer = kind(tokenizer, token_ids[:NUM_PROMPT_TOKENS])
            for start in range(0, NUM_DECODED, size):
                detokenizer.push(token_ids[start : start + size])

        return decode

    ways: dict[str, Callable[[], object]] = {
        "DecodeStream": decode_stream,
        "decode_batch, 2 tokens each": lambda: backend.decode_batch(pairs),
        "decode of everything": lambda: backend.decode(token_ids),
    }
    kinds: dict[str, Callable[[Tokenizer, Sequence[int]], Detokenizer]] = {"window": WindowDetokenizer}
    if tokenizer.byte_rule is not None:
        kinds["bytes"] = ByteDetokenizer
    for (name, kind), size in itertools.product(kinds.items(), (1, 4, 16, NUM_DECODED)):
        ways[f"{name}, {size} at once"] = in_groups(kind, size)
    return {name: round(_least_s(way, num_repeats) / NUM_DECODED * 1e6, 3) for name, way in ways.items()}


def _least_s(way: Callable[[], object], num_repeats: int) -> float:
    times_s = []
    for _ in range(num_repeats):
        start_s = time.process_time()
        way()
        times_s.append(time.process_time() - start_s)
    return min(times_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="python -m benchmarks.engine.detokenize", description=__doc__)
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL, help="model folder or name (the embedded model)")
    parser.add_argument("--requests", type=int, default=200, help="requests that run at once (200)")
    parser.add_argument("--iterations", type=int, default=160, help="iterations to time (160)")
    parser.add_argument("--tokens-before", type=int, nargs="+", default=[100, 20_000], help="(100 20000)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement; the minimum counts (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args(argv)
    tokenizer = load_tokenizer(EngineConfig(model=arguments.tokenizer))
    if tokenizer is None:
        parser.error(f"{arguments.tokenizer} has no tokenizer")

    print(f"{'CPU us a token':24}{'before':>8}{'process':>9}{'refresh':>9}{'end':>9}{'all':>9}")
    rows = []
    for row in measure_cases(tokenizer, arguments):
        rows.append(row)
        times = "".join(f"{row[f'{part}_us']:9.2f}" for part in ("process", "refresh", "end", "token"))
        print(f"{row['case']:24}{row['tokens_before']:8,}{times}", flush=True)
    ways = measure_ways(tokenizer, arguments.repeats)
    print("\nways to decode, CPU us a token")
    for name, us in ways.items():
        print(f"  {name:30}{us:8.3f}")
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name != "json"}
        write_document(arguments.json, "detokenize", options=options, cases=rows, ways=ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
