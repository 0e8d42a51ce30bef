"""Pre-checks: can this machine find and reach the edge, by each way? They run beside the start and change nothing.

Owns: the probes, their limits and repeats. In: a RunConfig. Out: a Report. Never: registers, holds the start up, or
raises for what it finds.

*Strategy*: look the edge up once, then probe everything at the same time; a failing probe is repeated twice. Each
target is tried at one IPv4 and one IPv6 address, and one success passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from connector.app.config import RunConfig, split_address
from connector.app.logs import Logger
from connector.app.precheck_report import Kind, Report, Row, Status
from connector.errors import ConnectorError, DiscoveryError
from connector.protocol.edge_addresses import EdgeAddress, IpVersion, ip_version
from connector.protocol.ports import Request, ResetCode, StreamPort, StreamSink
from connector.proxy.builtin import IGNORE
from connector.transport.link import dial_tcp, format_address
from connector.transport.tls import EDGE_NAMES, edge_context

TOTAL_SECONDS = 10.0
PROBE_SECONDS = 5.0
REPEAT_WAITS = (1.0, 2.0)
"""Limits of cloudflared: all together, one probe, and the waits before a failing one is repeated."""

API = ("api.cloudflare.com", 443)

_RESOLVED = "DNS Resolved successfully"
_NO_ADDRESSES = "No addresses returned"
_NO_FAMILY = "No suitable address found for configured IP version"
_NO_DNS = "DNS prerequisite failed"
_DNS_ACTION = (
    "Ensure your DNS resolver can resolve '{host}'. Run: dig A {host} @1.1.1.1. If that fails, contact your network "
    "administrator."
)
_TEXTS = {
    Kind.QUIC: ("QUIC connection successful", "QUIC connection failed",
                "Allow outbound QUIC traffic on port 7844 or use HTTP2."),
    Kind.HTTP2: ("HTTP/2 connection successful", "HTTP/2 connection is blocked or unreachable",
                 "Allow outbound TCP on port 7844."),
    Kind.API: ("API is reachable", "API Connection failed",
               "The tunnel does without it. Ensure port 443 TCP to api.cloudflare.com is open for quick tunnels."),
}  # fmt: skip
"""When it passed, when it failed, and what to do; cloudflared's words where they hold here too."""

_Probe = Callable[[], Awaitable[None]]
_Target = tuple[str, tuple[EdgeAddress, ...], str]
"""What a row names, its addresses, and why there are none."""


