"""`python -m tests.support.run_with_dns PORT ARG...`: the connector, whose system resolver is 127.0.0.1:PORT.

A process of its own, as users start it; only where questions are sent is replaced. Nothing leaves the machine: the
encrypted ways are left out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from connector.app.cli import main
from connector.transport import discovery, resolvers


def _run() -> int:
    nameservers = [("127.0.0.1", int(sys.argv[1]))]
    resolver = resolvers.SystemResolver(nameservers=nameservers, limit=10)
    saved = Path(os.environ["SAVED_ADDRESSES"]) if "SAVED_ADDRESSES" in os.environ else None
    discovery.default_discovery = lambda region="": discovery.Discovery(region=region, system=resolver, saved=saved)
    resolvers.SystemResolver = lambda: resolver  # type: ignore[misc, assignment]  # asked for the edge's two TXT records
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(_run())
