"""Hostile inputs, made from seeds by rules: what clients and model folders may send.

They are sent by `benchmarks/robustness/fuzz.py`.
"""
