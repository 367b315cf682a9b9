"""Candidate plans tried on the device: whole iterations, and what is kept of them for a search that goes on later."""
