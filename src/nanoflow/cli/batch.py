"""`nanoflow batch`: answer a file of requests in OpenAI's batch format, with an engine in this machine.

This file has the options and the exit status; `batch_run.py` starts the engine and runs the lines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nanoflow.batch_files.options import BatchConfig
from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import UNWATCHED_DEFAULTS, ConfigError, EngineConfig

_TEACH = """\
Answer a file of requests in the format of OpenAI's batch API, one a line:
  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
The url is that of completions, chat completions or embeddings, the body is what the server
takes there. Each line gets one line in the output, in the order in which answers
are ready:
  {"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200,
   "request_id": ..., "body": {...}}, "error": null}
The number in id is that of the line. A line that is no request, or that the server
would refuse, gets an answer with status_code 400 or another of its errors, and all
others go on. The command may be interrupted or killed at any time: the same command
goes on where it stopped, and no line is answered twice. OUTPUT.batch beside the output
says of which input it has the answers; with another input it is refused. Memory does
not grow with the answers, and by 16 bytes a line with the input.
docs/batches.md says more. The exit status is 0 if every line has an answer with status
200, 1 if some have errors or the engine ended, 2 for a wrong command line, and 130
after Ctrl-C."""

_EXAMPLES = """\
  nanoflow batch requests.jsonl -o answers.jsonl
  nanoflow batch requests.jsonl -o answers.jsonl --model Qwen/Qwen3-0.6B --served-model-name gpt-4o-mini
  nanoflow batch requests.jsonl -o answers.jsonl --order arrival --num-at-once 64"""

_BATCH = OptionGroup(kind=BatchConfig, title="batch")
_ENGINE = OptionGroup(kind=EngineConfig, title="model and engine", defaults=UNWATCHED_DEFAULTS)


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow batch`."""
    parser = add_command(commands, "batch", "answer a file of requests in OpenAI's batch format", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} INPUT -o OUTPUT [options]"
    parser.add_argument("input", metavar="INPUT", type=Path, help="File with a request a line (JSON lines)")
    parser.add_argument(
        "-o", "--output", metavar="OUTPUT", type=Path, required=True, help="File that answers are appended to"
    )
    _BATCH.add_to(parser)
    _ENGINE.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer the lines that have no answer yet; returns 1 if some have errors."""
    engine_config, config = _ENGINE.read(args), _BATCH.read(args)
    source: Path = args.input
    output: Path = args.output
    if not source.exists():
        raise ConfigError(f"there is no file {source}: give one with a request a line")
    if output == Path("-"):
        raise ConfigError("answers go to a file, from which an interrupted batch goes on; give its name, not -")
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(
            f"cannot write {output}: {'it' if output.is_dir() else output.parent} is no "
            f"{'file' if output.is_dir() else 'folder'}"
        )
    if output.exists() and output.samefile(source):
        raise ConfigError(f"{output} is the input; give another file for the answers")
    from nanoflow.cli.batch_run import run_batch

    end = run_batch(source, output, engine_config, config)
    print(end.summary, file=sys.stderr)
    return end.status
