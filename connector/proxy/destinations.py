"""Plain TCP connections to addresses that a rule or a request names.

Owns: one OriginPool per destination while flows use it.
In: an OriginUser, host and port. Out: a connection or an error.
Never: reuses a connection: TCP has no requests.
"""

from __future__ import annotations

import asyncio

from connector.proxy.ingress import OriginSettings, Service, ServiceKind
from connector.proxy.origins import OriginPool, OriginUser


class Destinations:
    """All destinations of one process. Bounded by the flows that are open."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pools: dict[tuple[str, int, OriginSettings], tuple[OriginPool, set[OriginUser]]] = {}
        self._left: list[OriginPool] = []

    @property
    def pools(self) -> list[OriginPool]:
        """What may still have connections or dials."""
        self._left = [pool for pool in self._left if pool.open or pool.dialling]
        return [*(pool for pool, _ in self._pools.values()), *self._left]

    def dial(self, user: OriginUser, host: str, port: int, settings: OriginSettings) -> None:
        """Connect; `on_connected` or `on_dial_failed` follows, maybe at once. Leave with `leave`, whatever came."""
        key = (host, port, settings)
        entry = self._pools.get(key)
        if entry is None:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            service = Service(ServiceKind.TCP, f"tcp://{where}", host, port, scheme="tcp")
            pool = OriginPool(self._loop, service, settings)
            pool.close()  # keeps nothing
            entry = self._pools[key] = (pool, set())
        pool, users = entry
        users.add(user)
        connection = pool.acquire(user, fresh=True)
        if connection is not None:
            user.on_connected(connection)

    def leave(self, user: OriginUser, host: str, port: int, settings: OriginSettings) -> None:
        """Forget a user that dialled; a dial that runs is cancelled."""
        key = (host, port, settings)
        entry = self._pools.get(key)
        if entry is None or user not in entry[1]:
            return
        pool, users = entry
        pool.cancel(user)
        users.discard(user)
        if not users:
            del self._pools[key]
            self._left = [each for each in self._left if each.open or each.dialling]
            self._left.append(pool)
