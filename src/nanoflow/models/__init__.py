"""Models: where they lie, what their config.json says, which graph of operations they are, and their weights.

`locate.py` finds the folder, `config.py` reads it, `registry.py` picks the file that writes the graph (`llama.py`), and
`weights.py` fills the graph's parameters. Only `weights.py` knows torch; nothing here runs code from a model folder.
"""
