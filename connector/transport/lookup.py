"""Addresses of a name, from the system's resolver.

Owns: the question. In: host and port. Out: getaddrinfo's answers, or its error.
Never: holds the end of the process up: a silent resolver waits for ten seconds and more (see daemon_thread.py).
"""

from __future__ import annotations

import socket
from typing import Any

from connector.transport.daemon_thread import in_daemon_thread

Answers = list[tuple[Any, Any, int, str, Any]]


async def look_up(host: str, port: int | None, *, kind: socket.SocketKind = socket.SOCK_STREAM) -> Answers:
    """Return what getaddrinfo says. Errors: socket.gaierror, UnicodeError. May be cancelled at any time."""
    name = host.encode() if host.isascii() else host  # text would load the codec for international names each time
    try:
        return socket.getaddrinfo(name, port, type=kind, flags=socket.AI_NUMERICHOST)  # an address: no question
    except socket.gaierror:
        pass
    return await in_daemon_thread(lambda: list(socket.getaddrinfo(name, port, type=kind)), f"look up {host}")
