"""`python -m local` is `python -m local.up`."""

import sys

from local.up import main

sys.exit(main())
