"""Cloudflare Access: whether a request's token lets it pass, before anything reaches the origin.

Owns: the keys of each team, fetched when first needed; the checks of a token; what was verified lately.
In: a rule's `access`, a request. Out: None (passes), or AccessDeniedError (403), AccessError (502).
Never: lets a request pass because something could not be had.

*Strategy*: with the keys at hand a token is checked at once, and one that was verified before costs a hash and two
comparisons. Only a fetch of keys takes time: one task per team, whoever needs it waits for the same one. A key that
nobody knows makes it fetch again, but not more often than KEYS_AGAIN, so that invented tokens cannot make this side
hammer the key server.

The order of checks and what they answer is cloudflared's: no token 403; bad signature, issuer or time 502; no fitting
audience 403.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from connector.protocol.ports import Buffer, Request, StreamPort, StreamSink
from connector.proxy.builtin import IGNORE
from connector.proxy.ingress import AccessSettings
from connector.proxy.reply import AccessDeniedError, AccessError

TOKEN_HEADER: Final = b"cf-access-jwt-assertion"
ALGORITHM: Final = "RS256"

MAX_TOKEN: Final = 16 * 1024
"""Bytes of a token. Access issues about 1 KiB, with many groups 4 KiB; whole request heads are 32 KiB at nginx."""

MAX_KEYS_SIZE: Final = 256 * 1024
MAX_KEYS: Final = 64
"""Bytes and keys of a key set. Access publishes two keys, 4 KiB."""

FETCH_SECONDS: Final = 10.0
"""Limit of one fetch, all of it. The request that waits for it gets 502 then."""

KEYS_AGAIN: Final = 10.0
"""Seconds at least between two fetches because of an unknown key."""

KEYS_RETRY: Final = 1.0
"""Seconds at least between two fetches while there are no keys at all."""

KEYS_AGE: Final = (60.0, 3600.0, 86_400.0)
"""Seconds that keys are good for: least, where the server says nothing, most."""

KEYS_STALE: Final = 3600.0
"""Seconds that keys are used beyond their age when they cannot be fetched anew: an outage of the key server shall not
be one of every service; Access announces a new key weeks before it is used."""

NOT_BEFORE_SKEW: Final = 300.0
"""Seconds that this machine's clock may be behind `nbf`. Precedent: cloudflared (go-oidc) 5 min, and none for `exp`."""

VERIFIED: Final = 1024
"""Tokens remembered as verified (a hash and a few numbers each): a browser sends its own with every request."""

FORGET_AFTER: Final = 300.0
"""Seconds after which a remembered token is verified anew, so that a key that was withdrawn is noticed."""

_CLOCK: Final = "check this machine's clock"
_TEAM = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})")

Fetch = Callable[[str], Awaitable[tuple[bytes, str]]]
"""Gets a URL; returns the body and Cache-Control. Errors: any."""


async def fetch_keys(url: str) -> tuple[bytes, str]:
    """Get a key set over HTTP(S). Errors: OSError, aiohttp's, ValueError for an answer that is none."""
    import aiohttp  # noqa: PLC0415  (slow to import; only rules with Access need it)

    timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
        session.get(url, max_redirects=3) as response,
    ):
        if response.status != 200:
            raise ValueError(f"the key server answered {response.status}")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_KEYS_SIZE:
                raise ValueError(f"the key server's answer is larger than {MAX_KEYS_SIZE // 1024} KiB")
        return bytes(body), response.headers.get("Cache-Control", "")


