"""What users of vLLM know, as data: each option, parameter and import, and what it is here.

Three answers are possible, and nothing is accepted and ignored. `entries.py` says what an answer is,
`engine_options.py`, `server_options.py` and `sampling_options.py` list options, `imports.py` lists modules and methods.
Python and the command line read the same lists (`config.py`, `request.py`, `cli/options.py`), and so does the page
docs/switching-from-vllm.md.
This package knows no configuration class and no engine.
"""
