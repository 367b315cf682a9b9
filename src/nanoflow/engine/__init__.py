"""The engine: the loop that computes (`engine.py`), and the front ends that people and servers talk to.

`LLM` runs the loop in the calling thread, `AsyncEngine` in a process of its own.
"""
