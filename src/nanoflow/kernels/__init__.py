"""Kernels, which compute operations. `reference.py` is the slow reference of every fast one; `dispatch.py` chooses."""
