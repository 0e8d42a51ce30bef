"""The system's name look-up, without the loop's thread pool: nobody waits for a resolver that does not answer.

Owns: one daemon thread per name that is looked up. In: host and port. Out: getaddrinfo's answers, or its error.
Never: holds the end of the process up. The loops' own `getaddrinfo` does: it runs in a pool whose threads are joined
before the process may end, which takes 10 s and more where a resolver is silent.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

Answers = list[tuple[Any, Any, int, str, Any]]


async def look_up(host: str, port: int | None, *, kind: socket.SocketKind = socket.SOCK_STREAM) -> Answers:
    """Return what getaddrinfo says. Errors: socket.gaierror, UnicodeError. May be cancelled at any time."""
    try:
        return socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)  # an address: no question
    except socket.gaierror:
        pass
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Answers] = loop.create_future()

    def deliver(act: Callable[[], None]) -> None:
        try:
            loop.call_soon_threadsafe(lambda: None if answered.done() else act())
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=kind)
        except (OSError, UnicodeError) as error:
            failure = error
            deliver(lambda: answered.set_exception(failure))
        else:
            deliver(lambda: answered.set_result(answers))

    threading.Thread(target=ask, name=f"look up {host}", daemon=True).start()
    return await answered
