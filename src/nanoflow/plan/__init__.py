"""The pipeline plan: the narrow waist between auto-search, which writes it, and the executor, which reads it."""
