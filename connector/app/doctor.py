"""`connector doctor [URL]`: walk the way of a request, hop by hop, and say where it ends.

Owns: the order of the hops up to the rule, their texts, exit statuses and output. In: a Call. Out: lines or JSON, a
status. Never: keeps a connection; takes requests without serving them.

*Strategy*: each hop is one attempt with a time; the first that fails decides the exit status, and what depends on it is
skipped. The registration is a real one, for a moment: requests that the edge sends meanwhile are served by the real
dispatcher with the configuration that it pushed, and the connection leaves as at a shutdown. The hops behind the rule
are in `doctor_origin.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from connector.app.command_table import Call
from connector.app.config import RunConfig, read_token, run_config
from connector.app.local_config import LocalConfig, configured_flags
from connector.errors import ConfigError, ConnectorError, DiscoveryError, UsageError
from connector.protocol.edge_addresses import EdgeAddress
from connector.transport.link import format_address

HOPS = (
    "dns", "udp", "tcp", "tls", "registration", "configuration", "rule", "origin-dns", "origin-tcp", "origin-tls",
    "http", "websocket", "mqtt",
)  # fmt: skip
"""In the order of the way. The exit status is FIRST_STATUS plus the place of the first hop that fails."""

FIRST_STATUS = 10

PROBE_SECONDS = 8.0
"""Limit of one hop; what works at all works in one or two."""

PUSH_SECONDS = 5.0
"""How long the edge may take to push the configuration after the registration; it does so at once."""

LEAVE_SECONDS = 5.0
"""For unregistering, and for requests that came in between."""

_MEANINGS = {
    "dns": "This machine's DNS does not lead to Cloudflare's edge.",
    "udp": "QUIC cannot be used from here. The tunnel then runs over HTTP/2, without private-network UDP.",
    "tcp": "HTTP/2 cannot be used from here.",
    "tls": "Something between here and the edge answers in its place, or the trust anchors do not fit.",
    "registration": "The edge is there, but does not take this tunnel.",
    "configuration": "Nothing says where requests go: they get 503.",
    "rule": "No rule serves this URL.",
    "origin-dns": "The service's name leads nowhere from here.",
    "origin-tcp": "Nothing takes connections where the rule points.",
    "origin-tls": "The service and this program do not agree on TLS.",
    "http": "The service does not answer as an HTTP server.",
    "websocket": "The service does not take WebSockets here.",
    "mqtt": "The WebSocket stands, but no MQTT broker answers behind it.",
}


class Hop(NamedTuple):
    """What became of one hop: `ok`, `warn`, `fail` or `skip`."""

    name: str
    status: str
    milliseconds: float
    detail: str
    advice: str = ""

    @property
    def exit_status(self) -> int:
        """Of a failure of this hop."""
        return FIRST_STATUS + HOPS.index(self.name)

    def to_json(self) -> dict[str, Any]:
        """Give the values that --json prints."""
        bad = self.status in {"fail", "warn"}
        return {
            "hop": self.name,
            "status": self.status,
            "ms": round(self.milliseconds, 1),
            "detail": self.detail,
            **({"meaning": _MEANINGS[self.name], "advice": self.advice} if bad else {}),
            **({"exit": self.exit_status} if self.status == "fail" else {}),
        }

    def lines(self) -> list[str]:
        """Give the lines for people."""
        mark = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "skip"}[self.status]
        spent = f"{self.milliseconds:7.1f} ms" if self.status != "skip" else " " * 10
        found = [f"{mark}  {self.name:<13}  {spent}  {self.detail}"]
        if self.status in {"fail", "warn"}:
            found.append(f"      {_MEANINGS[self.name]}")
            found += [f"      {line}" for line in self.advice.splitlines()]
        return found


class HopFailedError(Exception):
    """A hop found what is wrong; carries what to do. `partly`: there is a way on all the same."""

    def __init__(self, detail: str, advice: str = "", *, partly: bool = False) -> None:
        super().__init__(detail)
        self.advice = advice
        self.partly = partly


class Walk:
    """The hops that were made. `show` is called with each as it is made."""

    def __init__(self, show: Callable[[Hop], None]) -> None:
        self.hops: list[Hop] = []
        self._show = show

    def add(self, hop: Hop) -> Hop:
        """Take one hop."""
        self.hops.append(hop)
        self._show(hop)
        return hop

    def skip(self, name: str, why: str) -> None:
        """Note a hop that was not made."""
        self.add(Hop(name, "skip", 0.0, why))

    @asynccontextmanager
    async def hop(self, name: str, *, only_warn: bool = False) -> AsyncIterator[list[str]]:
        """Time one hop. The body puts its detail into the list; what it raises is the hop's failure, and ends here.

        Look at `failed` afterwards.
        """
        begin = time.perf_counter()
        detail: list[str] = []
        advice, status = "", "ok"
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                yield detail
        except TimeoutError:
            status, detail = "fail", [f"no answer within {PROBE_SECONDS:g} seconds"]
        except HopFailedError as error:
            status, detail, advice = ("warn" if error.partly else "fail"), [str(error)], error.advice
        except ConnectorError as error:
            status, detail, advice = "fail", [str(error)], error.advice
        except OSError as error:
            status, detail = "fail", [error.strerror or str(error) or type(error).__name__]
        if status == "fail" and only_warn:
            status = "warn"
        spent = (time.perf_counter() - begin) * 1000
        self.add(Hop(name, status, spent, "; ".join(detail), advice))

    def failed(self) -> bool:
        """Whether the last hop failed (or was only warned of)."""
        return bool(self.hops) and self.hops[-1].status in {"fail", "warn"}

    @property
    def exit_status(self) -> int:
        """0, or the status of the first hop that failed."""
        return next((hop.exit_status for hop in self.hops if hop.status == "fail"), 0)


def doctor(call: Call) -> int:
    """Walk, print, and give the exit status."""
    flags, local = configured_flags(call.flags)
    call = call._replace(flags=flags)
    flags.check()
    if len(call.arguments) > 1:
        raise UsageError(f"{call.program} doctor takes one URL", advice="Flags go before it.")
    url = parse_target(call.arguments[0]) if call.arguments else None
    token = read_token(flags)
    registers = True
    try:
        config = run_config(flags, [], token, local)
    except UsageError:
        if token:
            raise
        registers, config = False, _without_token(call, local)
    as_json = bool(flags.value("json"))

    def show(hop: Hop) -> None:
        if not as_json:
            print("\n".join(hop.lines()), flush=True)

    walk = Walk(show)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_walk(walk, config, url, registers=registers))
    status = walk.exit_status
    if as_json:
        print(json.dumps({"exit": status, "hops": [hop.to_json() for hop in walk.hops]}, indent=1))
    return status


def _without_token(call: Call, local: LocalConfig | None) -> RunConfig:
    """Check the flags with a token that is nobody's: the hops up to TLS need none."""
    from connector.wire.token import Token, encode_token  # noqa: PLC0415

    return run_config(call.flags, [], encode_token(Token("", bytes(32), uuid.UUID(int=0))), local)


