"""Access tokens against a local key server: who passes, who does not, and that nobody else reaches the origin."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization

from connector.protocol.ports import ResponseSource
from connector.proxy import access
from connector.proxy.access import Access, issuer_of
from connector.proxy.ingress import AccessSettings
from connector.proxy.reply import AccessError
from tests.proxy.conftest import Runner
from tests.proxy.rig import Rig, rig
from tests.support.access_keys import AUDIENCE, ISSUER, TEAM, KeyServer, key_server, private_key
from tests.support.aio import until
from tests.support.memory_port import MemoryPort
from tests.support.raw_origin import RawOrigin, answering

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
RULE = {"required": True, "teamName": TEAM, "audTag": ["other", AUDIENCE]}
SETTINGS = AccessSettings(True, TEAM, (AUDIENCE,))


def ask(it: Rig, token: bytes | None, **kind: Any) -> MemoryPort:
    headers = [] if token is None else [(b"cf-access-jwt-assertion", token)]
    return it.open(headers=headers, **kind)


@asynccontextmanager
async def guarded(rule: dict[str, Any] = RULE) -> AsyncIterator[tuple[Rig, KeyServer, RawOrigin]]:
    async with (
        key_server("first", "second") as keys,
        RawOrigin(answering(OK)) as origin,
        rig(origin.url, {"access": rule}, access_keys_url=keys.url) as it,
    ):
        yield it, keys, origin


def test_a_good_token_passes_and_is_checked_once(on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, origin):
            token = keys.token()
            for _ in range(3):
                assert await ask(it, token).whole() == b"ok"
            assert await ask(it, keys.token("second", aud=AUDIENCE)).whole() == b"ok"
            assert await ask(it, keys.token("", key=keys.keys["second"])).whole() == b"ok", "no key ID: any key"
            assert keys.asked == ["/cdn-cgi/access/certs"]
            assert len(origin.connections) == 1
            assert not it.failures()

    on_loop(main())


def test_what_comes_while_the_keys_are_fetched_is_not_lost(on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, origin):
            port = it.open("POST", headers=[(b"Cf-Access-Jwt-Assertion", keys.token())], length=10)
            port.send(b"hello")
            assert port.outstanding == 5
            assert it.dispatcher.active == 1
            port.send(b"world")
            port.send_eof()
            assert await port.whole() == b"ok"
            assert bytes(origin.connections[0].received).endswith(b"helloworld")
            assert port.outstanding == 0

    on_loop(main())


def test_without_a_token_it_is_403_and_nobody_asks_for_keys(on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, origin):
            for port in (ask(it, None), ask(it, b""), it.websocket()):
                assert (port.status, port.headers, bytes(port.body), port.ended) == (403, [], b"", True)
                assert port.source is ResponseSource.ORIGIN
            assert it.failures()[0]["error"] == "no access token in request"
            assert it.failures()[0]["cause"] == "access"
            assert not keys.asked
            assert not origin.connections

    on_loop(main())


def _unsigned(claims: dict[str, Any]) -> bytes:
    parts = [json.dumps({"alg": "none", "typ": "JWT", "kid": "first"}), json.dumps(claims)]
    return b".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in parts) + b"."


def bad_tokens(keys: KeyServer) -> dict[str, tuple[bytes, int, str]]:
    now = int(time.time())
    stranger = private_key("stranger")
    public = (
        keys.keys["first"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    good = keys.token()
    head, _, signature = good.split(b".")
    forged = base64.urlsafe_b64encode(json.dumps({"iss": ISSUER, "aud": [AUDIENCE], "exp": now + 9}).encode()).rstrip(
        b"="
    )
    deep = base64.urlsafe_b64encode(b"[" * 9000).rstrip(b"=")
    confused = jwt.encode(
        {"iss": ISSUER, "aud": [AUDIENCE], "exp": now + 9}, "x" * 64, "HS256", {"kid": "first"}
    ).encode()
    return {
        "expired": (keys.token(exp=now - 2), 502, "expired"),
        "no expiry": (keys.token(exp=None), 502, "expiry"),
        "expiry is text": (keys.token(exp="soon"), 502, ""),
        "too early": (keys.token(nbf=now + 400), 502, "not valid before"),
        "wrong audience": (keys.token(aud=["nobody"]), 403, "Invalid token in jwt"),
        "no audience": (keys.token(aud=None), 403, "Invalid token in jwt"),
        "wrong issuer": (keys.token(iss="https://team.cloudflareaccess.com.evil.example"), 502, "issued by"),
        "alg none": (_unsigned({"iss": ISSUER, "aud": [AUDIENCE], "exp": now + 9}), 502, "'none'"),
        "alg HS256": (confused, 502, "HS256"),
        "alg RS512": (keys.token(algorithm="RS512"), 502, "RS512"),
        "wrong key": (keys.token(key=stranger), 502, "not genuine"),
        "claims changed": (b".".join((head, forged, signature)), 502, "not genuine"),
        "signature cut": (good[:-20], 502, ""),
        "oversized": (keys.token(padding="x" * 20_000), 502, "larger than 16 KiB"),
        "garbage": (b"a.b.c", 502, "malformed"),
        "not a token": (b"\xff\xfe\x00garbage", 502, "malformed"),
        "deep": (deep + b".e30.x", 502, "malformed"),
        "public key as secret": (_hmac_with(public, now), 502, "HS256"),
    }


def _hmac_with(secret: bytes, now: int) -> bytes:
    import hashlib
    import hmac

    parts = [
        json.dumps({"alg": "HS256", "kid": "first"}),
        json.dumps({"iss": ISSUER, "aud": [AUDIENCE], "exp": now + 9}),
    ]
    signed = b".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in parts)
    mac = hmac.new(secret, signed, hashlib.sha256).digest()
    return signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")


def test_bad_tokens_reach_nobody(on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, origin):
            for warm in (False, True):
                for name, (token, status, words) in bad_tokens(keys).items():
                    port = ask(it, token)
                    assert await port.head() == status, name
                    assert (port.headers, bytes(port.body)) == ([], b"")
                    failure = it.failures()[-1]
                    assert words in failure["error"], (name, warm, failure)
                    assert failure["cause"] == "access"
                    assert token.decode("latin-1") not in str(it.events), "a token never reaches the log"
            assert not origin.connections
            assert len(keys.asked) == 1
            assert it.dispatcher.active == 0

    on_loop(main())


def test_clock_skew(on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, _origin):
            soon = int(time.time()) + 200
            assert await ask(it, keys.token(nbf=soon, iat=soon)).whole() == b"ok"

    on_loop(main())


def test_a_remembered_token_still_expires_and_needs_its_audience(on_loop: Runner) -> None:
    async def main() -> None:
        async with key_server("first") as keys:
            now = time.time()
            guard = Access(asyncio.get_running_loop(), keys_url=keys.url, clock=lambda: now)
            token = keys.token(exp=int(now) + 100)
            team = guard.check(SETTINGS, token)
            assert team is not None
            done = asyncio.Event()
            team.refresh(asyncio.get_running_loop(), done.set)
            await done.wait()
            guard.check_again(SETTINGS, token)
            assert guard.check(SETTINGS, token) is None
            with pytest.raises(Exception, match="Invalid token"):
                guard.check(AccessSettings(True, TEAM, ("another",)), token)
            with pytest.raises(Exception, match="Invalid token"):
                guard.check(AccessSettings(True, TEAM, ()), token)
            now += 101
            with pytest.raises(AccessError, match="expired"):
                guard.check(SETTINGS, token)
            await guard.close()

    on_loop(main())


def test_an_unknown_key_makes_it_ask_again_but_not_often(on_loop: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, _origin):
            assert await ask(it, keys.token()).whole() == b"ok"
            keys.keys["third"] = private_key("third")
            for _ in range(20):
                assert await ask(it, keys.token("third")).head() == 502, "asked a moment ago"
            assert len(keys.asked) == 1
            team = it.dispatcher._access.team(SETTINGS)
            team._next_fetch = 0.0
            together = [ask(it, keys.token("third", sub=str(n))) for n in range(20)]
            for port in together:
                assert await port.whole() == b"ok"
            assert len(keys.asked) == 2, "one fetch for all that wait"
            for n in range(20):
                assert await ask(it, keys.token(f"invented{n}", key=keys.keys["first"])).head() == 502
            assert len(keys.asked) == 2

    on_loop(main())


def test_keys_age_as_their_server_says(on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, _origin):
            keys.cache_control = "public, max-age=7200"
            assert await ask(it, keys.token()).whole() == b"ok"
            loop = asyncio.get_running_loop()
            team = it.dispatcher._access.team(SETTINGS)
            assert 7100 < team._fresh_until - loop.time() < 7201
            team._fresh_until = team._next_fetch = loop.time() - 1
            assert await ask(it, keys.token(sub="new")).whole() == b"ok"
            assert len(keys.asked) == 2
            # Now the server is away: old keys go on for a while, then nobody passes.
            keys.answer = web.Response(status=500)
            team._fresh_until = team._next_fetch = loop.time() - 1
            assert await ask(it, keys.token(sub="newer")).whole() == b"ok"
            assert len(keys.asked) == 3
            team._fresh_until = loop.time() - access.KEYS_STALE - 1
            assert await ask(it, keys.token(sub="newest")).head() == 502
            assert "the key server answered 500" in it.failures()[-1]["error"]

    on_loop(main())
    assert [access._age(text) for text in ("", "max-age=1", "max-age=99999999", "no-store")] == [3600, 60, 86_400, 3600]


@pytest.mark.parametrize(
    "body", ["no json", "[]", '{"keys": 5}', '{"keys": [{"kty": "EC"}, {"kty": "RSA", "n": 1}]}', "x" * 300_000]
)
def test_key_servers_that_answer_something_else(body: str, on_loop: Runner) -> None:
    async def main() -> None:
        async with guarded() as (it, keys, origin):
            keys.answer = web.Response(text=body)
            assert await ask(it, keys.token()).head() == 502
            assert it.failures()[-1]["cause"] == "access"
            assert not origin.connections

    on_loop(main())


def test_a_key_server_that_is_away_or_silent(on_loop: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "FETCH_SECONDS", 0.1)

    async def main() -> None:
        async with (
            key_server("first") as keys,
            RawOrigin(answering(OK)) as origin,
            rig(origin.url, {"access": RULE}, access_keys_url="http://127.0.0.1:1") as it,
        ):
            assert await ask(it, keys.token()).head() == 502
            assert not origin.connections

        async def silent(_url: str) -> tuple[bytes, str]:
            await asyncio.Event().wait()
            return b"", ""

        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"access": RULE}) as it:
            it.dispatcher._access._fetch = silent
            assert await ask(it, keys.token()).head() == 502
            assert "within 0.1 s" in it.failures()[-1]["error"]

    on_loop(main())


def test_eyeballs_that_leave_and_a_dispatcher_that_closes_while_keys_are_fetched(on_loop: Runner) -> None:
    async def silent(_url: str) -> tuple[bytes, str]:
        await asyncio.Event().wait()
        return b"", ""

    async def main() -> None:
        keys = KeyServer("first")
        async with RawOrigin(answering(OK)) as origin, rig(origin.url, {"access": RULE}) as it:
            it.dispatcher._access._fetch = silent
            gone, stays = ask(it, keys.token()), ask(it, keys.token())
            gone.peer_reset()
            assert it.dispatcher.active == 1
            assert it.events[-1][0] == "finished"
            await it.dispatcher.close()
            assert stays.status == 502
            assert it.dispatcher.active == 0
            assert not origin.connections

    on_loop(main())


def test_teams(on_loop: Runner) -> None:
    async def main() -> None:
        guard = Access(asyncio.get_running_loop())
        assert guard.team(SETTINGS).url == "https://team.cloudflareaccess.com/cdn-cgi/access/certs"
        fed = AccessSettings(True, TEAM, (), "fed")
        assert guard.team(fed).url == "https://team.fed.cloudflareaccess.com/cdn-cgi/access/certs"
        assert issuer_of(fed) == "https://team.fed.cloudflareaccess.com"
        for name in ("", "a.b", "a/b", "-", "x" * 80):
            with pytest.raises(AccessError, match="team"):
                guard.check(AccessSettings(True, name, ("x",)), b"token")
        await guard.close()

    on_loop(main())


def test_only_the_rules_own_access_is_enforced(on_loop: Runner) -> None:
    from connector.proxy.ingress import parse_remote_config

    async def main() -> None:
        config = {"originRequest": {"access": RULE}, "ingress": [{"service": "http_status:204"}]}
        it = Rig(parse_remote_config(1, config))
        assert ask(it, None).status == 204
        it.dispatcher.set_ingress(
            parse_remote_config(2, {"ingress": [{"service": "http_status:204", "originRequest": {"access": RULE}}]})
        )
        assert ask(it, None).status == 403
        await it.dispatcher.close()
        await until(lambda: it.dispatcher.active == 0)

    on_loop(main())
