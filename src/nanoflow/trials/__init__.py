"""Candidate plans tried on the device: whole iterations under them, and the journal of these measurements."""