class Target(NamedTuple):
    """The URL that is asked about, as a visitor would give it."""

    scheme: str
    host: str
    path: str

    @property
    def websocket(self) -> bool:
        """Whether a WebSocket is wanted."""
        return self.scheme in {"ws", "wss"}


def parse_target(text: str) -> Target:
    """Read a URL; without a scheme it is https. Errors: UsageError."""
    from urllib.parse import urlsplit  # noqa: PLC0415

    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        host = parts.hostname or ""
    except ValueError:
        host, parts = "", urlsplit("")
    if not host or parts.scheme not in {"http", "https", "ws", "wss"} or not text.isascii() or not text.isprintable():
        raise UsageError(
            f"doctor: {text[:200]!r} is no URL that a visitor could open",
            advice="Write https://HOST/PATH, or wss://HOST/PATH for a WebSocket and MQTT.",
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, path)


async def _walk(walk: Walk, config: RunConfig, target: Target | None, *, registers: bool) -> None:
    addresses = await _edge_hops(walk, config)
    ingress: Any = None
    if not registers:
        for name in ("registration", "configuration"):
            walk.skip(name, "no token was given")
        ingress = config.own_rules
    elif not addresses:
        for name in ("registration", "configuration"):
            walk.skip(name, "the edge cannot be reached")
    else:
        ingress = await _register(walk, config, addresses)
    if target is None:
        walk.skip("rule", "no URL was given: connector doctor URL goes on from here")
        return
    if ingress is None:
        walk.skip("rule", "no configuration is known")
        return
    from connector.app.doctor_origin import walk_origin  # noqa: PLC0415

    await walk_origin(walk, ingress, target)


