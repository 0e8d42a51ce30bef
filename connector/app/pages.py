"""The pages of the metrics address.

Owns: what /ready, /healthcheck, /config, /quicktunnel, /diag/* and /debug/* say. In: the tunnel's state. Out: Routes.
Never: a secret flag's value; changes anything.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from uuid import UUID

from connector.app.answers import Answer, Query, Routes, first, json_answer, text_answer
from connector.app.metrics import Metrics
from connector.protocol.protocol_choice import Transport
from connector.proxy.ingress import Ingress, OriginSettings, Rule

if TYPE_CHECKING:
    from connector.app.config import RunConfig
    from connector.proxy.dispatch import Dispatcher

_FORBIDDEN = Answer(403, b"forbidden\n")

DEFAULT_PROFILE_SECONDS = 30
"""Of /debug/pprof/profile without `seconds`, as Go has it."""

PROTOCOL_QUIC = 1
"""How /diag/tunnel says QUIC; HTTP/2 is 0 and left out."""


class Pages:
    """The pages of one run. `metrics.state` is set when the tunnel has a state; before, nothing is ready."""

    def __init__(self, config: RunConfig, connector_id: UUID, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self._config = config
        self._connector_id = str(connector_id)
        self._dispatcher = dispatcher
        self._metrics = metrics
        self.icmp_sources: list[str] = []
        """Addresses that ICMP echo requests leave from, for /diag/tunnel."""

    def routes(self) -> Routes:
        """Give the metrics address's pages."""
        return {
            "/ready": self.ready,
            "/healthcheck": lambda _: text_answer("OK\n"),
            "/metrics": self._metrics.answer,
            "/quicktunnel": lambda _: text_answer(f'{{"hostname":"{self._metrics.hostname}"}}'),
            "/config": self.config,
            "/diag/configuration": self.configuration,
            "/diag/tunnel": self.tunnel,
            "/diag/system": self.system,
            "/debug/pprof/": lambda _: text_answer(_PROFILES),
            "/debug/pprof/cmdline": lambda _: _FORBIDDEN,
            "/debug/pprof/goroutine": self.stacks,
            "/debug/pprof/heap": self.heap,
            "/debug/pprof/profile": self.profile,
            "/debug/requests": self.requests,
        }

    def shared_profiles(self) -> Routes:
        """Give the profiles that management may read too."""
        return {"/debug/pprof/heap": self.heap, "/debug/pprof/goroutine": self.stacks}

    def ready(self, _: Query) -> Answer:
        """200 while a connection is registered."""
        state = self._metrics.state
        ready = 0 if state is None else len(state.connected)
        status = 200 if ready else 503
        text = f'{{"status":{status},"readyConnections":{ready},"connectorId":"{self._connector_id}"'
        facts = None if state is None else state.choice.facts
        if facts is not None and facts.text:  # for people; without news the answer is cloudflared's to the byte
            text += f',"quic":{{"status":"{facts.status.value}","reason":"{facts.text}"}}'
        text += "}\n"
        return Answer(status, text.encode(), "application/json")

    def config(self, _: Query) -> Answer:
        """The configuration in force, everything filled in."""
        state = self._metrics.state
        version = -1 if state is None else state.orchestrator.version
        return json_answer({"version": version, "config": shown_configuration(self._dispatcher.ingress)})

    def configuration(self, _: Query) -> Answer:
        """The flags that were given, as text."""
        shown = dict(self._config.settings)
        for name in ("logfile", "log-directory"):
            if shown.get(name):
                shown[name] = os.path.abspath(os.path.expanduser(shown[name]))
        shown = {name: text for name, text in shown.items() if text != "*****"}
        if hasattr(os, "getuid"):
            shown["uid"] = str(os.getuid())
        return json_answer(shown)

    def tunnel(self, _: Query) -> Answer:
        """Who is connected to what."""
        state = self._metrics.state
        connections = []
        for index, address in sorted(state.connected.items() if state is not None else ()):
            assert state is not None
            entry: dict[str, Any] = {"isConnected": True}
            if state.transports.get(index) is Transport.QUIC:
                entry["protocol"] = PROTOCOL_QUIC
            entry["edgeAddress"] = address.host
            if index:
                entry["index"] = index
            connections.append(entry)
        answer: dict[str, Any] = {"tunnelID": str(self._config.token.tunnel_id), "connectorID": self._connector_id}
        if connections:
            answer["connections"] = connections
        if self.icmp_sources:
            answer["icmp_sources"] = self.icmp_sources
        return json_answer(answer)

    async def system(self, _: Query) -> Answer:
        """The machine."""
        from connector.app.system_facts import system_information  # noqa: PLC0415  (rarely needed)

        return json_answer(await system_information())

    def stacks(self, _: Query) -> Answer:
        """Every thread and task, and where it stands."""
        from connector.app.profiles import stack_dump  # noqa: PLC0415  (rarely needed)

        return text_answer(stack_dump())

    def heap(self, query: Query) -> Answer:
        """What the memory holds."""
        from connector.app.profiles import heap_dump  # noqa: PLC0415  (rarely needed)

        return text_answer(heap_dump(trace=first(query, "trace")))

    async def profile(self, query: Query) -> Answer:
        """Where the time goes: samples for `seconds`."""
        from connector.app.profiles import sample  # noqa: PLC0415  (rarely needed)

        try:
            seconds = float(first(query, "seconds", str(DEFAULT_PROFILE_SECONDS)))
        except ValueError:
            return text_answer("seconds must be a number\n", 400)
        return text_answer(await sample(seconds))

    def requests(self, _: Query) -> Answer:
        """What is being served now, by rule."""
        lines = [
            f"rule {rule.index} {rule.service.text}: {received} bytes received, {sent} bytes sent"
            for rule, (received, sent) in self._dispatcher.live()
        ]
        return text_answer("\n".join([f"{len(lines)} requests in flight", *lines]) + "\n")


