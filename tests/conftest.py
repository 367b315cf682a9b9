"""What must hold before any test is imported.

Triton chooses between compiling and interpreting while it is imported. Tests press Ctrl-C, in this process and in those
that they start, which ignore it if the shell had this one ignore it, as it does in the background.
"""

from __future__ import annotations

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
