"""The `nanoflow` command: one file for each subcommand; `main.py` puts them together."""
