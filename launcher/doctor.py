"""`launcher doctor`: every hop from the engine to the public host name, each with what to do when it fails.

Owns: the order of the checks, those that need MQTT or the network, the lines for clients at the end.
In: an engine, settings, a public host name or none. Out: rows of an `Output`; exit status 0 when nothing failed.
Never: changes anything; stops at the first failure (what is behind it is often worth knowing too).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

from launcher import clients, selfcheck
from launcher.accounts import CHECK_TOPIC, HEALTH
from launcher.credentials import User, new_password
from launcher.errors import HopError
from launcher.output import Output
from launcher.stack import BROKER, CONNECTOR, Check, Engine, collect, origin_of
from launcher.stackdir import Settings, StackDir, StackError

PUBLIC_PORT = 443
PATH = "/mqtt"
PUBLIC_ADVICE = {
    selfcheck.WEBSOCKET: "502: the rule's URL is wrong or the broker down; 530 or 1033: no connector is registered; "
    "403: an Access policy or the firewall is in the way",
    selfcheck.CONNECT: "the WebSocket works, the broker's answer does not come through: launcher logs broker",
}


async def examine(
    engine: Engine,
    settings: Settings,
    directory: StackDir,
    output: Output,
    *,
    hostname: str | None,
    cafile: Path | None,
) -> int:
    """All checks; returns the exit status."""
    failed = 0

    def tell(check: Check) -> None:
        nonlocal failed
        failed += check.good is False
        output.check(check)

    for check in await engine.examine():
        tell(check)
    managed = settings.own_config is None
    if managed:
        await _broker(engine, settings, directory, tell)
    else:
        tell(Check(BROKER, None, f"{settings.own_config}: its users are unknown here, so nobody was logged in"))
    state = await collect(engine, settings, str(directory.path))
    _connector(state.ready_connections, state.last_error, tell)
    if state.rule.startswith("none") or not state.rule:
        advice = (
            f"dashboard, tunnel, Public Hostname: service HTTP, URL {origin_of(settings).partition('//')[2]} "
            "(the connector applies it at once)"
        )
        tell(Check("rule", False, state.rule or "the connector has no configuration with rules", advice))
    else:
        tell(Check("rule", True, state.rule))
    public = hostname or next(iter(state.hostnames), None)
    target = f"wss://{public.partition(':')[0]}{PATH}" if public else None
    for check in await engine.connector_doctor(target):
        tell(check)
    if public is None:
        tell(Check("public", None, "no public hostname is known", "launcher doctor --hostname mqtt.example.com"))
    else:
        await _public(public, cafile, directory if managed else None, tell)
    if settings.allow_anonymous:
        tell(Check("access", False, "the broker is open to everyone", "launcher up --no-allow-anonymous"))
    _clients(public or "YOUR-HOSTNAME", settings, directory, output)
    output.facts("doctor", failed=failed)
    output.text("\nEverything works." if not failed else f"\n{failed} failed: the first one first.")
    return 0 if not failed else 1


async def _broker(engine: Engine, settings: Settings, directory: StackDir, tell: Callable[[Check], None]) -> None:
    password = directory.health_password()
    for ws in (False, True):
        name = "websocket" if ws else "mqtt"
        try:
            ms = await engine.broker_check(HEALTH, password, ws, ws and bool(settings.proxied_port))
            tell(Check(name, True, "authenticated CONNECT, QoS 1 message there and back", ms=ms))
        except StackError as error:
            tell(Check(name, False, str(error), error.advice))
            continue
        if settings.allow_anonymous:
            continue
        try:
            await engine.broker_check(HEALTH, new_password(), ws, ws and bool(settings.proxied_port))
            tell(Check(name, False, "a wrong password was let in", "this broker is open: stop it, and report this"))
        except StackError as error:
            refused = any(f"(code {code})" in str(error) for code in selfcheck.REFUSALS)
            tell(Check(name, refused, "a wrong password is refused" if refused else str(error), error.advice))


def _connector(ready: int | None, last_error: str, tell: Callable[[Check], None]) -> None:
    advice = "see: launcher logs connector; `connector doctor` there looks at DNS, UDP and TCP 7844 and the token"
    if ready is None:
        tell(Check(CONNECTOR, False, f"it does not answer{': ' + last_error if last_error else ''}", advice))
    elif not ready:
        why = f": {last_error}" if last_error else ""
        tell(Check(CONNECTOR, False, f"not registered with the edge{why}", advice))
    else:
        tell(Check(CONNECTOR, True, f"registered: {ready} connection{'s' if ready != 1 else ''} to the edge"))
        if last_error:
            tell(Check(CONNECTOR, None, f"its last error: {last_error}", "launcher logs connector"))


async def _public(public: str, cafile: Path | None, directory: StackDir | None, tell: Callable[[Check], None]) -> None:
    host, _, port_text = public.partition(":")
    port = int(port_text) if port_text.isdigit() else PUBLIC_PORT
    begun = time.monotonic()
    try:
        found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        advice = "a public hostname of the tunnel makes the DNS record; it takes a minute"
        tell(Check("public DNS", False, f"{host}: {error.strerror or error}", advice))
        return
    addresses = ", ".join(sorted({str(one[4][0]) for one in found}))
    tell(Check("public DNS", True, f"{host}: {addresses}", ms=(time.monotonic() - begun) * 1000))
    target = selfcheck.Target(host, port, PATH, cafile, secure=True)
    try:
        begun = time.monotonic()
        version = await asyncio.to_thread(selfcheck.check_tls, target)
        tell(Check("public TLS", True, f"{version}, certificate verified", ms=(time.monotonic() - begun) * 1000))
    except HopError as error:
        tell(Check("public TLS", False, error.message, error.advice))
        return
    if directory is None:
        return
    user = User(HEALTH, directory.health_password(), ())
    try:
        ms = await asyncio.to_thread(selfcheck.round_trip, target, user, CHECK_TOPIC)
        tell(Check("public MQTT", True, f"{target.url}: authenticated CONNECT, QoS 1 message there and back", ms=ms))
    except HopError as error:
        advice = PUBLIC_ADVICE.get(error.hop, "launcher logs")
        tell(Check("public MQTT", False, f"{error.hop}: {error.message}", advice))
    except selfcheck.RefusedError as error:
        text = f"the broker behind {target.url} refuses the health user: {error}"
        tell(Check("public MQTT", False, text, "does the tunnel's rule lead to another broker?"))


def _clients(public: str, settings: Settings, directory: StackDir, output: Output) -> None:
    user = "USER"
    try:
        names = [name for name in directory.accounts().hashes if name not in {HEALTH, "admin"}]
        user = names[0] if names else user
    except StackError:
        pass
    url = f"wss://{public}{PATH}" if ":" in public else f"wss://{public}:{PUBLIC_PORT}{PATH}"
    parts = clients.public_snippets(public, user)
    if output.as_json:
        output.facts(
            "clients",
            url=url,
            snippets=[{"title": one.title, "command": one.command, "needs": one.needs} for one in parts],
        )
        return
    output.text(f"\nClients: {url} (always 443: neither 1883 nor 9001 is reachable from outside)")
    output.text("  export MQTT_PASSWORD=...   # the one shown at the first `up`, or: launcher user passwd " + user)
    for one in parts:
        output.text(f"\n# {one.title}" + (f" ({one.needs})" if one.needs else ""))
        output.text(one.command)
