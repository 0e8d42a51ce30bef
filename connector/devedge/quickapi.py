"""The service that hands out quick tunnels, for the dev edge: POST /tunnel.

Owns: one plain HTTP listener, and the tunnels that were handed out. In: requests of connectors. Out: credentials.
Never: forgets a tunnel while the edge runs, or remembers one afterwards; listens where nobody asked it to.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import uuid
from collections.abc import Callable
from typing import Any

import h11

from connector.devedge.tunnels import Tunnel

MAX_QUICK_TUNNELS = 1000
"""Tunnels handed out by one edge: each costs a name in its certificate."""

REQUEST_SECONDS = 10.0

DOMAIN = "trycloudflare.localhost"
"""Below localhost, so that browsers and curl find it by themselves."""

_WORDS = [
    "amber",
    "apple",
    "arrow",
    "autumn",
    "basil",
    "birch",
    "bright",
    "brook",
    "cedar",
    "cloud",
    "clover",
    "coral",
    "cosmic",
    "crisp",
    "dawn",
    "delta",
    "drift",
    "ember",
    "fern",
    "field",
    "flint",
    "forest",
    "frost",
    "garden",
    "gentle",
    "golden",
    "harbor",
    "hazel",
    "indigo",
    "island",
    "ivory",
    "jade",
    "juniper",
    "kind",
    "lake",
    "lemon",
    "lilac",
    "linen",
    "lively",
    "lunar",
    "maple",
    "meadow",
    "mellow",
    "mint",
    "misty",
    "north",
    "ocean",
    "olive",
    "opal",
    "orchid",
    "pearl",
    "pine",
    "plain",
    "quartz",
    "quiet",
    "rapid",
    "raven",
    "river",
    "rose",
    "sage",
    "silver",
    "slate",
    "snow",
    "solar",
    "spring",
    "stone",
    "summer",
    "swift",
    "tidal",
    "tulip",
    "velvet",
    "violet",
    "willow",
    "wind",
]


def new_quick_tunnel() -> Tunnel:
    """Make a tunnel with a name of four words. It is locally managed: the connector brings the rule."""
    name = "-".join(secrets.choice(_WORDS) for _ in range(4))
    tunnel = Tunnel(f"quick-{name}", uuid.uuid4(), secrets.token_hex(16), secrets.token_bytes(32))
    tunnel.hostnames = [f"{name}.{DOMAIN}"]
    return tunnel


class QuickApi:
    """One per edge. `accept` is asyncio's client callback; `on_tunnel` puts a new tunnel in force."""

    def __init__(self, on_tunnel: Callable[[Tunnel], None]) -> None:
        self._on_tunnel = on_tunnel
        self._made = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                connection = h11.Connection(h11.SERVER)
                event: Any = h11.NEED_DATA
                while event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(65536))
                    event = connection.next_event()
                status, body = self._answer(event)
                data = json.dumps(body).encode()
                headers = [
                    ("Content-Type", "application/json"), ("Content-Length", str(len(data))), ("Connection", "close"),
                ]  # fmt: skip
                writer.write(connection.send(h11.Response(status_code=status, headers=headers)) or b"")
                writer.write(connection.send(h11.Data(data=data)) or b"")
                writer.write(connection.send(h11.EndOfMessage()) or b"")
                await writer.drain()
        except (OSError, TimeoutError, h11.ProtocolError):
            pass
        finally:
            writer.close()

    def _answer(self, event: Any) -> tuple[int, dict[str, Any]]:
        if not isinstance(event, h11.Request) or event.target.partition(b"?")[0] != b"/tunnel":
            return 404, _failure(1000, "there is nothing but POST /tunnel")
        if event.method != b"POST":
            return 405, _failure(1001, "only POST")
        if self._made >= MAX_QUICK_TUNNELS:
            return 429, _failure(1015, "too many quick tunnels")
        self._made += 1
        tunnel = new_quick_tunnel()
        self._on_tunnel(tunnel)
        result = {
            "id": str(tunnel.id),
            "name": tunnel.name,
            "hostname": tunnel.hostnames[0],
            "account_tag": tunnel.account,
            "secret": base64.b64encode(tunnel.secret).decode(),
        }
        return 200, {"success": True, "result": result, "errors": []}


def _failure(code: int, message: str) -> dict[str, Any]:
    return {"success": False, "result": None, "errors": [{"code": code, "message": message}]}
