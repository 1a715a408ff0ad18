"""These tests run where an environment with SimpleTuner is named by SIMPLETUNER_PYTHON; `make test-simpletuner` makes one."""

import os

collect_ignore_glob = [] if os.environ.get("SIMPLETUNER_PYTHON") else ["test_*.py"]
