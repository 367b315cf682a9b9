"""The API of vLLM as data: each option, parameter and import, and what it is in nanoflow.

Nothing is accepted and ignored: an entry of vLLM is the same here, has another name, or is refused unless it changes
nothing (`entries.py`). `engine_options.py`, `server_options.py` and `sampling_options.py` list options, `calls.py`
arguments and methods, `imports.py` modules. Python and the command line read the same lists (`config.py`, `request.py`,
`cli/options.py`), as does the page docs/switching-from-vllm.md.
"""
