"""`python -m nanoflow` is the same as `nanoflow`."""

import sys

from nanoflow_engine import main

sys.exit(main())