async def _edge_hops(walk: Walk, config: RunConfig) -> list[tuple[str, EdgeAddress]]:
    """Make the hops up to TLS; give what can be used, best first: protocol and address."""
    from connector.app.prechecks import probe_quic, probe_tcp, probe_tls  # noqa: PLC0415  (loads dnspython)

    samples: list[Sample] = []
    async with walk.hop("dns") as detail:
        samples, text = await _look_up(config)
        detail.append(text)
    if walk.failed():
        for name in ("udp", "tcp", "tls"):
            walk.skip(name, "no address is known")
        return []
    usable: list[tuple[str, EdgeAddress]] = []
    if config.protocol == "http2" or (config.proxy is not None and config.protocol == "auto"):
        walk.skip("udp", "HTTP/2 was asked for, or a proxy is in force")
    else:
        good = await _edge_hop(
            walk, "udp", "QUIC", samples, lambda it: probe_quic(config, it), config.protocol != "quic"
        )
        usable += [("quic", address) for _, address in good[:1]]
    only_warn = bool(usable)

    async def connects(address: EdgeAddress) -> str:
        (await probe_tcp(config, address)).close()
        return f"through the proxy {config.proxy}" if config.proxy is not None else ""

    async def is_trusted(address: EdgeAddress) -> str:
        return f"{await probe_tls(config, address)}, the certificate is trusted"

    samples = await _edge_hop(walk, "tcp", "TCP", samples, connects, only_warn)
    if not samples:
        walk.skip("tls", "no TCP connection")
        return usable
    good = await _edge_hop(walk, "tls", "TLS", samples, is_trusted, only_warn)
    if config.protocol != "quic":
        usable += [("http2", address) for _, address in good[:1]]
    return usable


Sample = tuple[str, EdgeAddress]
"""An address of the edge, and in words where it is: `region 1, IPv4`."""


async def _edge_hop(
    walk: Walk,
    name: str,
    what: str,
    samples: Sequence[Sample],
    probe: Callable[[EdgeAddress], Awaitable[str]],
    only_warn: bool,
) -> list[Sample]:
    """Probe an address of each region and IP version at once; give those that answered.

    The hop fails where none does, and warns where a whole region does not.
    """
    good: list[Sample] = []
    async with walk.hop(name, only_warn=only_warn) as detail:
        results = await asyncio.gather(*(_probed(probe, address) for _, address in samples))
        bad: list[str] = []
        advice = said = ""
        for (where, address), result in zip(samples, results, strict=True):
            place = f"{format_address(address.host, address.port)} ({where})"
            if isinstance(result, str):
                good.append((where, address))
                said = result
                detail.append(place)
            else:
                bad.append(f"not with {place}: {result}")
                advice = advice or getattr(result, "advice", "")
        if not good:
            raise HopFailedError("; ".join(bad), advice)
        reached = f"{what} with {', '.join(detail)}" + (f": {said}" if said else "")
        detail[:] = [reached, *bad]
        regions = [{where.partition(",")[0] for where, _ in each} for each in (samples, good)]
        if regions[0] != regions[1]:
            raise HopFailedError("; ".join(detail), advice, partly=True)
    return good


async def _probed(probe: Callable[[EdgeAddress], Awaitable[str]], address: EdgeAddress) -> str | Exception:
    """Give what a probe says, or its error."""
    try:
        async with asyncio.timeout(PROBE_SECONDS - 0.5):  # the hop's own limit would take the others' answers along
            return await probe(address)
    except TimeoutError:
        return HopFailedError(f"no answer within {PROBE_SECONDS - 0.5:g} seconds")
    except ConnectorError as error:
        return error
    except OSError as error:
        return HopFailedError(error.strerror or str(error) or type(error).__name__)


