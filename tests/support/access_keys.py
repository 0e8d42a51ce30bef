"""A team's key server and its tokens, as Cloudflare Access has them, for tests."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa

TEAM = "team"
ISSUER = f"https://{TEAM}.cloudflareaccess.com"
AUDIENCE = "f" * 64


@cache
def private_key(kid: str) -> rsa.RSAPrivateKey:
    """A key of its own for each name; to make one takes long, so a run of tests shares them."""
    return rsa.generate_private_key(65_537, 2048)


class KeyServer:
    """Serves the public halves of `keys` (by key ID) and counts who asks."""

    def __init__(self, *kids: str) -> None:
        self.keys = {kid: private_key(kid) for kid in kids}
        self.asked: list[str] = []
        self.cache_control = ""
        self.answer: web.Response | None = None
        self.url = ""

    def token(self, kid: str = "first", *, key: Any = None, algorithm: str = "RS256", **claims: Any) -> bytes:
        """Sign a token that is good but for what is changed; a claim of None is left out."""
        now = int(time.time())
        payload = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "exp": now + 600,
            "nbf": now,
            "iat": now,
            "sub": "someone",
        } | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        signer = key if key is not None else self.keys.get(kid)
        return jwt.encode(payload, signer, algorithm=algorithm, headers={"kid": kid} if kid else {}).encode()

    def document(self) -> dict[str, Any]:
        return {"keys": [_public(kid, key) for kid, key in self.keys.items()]}

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if self.answer is not None:
            return self.answer
        headers = {"Cache-Control": self.cache_control} if self.cache_control else {}
        return web.Response(text=json.dumps(self.document()), headers=headers, content_type="application/json")


def _public(kid: str, key: rsa.RSAPrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()

    def text(number: int) -> str:
        return base64.urlsafe_b64encode(number.to_bytes((number.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()

    return {"kid": kid, "kty": "RSA", "alg": "RS256", "use": "sig", "n": text(numbers.n), "e": text(numbers.e)}


@asynccontextmanager
async def key_server(*kids: str) -> AsyncIterator[KeyServer]:
    server = KeyServer(*kids)
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
