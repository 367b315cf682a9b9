"""Experiments, no part of the engine; run from the repository's root: `python -m benchmarks.experiments.NAME`."""
