"""A model as data: operations, the tensors between them, and how a batch is cut into nano-operations.

`models/` makes graphs, `plan/` orders their operations, `executor/` runs them.
"""
