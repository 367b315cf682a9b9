"""Classes with vLLM's names and interfaces: engine arguments, and engines that are driven step by step.

They only adapt nanoflow's own classes. `compat/imports.py` lists the names.
"""
