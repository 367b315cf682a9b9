"""Benchmarks: workloads, load in process and over HTTP, metrics, and one JSON record a run.

`offline.py` and `online.py` run the requests, `measurement_window.py` finds the steady state, `bound.py` and `rates.py`
compute what was possible, `record.py` writes.
"""