class TeamKeys:
    """The public keys of one team. `find` is at once; `refresh` makes sure that a fetch runs and says when it ended."""

    def __init__(self, url: str, fetch: Fetch) -> None:
        self.url = url
        self.fetches = 0
        self._fetch = fetch
        self._keys: list[tuple[str, Any]] = []
        self._fresh_until = float("-inf")
        self._next_fetch = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._waiting: list[Callable[[], None]] = []
        self.problem = ""
        """Why the last fetch failed."""

    def find(self, kid: str | None, now: float) -> list[Any]:
        """Return the keys that may have made a signature, of keys that are still good."""
        if now >= self._fresh_until + (KEYS_STALE if self.problem else 0.0):
            return []
        return [key for name, key in self._keys if kid is None or name == kid]

    def may_refresh(self, now: float) -> bool:
        """Return whether a fetch runs or may begin."""
        return self._task is not None or now >= self._next_fetch

    def stale(self, now: float) -> bool:
        """Return whether it is time for a new fetch by age."""
        return now >= self._fresh_until

    def refresh(self, loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
        """Call `then` when the fetch that runs, or that begins now, has ended."""
        self._waiting.append(then)
        if self._task is None:
            self._task = loop.create_task(self._refresh(loop), name=f"fetch the Access keys of {self.url}")

    def forget(self, then: Callable[[], None]) -> None:
        """Call it no more."""
        if then in self._waiting:
            self._waiting.remove(then)

    async def close(self) -> None:
        """End a fetch."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _refresh(self, loop: asyncio.AbstractEventLoop) -> None:
        self.fetches += 1
        try:
            # Both take a tenth of a second to import, once.
            await loop.run_in_executor(None, importlib.import_module, "aiohttp")
            await loop.run_in_executor(None, importlib.import_module, "jwt")
            async with asyncio.timeout(FETCH_SECONDS):
                body, cache_control = await self._fetch(self.url)
            keys = _read_keys(body)
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            self.problem = f"no answer within {FETCH_SECONDS:g} s"
        except Exception as error:  # of the network, TLS, HTTP or JSON: nobody passes, whatever it was
            self.problem = str(error) or type(error).__name__
        else:
            self.problem = ""
            self._keys = keys
            self._fresh_until = loop.time() + _age(cache_control)
        finally:
            self._task = None
            self._next_fetch = loop.time() + (KEYS_AGAIN if self._keys else KEYS_RETRY)
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()


def _age(cache_control: str) -> float:
    least, usual, most = KEYS_AGE
    found = _MAX_AGE.search(cache_control.lower())
    return min(max(float(found[1]), least), most) if found else usual


def _read_keys(body: bytes) -> list[tuple[str, Any]]:
    """Return the RSA signing keys of a key set. Errors: ValueError when there is none."""
    import jwt  # noqa: PLC0415

    document = json.loads(body)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("the key server's answer is no key set")
    keys = []
    for entry in entries[:MAX_KEYS]:
        if not isinstance(entry, dict) or entry.get("kty") != "RSA" or entry.get("use", "sig") != "sig":
            continue
        try:
            keys.append((str(entry.get("kid", "")), jwt.PyJWK(entry, ALGORITHM).key))
        except (jwt.PyJWTError, ValueError, TypeError):
            continue
    if not keys:
        raise ValueError("the key server's answer holds no RSA key")
    return keys


class Access:
    """All teams of one process. `keys_url` replaces `https://TEAM.cloudflareaccess.com` for fetching keys (tests)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        keys_url: str = "",
        fetch: Fetch = fetch_keys,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._loop = loop
        self._keys_url = keys_url.rstrip("/")
        self._fetch = fetch
        self._clock = clock
        self._teams: dict[tuple[str, str], TeamKeys] = {}
        self._verified: dict[bytes, tuple[float, dict[str, Any]]] = {}

    def team(self, settings: AccessSettings) -> TeamKeys:
        """Return the keys of a rule's team. Errors: AccessError for what cannot be a team's name."""
        name = (settings.team_name, settings.environment)
        team = self._teams.get(name)
        if team is None:
            if not _TEAM.fullmatch(settings.team_name):
                raise AccessError(
                    f"{settings.team_name!r} is not the name of an Access team",
                    advice="set access.teamName of the rule to NAME of NAME.cloudflareaccess.com",
                )
            base = self._keys_url or issuer_of(settings)
            team = self._teams[name] = TeamKeys(f"{base}/cdn-cgi/access/certs", self._fetch)
        return team

    def check(self, settings: AccessSettings, token: bytes) -> TeamKeys | None:
        """Let a token pass, or return the keys that must be fetched first: refresh, then `check` with `final`."""
        return self._check(settings, token, final=False)

    def check_again(self, settings: AccessSettings, token: bytes) -> None:
        """Let a token pass after a fetch. Errors: AccessDeniedError, AccessError."""
        self._check(settings, token, final=True)

    async def close(self) -> None:
        """End all fetches."""
        for team in self._teams.values():
            await team.close()

    def _check(self, settings: AccessSettings, token: bytes, *, final: bool) -> TeamKeys | None:
        if not token:
            raise AccessDeniedError(
                "no access token in request",
                advice="the hostname needs an Access application, which puts the token into each request",
            )
        if len(token) > MAX_TOKEN:
            raise AccessError(f"the Access token is larger than {MAX_TOKEN // 1024} KiB")
        now = self._loop.time()
        team = self.team(settings)
        digest = hashlib.sha256(issuer_of(settings).encode() + b"\0" + token).digest()
        known = self._verified.get(digest)
        if known is not None and now < known[0]:
            self._check_claims(settings, known[1])
            return None
        if not team.fetches:
            return team  # also what reads tokens is not imported yet
        kid = _kid_of(token)
        keys = team.find(kid, now)
        if (not keys or team.stale(now)) and not final and team.may_refresh(now):
            return team
        if not keys:
            detail = f": {team.problem}" if team.problem else ""
            raise AccessError(
                f"no key of {team.url} made the Access token (key ID {kid!r}){detail}",
                advice="check access.teamName of the rule, and that this machine reaches the key server",
            )
        claims = _verify(token, keys)
        self._check_claims(settings, claims)
        while len(self._verified) >= VERIFIED:
            del self._verified[next(iter(self._verified))]
        self._verified[digest] = (now + FORGET_AFTER, claims)
        return None

    def _check_claims(self, settings: AccessSettings, claims: dict[str, Any]) -> None:
        issuer = issuer_of(settings)
        if claims.get("iss") != issuer:
            raise AccessError(f"the Access token was issued by {_shown(claims.get('iss'))}, not by {issuer}")
        now = self._clock()
        expires, begins = _number(claims.get("exp")), _number(claims.get("nbf", 0))
        if expires is None or begins is None:
            raise AccessError("the Access token has no readable time of expiry")
        if now > expires:
            raise AccessError(f"the Access token expired {now - expires:.0f} s ago", advice=_CLOCK)
        if begins > now + NOT_BEFORE_SKEW:
            raise AccessError(f"the Access token is not valid before {begins - now:.0f} s from now", advice=_CLOCK)
        audience = claims.get("aud")
        listed = [audience] if isinstance(audience, str) else audience if isinstance(audience, list) else []
        if not set(settings.audience) & {entry for entry in listed if isinstance(entry, str)}:
            raise AccessDeniedError(
                f"Invalid token in jwt: {_shown(listed)}",
                advice="the token is for another application: compare access.audTag of the rule with the Audience tag "
                "of the Access application",
            )


def issuer_of(settings: AccessSettings) -> str:
    """Return who must have issued a rule's tokens; also where the keys are."""
    zone = "fed.cloudflareaccess.com" if settings.environment == "fed" else "cloudflareaccess.com"
    return f"https://{settings.team_name}.{zone}"


def token_of(request: Request) -> bytes:
    """Return a request's token; empty when it has none."""
    return next((value for name, value in request.headers if name.lower() == TOKEN_HEADER), b"")


def _kid_of(token: bytes) -> str | None:
    """Return the key ID that a token names. Errors: AccessError for what is no token, or not signed as demanded."""
    import jwt  # noqa: PLC0415

    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise AccessError(f"the Access token is malformed: {error}") from None
    if header.get("alg") != ALGORITHM:
        raise AccessError(f"the Access token is signed with {_shown(header.get('alg'))}; only {ALGORITHM} is accepted")
    kid = header.get("kid")
    return kid if isinstance(kid, str) and kid else None


def _verify(token: bytes, keys: list[Any]) -> dict[str, Any]:
    """Return the claims of a token that one of `keys` signed. Errors: AccessError."""
    import jwt  # noqa: PLC0415

    problem: Exception | None = None
    for key in keys:
        try:
            payload = jwt.PyJWS().decode(token, key, algorithms=[ALGORITHM])
            claims = json.loads(payload)
        except (jwt.PyJWTError, ValueError) as error:
            problem = error
            continue
        if not isinstance(claims, dict):
            raise AccessError("the Access token holds no claims")
        return claims
    raise AccessError(f"the Access token is not genuine: {problem}")


def _number(value: object) -> float | None:
    """Return a time of a token; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1 << 53:
        return None
    return value


def _shown(value: object) -> str:
    return repr(value)[:200]


class AccessGate:
    """A stream that waits for keys: keeps, unacknowledged, what the edge sends. Afterwards it passes every call on."""

    __slots__ = ("_inner", "_pending", "_then", "ended", "gone", "paused", "port", "request", "team")

    def __init__(self, request: Request, port: StreamPort, team: TeamKeys, then: Callable[[AccessGate], None]) -> None:
        self.request = request
        self.port = port
        self.team = team
        self._then = then
        self.gone = False
        """Whether the eyeball went away while it waited."""
        self.ended = False
        self.paused = False
        self._inner: StreamSink | None = None
        self._pending: list[bytes] = []

    def decided(self) -> None:
        """The fetch has ended (TeamKeys)."""
        self._then(self)

    def open(self, inner: StreamSink) -> None:
        """Let the stream be served by `inner`, which gets what came meanwhile."""
        self._inner = inner
        if inner is IGNORE:
            self._pending = []
            return
        if self.paused:
            inner.pause_writing()
        pending, self._pending = self._pending, []
        for data in pending:
            inner.on_data(data)
        if self.ended:
            inner.on_eof()

    def on_data(self, data: Buffer) -> None:
        """Keep, or pass on."""
        if self._inner is not None:
            self._inner.on_data(data)
        else:
            self._pending.append(bytes(data))

    def on_eof(self) -> None:
        """Remember, or pass on."""
        self.ended = True
        if self._inner is not None:
            self._inner.on_eof()

    def on_reset(self, error: BaseException | None) -> None:
        """Nobody waits any more."""
        self._pending = []
        if self._inner is not None:
            self._inner.on_reset(error)
        else:
            self.gone = True
            self.team.forget(self.decided)
            self._then(self)

    def pause_writing(self) -> None:
        """Remember, or pass on."""
        self.paused = True
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Remember, or pass on."""
        self.paused = False
        if self._inner is not None:
            self._inner.resume_writing()
