"""Simulation: a layer, an iteration and whole runs of a workload on a simulated clock, without torch."""
