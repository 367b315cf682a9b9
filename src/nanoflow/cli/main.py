"""The `nanoflow` command: runs a subcommand, and prints errors that the user can correct as one line.

Only argparse and the config dataclasses are imported here, so that `--help` is fast. The file of each subcommand
imports what it runs inside its functions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import nanoflow
from nanoflow.access import several
from nanoflow.cli import analyze, batch, bench, chat, env, generate, plan, profile, search, serve, simulate
from nanoflow.cli.options import CommandParser
from nanoflow.cli.secrets import hide_arguments

_TEACH = """\
nanoflow serves large language models at the speed the device allows: it fills
every iteration up to a token budget and runs compute-, memory- and
network-bound operations of different nano-batches at the same time."""

_EXAMPLES = """\
examples:
  nanoflow generate "def fibonacci(n):"   complete with the small embedded model
  nanoflow serve Qwen/Qwen3-0.6B          OpenAI-compatible server on port 8000
  nanoflow chat --url http://127.0.0.1:8000/v1
  nanoflow batch requests.jsonl -o answers.jsonl
  nanoflow bench throughput --workload 512/512
  nanoflow analyze preset:llama-2-70b --gpu a100-80x8 --workload 512/1024
  nanoflow profile preset:llama-2-70b --estimate a100-80x8 -o profile.json
  nanoflow simulate profile.json --workload 512/512 --request-rate 40 --find-gpus

exit status: 0 done, 1 an error or a failed request, 2 a wrong command line,
130 interrupted (Ctrl-C), 141 the reader of the output has left

Every command explains itself: nanoflow COMMAND --help"""

_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def build_parser() -> CommandParser:
    """The parser with all subcommands."""
    parser = CommandParser(prog="nanoflow", usage="nanoflow COMMAND [options]", description=_TEACH, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"nanoflow {nanoflow.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="nanoflow", required=True)
    for command in (generate, chat, serve, batch, bench, analyze, profile, search, simulate, plan, env):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0, 1 after an error, 130 after Ctrl-C, 141 if the reader of the output has left. A wrong command
        line leaves with 2 by `SystemExit`.
    """
    args = build_parser().parse_args(argv)
    hide_arguments(several(getattr(args, "api_key", None)))
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe has exited (`nanoflow ... | head`); keep the interpreter from flushing to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except Exception as error:
        if _wants_traceback(args) or not _is_for_the_user(error):
            raise
        print(f"nanoflow: error: {error}", file=sys.stderr)
        return 1


def _wants_traceback(args: argparse.Namespace) -> bool:
    return bool(args.debug or os.environ.get("NANOFLOW_DEBUG"))


def _is_for_the_user(error: Exception) -> bool:
    """True for errors of a value, a model, a file or the network, whose message says what to do."""
    from nanoflow.engine.errors import EngineError

    return isinstance(error, ValueError | OSError | EngineError)
