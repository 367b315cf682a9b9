"""Models: where they lie, what their config.json says, which graph of operations they are, and their weights.

`locate.py` finds the folder, `fields.py` reads JSON with suspicion, `readings.py` says which fields an architecture
has, `config.py` what they mean, `generation.py` how the model is sampled by default. `registry.py` picks the file that
writes the graph (`llama.py`), `checkpoint.py` looks for its tensors, and `weights.py` fills the graph's parameters.
Only `weights.py` knows torch; nothing here runs code from a model folder.
"""