_PROFILES = """\
A Python program has no Go profiles. There are, as text:

/debug/pprof/goroutine          where every thread and task stands
/debug/pprof/heap               how many objects of which type; ?trace=start, then ?trace=show, for where they came from
/debug/pprof/profile?seconds=N  where the time goes: collapsed stacks of a sampling profile, for any flame graph viewer
/debug/requests                 what is being served now
"""


def shown_configuration(ingress: Ingress) -> dict[str, Any]:
    """Give a rule set as cloudflared's /config has it."""
    return {
        "ingress": [_rule(rule) for rule in ingress.rules],
        "warp-routing": dict(ingress.warp_routing),
        "originRequest": _settings(ingress.defaults),
    }


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "hostname": rule.hostname,
        "path": rule.path or None,
        "service": rule.service.text,
        "Handlers": [{}] if rule.access.required else None,
        "originRequest": _settings(rule.settings),
    }


def _settings(settings: OriginSettings) -> dict[str, Any]:
    access = settings.access
    return {
        "connectTimeout": _seconds(settings.connect_timeout),
        "tlsTimeout": _seconds(settings.tls_timeout),
        "tcpKeepAlive": _seconds(settings.tcp_keep_alive),
        "noHappyEyeballs": settings.no_happy_eyeballs,
        "keepAliveTimeout": _seconds(settings.keep_alive_timeout),
        "keepAliveConnections": settings.keep_alive_connections,
        "httpHostHeader": settings.http_host_header,
        "originServerName": settings.origin_server_name,
        "matchSNItoHost": settings.match_sni_to_host,
        "caPool": settings.ca_pool,
        "noTLSVerify": settings.no_tls_verify,
        "disableChunkedEncoding": settings.disable_chunked_encoding,
        "bastionMode": settings.bastion_mode,
        "proxyAddress": settings.proxy_address,
        "proxyPort": settings.proxy_port,
        "proxyType": settings.proxy_type,
        "ipRules": [
            {"prefix": str(rule.network), "ports": list(rule.ports), "allow": rule.allow} for rule in settings.ip_rules
        ]
        or None,
        "http2Origin": settings.http2_origin,
        "access": {"teamName": access.team_name, "audTag": list(access.audience) or None},
    }


def _seconds(value: float) -> float:
    return int(value) if value == int(value) else value
