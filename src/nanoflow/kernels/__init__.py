"""Kernels: what computes an operation. `reference.py` is the slow twin of every fast one; `dispatch.py` chooses."""
