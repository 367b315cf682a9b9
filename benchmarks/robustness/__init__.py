"""A server under attack, under hostile inputs, with killed processes, and under mixed load for a long time."""
