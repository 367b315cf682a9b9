"""Grammars of structured output: their text, their bounds, and their compiled form."""
