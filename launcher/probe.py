"""A check of the broker from where the connector stands: `python -m launcher.probe` inside its container.

Owns: reading one request from standard input, one line of JSON as the answer.
In: {"host", "port", "ws", "proxied", "user", "password"} as one line. Out: {"ms": 3.1} or {"error": "..."}; status 0.
Never: takes a password from its command line.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    """Entry point."""
    from launcher import selfcheck  # noqa: PLC0415 - paho, after the input is known to be good
    from launcher.accounts import CHECK_TOPIC  # noqa: PLC0415
    from launcher.credentials import User  # noqa: PLC0415
    from launcher.errors import HopError  # noqa: PLC0415

    try:
        request = json.loads(sys.stdin.readline())
        target = selfcheck.Target(
            str(request["host"]),
            int(request["port"]),
            "/mqtt" if request["ws"] else None,
            proxied=bool(request.get("proxied")),
        )
        user = User(str(request["user"]), str(request["password"]), ())
    except (ValueError, KeyError, TypeError) as error:
        print(json.dumps({"error": f"bad request: {error}"}))
        return 0
    try:
        print(json.dumps({"ms": selfcheck.round_trip(target, user, CHECK_TOPIC)}))
    except (HopError, selfcheck.RefusedError) as error:
        print(json.dumps({"error": f"{target.url}: {error}"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
