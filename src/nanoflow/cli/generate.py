"""`nanoflow generate`: complete prompts with an engine in this process and print the completions.

For one completion of one prompt on a terminal the text is streamed. Otherwise all prompts run as one batch, and the
output is text or JSON lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import UNWATCHED_DEFAULTS, ConfigError, EngineConfig
from nanoflow.outputs import FinishReason
from nanoflow.request import SamplingParams

if TYPE_CHECKING:
    from nanoflow.outputs import CompletionOutput, RequestOutput

_TEACH = """\
Complete prompts with a model, in this process. Prompts are arguments, lines of
--file or lines of standard input. A single prompt streams to the terminal;
several run as one batch. --json prints one object a completion and line with
prompt, text, token_ids and finish_reason. The exit status is 0 if every prompt was
completed, 1 after an error or if a prompt failed, 2 for a wrong command line, and
130 after Ctrl-C."""

_EXAMPLES = """\
  nanoflow generate "def fibonacci(n):"
  nanoflow generate --model Qwen/Qwen3-0.6B --temperature 0 "The capital of France is"
  nanoflow generate --file prompts.txt --json > completions.jsonl
  echo "import " | nanoflow generate -"""

# Parameters that only make sense for programs, which use the Python or HTTP interface.
NOT_FOR_TERMINALS = frozenset({"logit_bias", "logprobs", "prompt_logprobs", "detokenize", "output_kind"})

# With more requests than this the engine chooses how many of them run at once.
_FEW_REQUESTS = 64

_ENGINE = OptionGroup(
    kind=EngineConfig, title="model and engine", skip=frozenset({"seed"}), defaults=UNWATCHED_DEFAULTS
)
_SAMPLING = OptionGroup(kind=SamplingParams, title="sampling", skip=NOT_FOR_TERMINALS, defaults={"max_tokens": 128})


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow generate`."""
    parser = add_command(commands, "generate", "complete prompts in this process", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} [PROMPT ...] [options]"
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="A prompt; - reads standard input, one a line")
    parser.add_argument("--file", metavar="FILE", help="Read prompts from a file, one a line; - is standard input")
    parser.add_argument("--json", action="store_true", help="Print one JSON object a completion and line")
    _SAMPLING.add_to(parser)
    _ENGINE.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Complete the prompts; returns 1 if one of them failed, else 0."""
    params, config = _SAMPLING.read(args), _ENGINE.read(args)  # Refuses invalid options before the model is loaded.
    prompts = read_prompts(args.prompts, args.file)
    config = for_so_many(config, len(prompts) * params.n)
    if len(prompts) == 1 and params.n == 1 and not args.json and sys.stdout.isatty():
        _print_stream(prompts[0], config, args)
        return 0
    outputs = _complete(prompts, config, args)
    print_outputs(outputs, is_json=args.json)
    return report_failures(outputs)


def for_so_many(config: EngineConfig, num_requests: int) -> EngineConfig:
    """The config of an engine that will have at most `num_requests` requests: few requests need few KV pages.

    Options that are given, and the limits of a plan book, are not changed.
    """
    if config.max_num_seqs is not None or config.plan is not None or num_requests > _FEW_REQUESTS:
        return config
    return dataclasses.replace(config, max_num_seqs=num_requests)


def read_prompts(arguments: Sequence[str], file: str | None) -> list[str]:
    """The prompts: arguments, then lines of the file. Standard input is read for `-`, or if it is piped.

    Raises:
        ConfigError: There is no prompt.
    """
    prompts: list[str] = []
    for argument in arguments:
        prompts += _lines("-") if argument == "-" else [argument]
    if file is not None:
        prompts += _lines(file)
    if not arguments and file is None and not sys.stdin.isatty():
        prompts += _lines("-")
    if not prompts:
        raise ConfigError("no prompt: give one as an argument, with --file FILE, or on standard input")
    return prompts


def print_outputs(outputs: Sequence[RequestOutput], *, is_json: bool) -> None:
    """Print every completion, as a JSON line or as text; with several, each text has its prompt as a heading."""
    num_completions = sum(len(output.outputs) for output in outputs)
    for number, output in enumerate(outputs):
        for completion in output.outputs:
            if is_json:
                print(json.dumps(_json_line(number, output, completion), ensure_ascii=False))
                continue
            if num_completions > 1:
                print(f">>> {output.prompt}")
            print(completion.text)


def report_failures(outputs: Sequence[RequestOutput]) -> int:
    """Report failed prompts on standard error; returns the exit status."""
    failed = [(number, output) for number, output in enumerate(outputs) if _has_failed(output)]
    for number, output in failed:
        print(f"nanoflow: error: prompt {number}: {output.error or 'the request failed'}", file=sys.stderr)
    return 1 if failed else 0


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        name = "standard input" if file == "-" else file
        raise ConfigError(f"cannot read prompts from {name}: not text in UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]


def _print_stream(prompt: str, config: EngineConfig, args: argparse.Namespace) -> None:
    from nanoflow.cli.session import EngineSession

    with EngineSession(config) as session:
        for piece in session.stream(prompt, _SAMPLING.read(args, session.recommended)):
            print(piece, end="", flush=True)
    print()


def _complete(prompts: list[str], config: EngineConfig, args: argparse.Namespace) -> list[RequestOutput]:
    from nanoflow.engine.llm import LLM

    with LLM(**dataclasses.asdict(config)) as llm:
        params = _SAMPLING.read(args, llm.facts.sampling.fields)
        return llm.generate(prompts, params, use_tqdm=len(prompts) > 1 and sys.stderr.isatty())


def _json_line(number: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    return {
        "prompt_index": number,
        "prompt": output.prompt,
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _has_failed(output: RequestOutput) -> bool:
    return any(completion.finish_reason is FinishReason.ERROR for completion in output.outputs)
