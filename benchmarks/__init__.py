"""Benchmarks, a folder a subject; run from the repository's root as `python -m benchmarks.FOLDER.NAME`."""
