"""Benchmarks: workloads, load in process and over HTTP, metrics, and one JSON record a run.

`nanoflow/workload.py` makes requests; `offline.py` and `online.py` run them; `nanoflow/run_metrics.py` and `steady.py`
compute metrics; `rates.py` and `bound.py` find bounds; `record.py` writes the record.
"""