async def run_prechecks(config: RunConfig) -> Report:
    """Probe everything within TOTAL_SECONDS; what has no answer by then has failed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + TOTAL_SECONDS
    api = asyncio.create_task(_row(Kind.API, format_address(*API), [_probe_api], deadline), name="precheck api")
    try:
        targets = await _targets(config, deadline)
        version, _ = ip_version(config.ip_version, config.bind_address)
        rows = [
            Row(Kind.DNS, name, Status.PASS, _RESOLVED)
            if addresses
            else Row(Kind.DNS, name, Status.FAIL, error or _NO_ADDRESSES, _DNS_ACTION.format(host=name))
            for name, addresses, error in targets
        ]
        probes = [
            _transport_row(kind, config, target, version, deadline)
            for kind in (Kind.QUIC, Kind.HTTP2)
            for target in targets
        ]
        rows += await asyncio.gather(*probes)
        rows.append(await api)
    finally:
        api.cancel()
    protocol = config.protocol if config.protocol in {"quic", "http2"} else "auto"
    return Report(rows, protocol=protocol)


async def log_prechecks(config: RunConfig, log: Logger) -> None:
    """Run them and print what came out; a bug in them is a line, and nothing else."""
    try:
        report = await run_prechecks(config)
    except Exception as error:
        log.bug("The pre-checks failed", error)
        return
    report.log(log)


async def _targets(config: RunConfig, deadline: float) -> list[_Target]:
    from connector.transport import discovery  # noqa: PLC0415  (loads dnspython)

    if config.edges:
        return [await _static_target(edge, discovery) for edge in config.edges]
    names = discovery.host_names(config.region)
    error = ""
    regions: Sequence[tuple[EdgeAddress, ...]] = ((), ())
    try:
        async with asyncio.timeout_at(deadline - PROBE_SECONDS):
            regions = (await discovery.default_discovery(config.region).find()).regions
    except DiscoveryError as failed:
        error = str(failed)
    except TimeoutError:
        error = "no answer in time"
    return [(name, addresses, error) for name, addresses in zip(names, regions, strict=True)]


async def _static_target(edge: str, discovery: Any) -> _Target:
    try:
        regions = await discovery.find_static([split_address(edge, "--edge")], skipped=lambda *_: None)
    except ConnectorError as error:
        return edge, (), str(error)
    return edge, (*regions[0], *regions[1]), ""


def _chosen(addresses: Sequence[EdgeAddress], version: IpVersion) -> list[EdgeAddress]:
    """Give one address of each family that may be used."""
    four = next((each for each in addresses if ":" not in each.host), None)
    six = next((each for each in addresses if ":" in each.host), None)
    allowed = {IpVersion.V4: [four], IpVersion.V6: [six]}.get(version, [four, six])
    return [each for each in allowed if each is not None]


async def _transport_row(kind: Kind, config: RunConfig, target: _Target, version: IpVersion, deadline: float) -> Row:
    name, addresses, _ = target
    if not addresses:
        return Row(kind, name, Status.SKIP, _NO_DNS)
    chosen = _chosen(addresses, version)
    if not chosen:
        return Row(kind, name, Status.SKIP, _NO_FAMILY)
    probe = probe_quic if kind is Kind.QUIC else probe_tls
    return await _row(kind, name, [lambda each=each: probe(config, each) for each in chosen], deadline)  # type: ignore[misc]


async def _row(kind: Kind, name: str, probes: Sequence[_Probe], deadline: float) -> Row:
    good, bad, action = _TEXTS[kind]
    for wait in (*REPEAT_WAITS, None):
        try:
            async with asyncio.timeout_at(deadline):
                results = await asyncio.gather(*(_limited(probe) for probe in probes))
                if any(results):
                    return Row(kind, name, Status.PASS, good)
                if wait is None:
                    break
                await asyncio.sleep(wait)
        except TimeoutError:
            break
    return Row(kind, name, Status.FAIL, bad, action)


async def _limited(probe: _Probe) -> bool:
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await probe()
    except (ConnectorError, OSError, TimeoutError):
        return False
    return True


# -- the probes, which `connector doctor` uses too


async def probe_quic(config: RunConfig, address: EdgeAddress) -> str:
    """Shake hands over QUIC and hang up; give the library's name. Errors: EdgeDialError."""
    from connector.transport.quic import dial_quic  # noqa: PLC0415  (slow to import)
    from connector.transport.quic_trust import quic_context  # noqa: PLC0415

    link = await dial_quic(
        address.host,
        address.port,
        context=quic_context(config.cacert),
        accept=_refuse,
        server_name=EDGE_NAMES["probe"],
        local_host=config.bind_address,
    )
    link.close()
    return link.engine_name


def _refuse(request: Request, port: StreamPort) -> StreamSink:
    port.reset(ResetCode.REFUSED)
    return IGNORE


async def probe_tcp(config: RunConfig, address: EdgeAddress) -> Any:
    """Connect, through the proxy where there is one; give the socket. Errors: EdgeDialError."""
    local = (config.bind_address, 0) if config.bind_address else None
    if config.proxy is not None and not config.proxy_exempt(address.host):
        from connector.transport.outbound_proxy import dial_through  # noqa: PLC0415  (few need it)

        return await dial_through(config.proxy, address.host, address.port, local_address=local)
    return await dial_tcp(address.host, address.port, local_address=local)


async def probe_tls(config: RunConfig, address: EdgeAddress) -> str:
    """Connect, shake hands in TLS, and hang up; give TLS's version. Errors: EdgeDialError, OSError."""
    sock = await probe_tcp(config, address)
    try:
        _, writer = await asyncio.open_connection(
            sock=sock, ssl=edge_context(config.cacert), server_hostname=EDGE_NAMES["probe"], ssl_shutdown_timeout=1.0
        )
    except BaseException:
        sock.close()
        raise
    version = str(writer.get_extra_info("ssl_object").version())
    writer.transport.abort()
    return version


async def _probe_api() -> None:
    (await dial_tcp(*API)).close()
