"""Thin names under which users of vLLM know what there is: engine arguments, and engines that are driven step by step.

Nothing is done here that is not done elsewhere. Which names there are, and what is said of those that there are not, is
data in `compat/imports.py`.
"""
