"""Hostile inputs, made from seeds by rules: what clients and model folders may send. Sent by `benchmarks/fuzz.py`."""