async def _look_up(config: RunConfig) -> tuple[list[Sample], str]:
    from connector.app.addresses import find_edge  # noqa: PLC0415
    from connector.app.logs import Logger, LogOutput  # noqa: PLC0415

    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: ASYNC230  (no file at all)
        book = await find_edge(config, Logger(LogOutput(stream=nowhere)))
    samples = book.samples()
    if not samples:
        raise DiscoveryError("no address of the edge can be used")
    count = book.capacity
    return samples, f"{count} address{'es' if count != 1 else ''} of the edge"


async def _register(walk: Walk, config: RunConfig, usable: list[tuple[str, EdgeAddress]]) -> Any:
    """Register for a moment; give the rules in force then, None when none are known."""
    from connector.app.dialler import Dialler  # noqa: PLC0415
    from connector.app.logs import Logger, LogOutput  # noqa: PLC0415
    from connector.app.orchestrator import Orchestrator  # noqa: PLC0415
    from connector.protocol.protocol_choice import Transport  # noqa: PLC0415
    from connector.proxy.dispatch import Dispatcher  # noqa: PLC0415
    from connector.proxy.ingress import LOCAL_VERSION  # noqa: PLC0415
    from connector.transport.kj import kj_loop  # noqa: PLC0415  (loads pycapnp)
    from connector.transport.rpc import ConnectionOptions, RegistrationClient  # noqa: PLC0415

    protocol, address = usable[0]
    loop, connector_id = asyncio.get_running_loop(), uuid.uuid4()
    transport = Transport(protocol)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: ASYNC230  (no file at all)
        log = Logger(LogOutput(stream=nowhere))
        local = config.own_rules
        dispatcher = Dispatcher(ingress=config.ingress, connector_id=connector_id, loop=loop)
        orchestrator = Orchestrator(dispatcher, log, config.origin_defaults)
        dispatcher.on_configuration = orchestrator.on_configuration
        async with kj_loop():
            dialler = Dialler(
                config, dispatcher.accept, orchestrator, quic=protocol == "quic", http2=protocol == "http2"
            )
            link = client = None
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(dispatcher.close)
                async with walk.hop("registration") as detail:
                    link = await dialler.dial(transport, address, 0)
                    stack.callback(link.abort)
                    control = await link.control_stream(PROBE_SECONDS)
                    client = await stack.enter_async_context(RegistrationClient(control))
                    options = ConnectionOptions(
                        client_id=connector_id,
                        features=(*config.features, *dialler.features(transport, 0)),
                        origin_local_ip=link.local_address[0],
                    )
                    details = await client.register(config.token, 0, options, config.rpc_timeout)
                    detail.append(f"registered in {details.location} over {protocol}, as a connector of its own")
                if walk.failed() or link is None or client is None:
                    walk.skip("configuration", "not registered")
                    return None
                async with walk.hop("configuration") as detail:
                    if not details.remotely_managed and local is not None:
                        detail.append("the tunnel is locally managed: the rules are those of this machine")
                    else:
                        await _pushed(orchestrator, LOCAL_VERSION)
                        rules = len(dispatcher.ingress.rules)
                        detail.append(f"version {orchestrator.version}, {rules} rule{'s' if rules != 1 else ''}")
                ingress = None if walk.failed() else dispatcher.ingress
                with contextlib.suppress(ConnectorError, TimeoutError):
                    await client.unregister(LEAVE_SECONDS)
                    async with asyncio.timeout(LEAVE_SECONDS):
                        while dispatcher.active:  # noqa: ASYNC110
                            await asyncio.sleep(0.05)
                link.close()
                return ingress


async def _pushed(orchestrator: Any, before: int) -> None:
    try:
        async with asyncio.timeout(PUSH_SECONDS):
            while orchestrator.version == before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise ConfigError(
            f"the edge pushed no configuration within {PUSH_SECONDS:g} seconds",
            advice="Add a public hostname to the tunnel in the dashboard. A locally managed tunnel needs --url here.",
        ) from None
