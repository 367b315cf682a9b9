"""A model as data: operations, the tensors between them, and how a batch cuts them into nano-operations.

Nothing here computes. `models/` writes graphs, `plan/` orders them, `executor/` runs them.
"""
