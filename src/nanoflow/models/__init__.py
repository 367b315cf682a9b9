"""Models: where their files are, what config.json says, their graphs of operations, and their weights.

`locate.py` finds the folder. `fields.py` reads JSON and checks it, `readings.py` lists the fields of each architecture,
`config_json.py` interprets them, and `generation.py` reads default sampling parameters. `registry.py` maps an
architecture to the file that makes its graph (such as `llama.py`), `checkpoint.py` lists stored tensors, and
`weights.py` loads them into the graph's parameters. Only `weights.py` imports torch. No code from a model folder is
ever run.
"""
