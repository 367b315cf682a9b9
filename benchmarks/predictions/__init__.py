"""Predicted times against measured or published ones: iterations, whole runs, the figures of the paper."""
