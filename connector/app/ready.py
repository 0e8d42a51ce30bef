"""`connector tunnel ready`: is the connector at this metrics address connected?

Owns: one question to /ready. In: a Call. Out: status 0, or 1 and a line on stderr.
Never: waits longer than 15 seconds; loads more than the standard library.
"""

from __future__ import annotations

import sys
from http.client import HTTPConnection, HTTPException

from connector.app.command_table import Call
from connector.app.config import split_address
from connector.errors import ConfigError

LIMIT_SECONDS = 15.0
MAX_BODY = 65536


def ready(call: Call) -> int:
    """Ask /ready."""
    flags = call.flags
    address = flags.text("metrics") if flags.is_set("metrics") else ""
    if not address:
        raise ConfigError("--metrics has to be provided", advice="Give the address the connector was started with.")
    host, port = split_address(address, "--metrics", any_host=True)
    connection = HTTPConnection(host or "localhost", port, timeout=LIMIT_SECONDS)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = answer.read(MAX_BODY).decode("utf-8", "replace")
    except (OSError, HTTPException) as error:
        print(f"http://{address}/ready cannot be asked: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.status == 200:
        return 0
    print(f"http://{address}/ready endpoint returned status code {answer.status}\n{body}", file=sys.stderr)
    return 1
