"""What client libraries ask of a server: one script a library, which fails if an answer is wrong.

Called as `SCRIPT ROOT_URL KEY`. Each needs its library alone. `tools/clients.py` installs them and runs
all, with a server of their own.
"""
