"""What must hold before any test is imported.

Triton chooses between compiling and interpreting while it is imported. Tests press Ctrl-C, in this process and in those
that they start, which ignore it if the shell had this one ignore it, as it does in the background. No example of a
property has a deadline and none is called too slow, for a machine may be busy.
"""

from __future__ import annotations

import os
import signal

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
