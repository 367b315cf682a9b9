"""The whole server with the fake engine: `python -m tests.fake_serve MODEL [flags of the server]`."""

from __future__ import annotations

import argparse
import sys

from nanoflow.cli.options import OptionGroup
from nanoflow.config import EngineConfig, ServerConfig
from nanoflow.server.serve import run_server

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--engine-module", default="tests.fake_engine_process")
    parser.add_argument("--chat-template-timeout-s", type=float, default=5.0)
    options = OptionGroup(kind=ServerConfig, title="server")
    options.add_to(parser)
    args = parser.parse_args()
    try:
        config = EngineConfig(model=args.model, chat_template_timeout_s=args.chat_template_timeout_s)
        run_server(config, options.read(args), engine_module=args.engine_module)
    except Exception as error:
        sys.exit(f"nanoflow: error: {error}")
