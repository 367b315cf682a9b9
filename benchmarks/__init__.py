"""Scripts that measure one part each; run from the repository's root as `python -m benchmarks.NAME`."""
