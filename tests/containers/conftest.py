"""These tests need the engine that `make test-containers` starts; plain `make test` does not collect them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("CONTAINER_ENGINE") else ["test_*.py"]
