"""The `nanoflow` command: one file a subcommand, put together in `main.py`; flags come from the config dataclasses."""
