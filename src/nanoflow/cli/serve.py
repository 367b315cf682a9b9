"""`nanoflow serve`: an OpenAI-compatible server for one model, from `server/`."""

from __future__ import annotations

import argparse

from nanoflow.cli.options import CommandParser, OptionGroup, Subcommands, add_command
from nanoflow.config import ConfigError, EngineConfig, ServerConfig

_TEACH = """\
Load a model and answer the OpenAI API (/v1/completions, /v1/chat/completions,
/v1/responses, /v1/models) and /v1/messages of Anthropic's, with /health and
/metrics beside them. Requests are batched as they come. Ctrl-C or SIGTERM stops
the server."""

_EXAMPLES = """\
  nanoflow serve                              the small embedded model
  nanoflow serve Qwen/Qwen3-0.6B --port 9000  a model of the Hugging Face Hub
  nanoflow serve ./my-model --max-batch-tokens 4096
  nanoflow serve --host 0.0.0.0 --api-key-file keys.txt --ssl-certfile c.pem --ssl-keyfile k.pem
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "default", "prompt": "import ", "max_tokens": 16}'"""

_ENGINE = OptionGroup(kind=EngineConfig, title="model and engine")
_SERVER = OptionGroup(kind=ServerConfig, title="server")


def add_parser(commands: Subcommands[CommandParser]) -> None:
    """Add `nanoflow serve`."""
    parser = add_command(commands, "serve", "OpenAI-compatible server for a model", _TEACH, _EXAMPLES)
    parser.usage = f"{parser.prog} [MODEL] [options]"
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help="Same as --model")
    _SERVER.add_to(parser)
    _ENGINE.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    if args.positional_model is not None:
        if _ENGINE.given(args).get("model", args.positional_model) != args.positional_model:
            raise ConfigError(f"two models given: {args.positional_model!r} and --model {args.model!r}")
        args.model = args.positional_model
    engine_config, server_config = _ENGINE.read(args), _SERVER.read(args)
    from nanoflow.server.serve import run_server

    run_server(engine_config, server_config)
    return 0
