"""`python -m nanoflow` is the same as `nanoflow`."""

import sys

from nanoflow.cli.main import main

sys.exit(main())
