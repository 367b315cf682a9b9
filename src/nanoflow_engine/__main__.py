"""`python -m nanoflow_engine` is the same as `nanoflow`, whatever else is installed under that name."""

import sys

from nanoflow_engine import main

sys.exit(main())
