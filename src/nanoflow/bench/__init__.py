"""Benchmarks: workloads, load in process and over HTTP, metrics, and one JSON record a run.

`workload.py` makes requests, `offline.py` and `online.py` drive them, `metrics.py` and `steady.py` measure, `bound.py`
and `rates.py` say what was possible, `record.py` writes.
"""
