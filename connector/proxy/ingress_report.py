"""A rule set as JSON: for the edge (updateLocalConfiguration) and for the metrics server's `/config`.

Owns: these two forms (ingress-config sections 9.2, 9.3). In: Ingress. Out: objects for a JSON encoder.
Never: shows user names or passwords of services.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from connector.proxy.ingress_model import AccessSettings, Ingress, IPRule, OriginSettings, Rule

_DEFAULTS: Final = OriginSettings()
_KEYS: Final = (
    ("connect_timeout", "connectTimeout"),
    ("tls_timeout", "tlsTimeout"),
    ("tcp_keep_alive", "tcpKeepAlive"),
    ("no_happy_eyeballs", "noHappyEyeballs"),
    ("keep_alive_connections", "keepAliveConnections"),
    ("keep_alive_timeout", "keepAliveTimeout"),
    ("http_host_header", "httpHostHeader"),
    ("origin_server_name", "originServerName"),
    ("match_sni_to_host", "matchSNItoHost"),
    ("ca_pool", "caPool"),
    ("no_tls_verify", "noTLSVerify"),
    ("disable_chunked_encoding", "disableChunkedEncoding"),
    ("bastion_mode", "bastionMode"),
    ("proxy_address", "proxyAddress"),
    ("proxy_port", "proxyPort"),
    ("proxy_type", "proxyType"),
    ("ip_rules", "ipRules"),
    ("http2_origin", "http2Origin"),
    ("access", "access"),
)  # fmt: skip
_EXTENSIONS: Final = (
    ("ws_keep_alive", "wsKeepAlive"),
    ("ws_subprotocols", "wsSubprotocols"),
    ("proxy_protocol", "proxyProtocol"),
    ("access_log", "accessLog"),
)


def local_report(ingress: Ingress, flags: Mapping[str, str]) -> dict[str, Any]:
    """Return what the edge is told of a locally managed tunnel; only what differs from the defaults is in it.

    Keys that cloudflared does not have are left out: nobody there expects them.
    """
    document: dict[str, Any] = {"__configuration_flags": dict(flags)} if flags else {}
    document["ingress"] = [_local_rule(rule) for rule in ingress.rules]
    document["warp-routing"] = _warp(ingress)
    return document


def config_report(ingress: Ingress) -> dict[str, Any]:
    """Return the value of `config` in `/config`: every setting of every rule."""
    return {
        "ingress": [
            {
                "hostname": rule.hostname,
                "path": rule.path or None,
                "service": rule.service.text,
                "Handlers": [{}] if rule.access.required else None,
                "originRequest": _full(rule.settings),
            }
            for rule in ingress.rules
        ],
        "warp-routing": _warp(ingress),
        "originRequest": _full(ingress.defaults),
    }


def changed_settings(settings: OriginSettings, base: OriginSettings = _DEFAULTS) -> dict[str, Any]:
    """Return the keys and JSON values in which `settings` differ from `base`, extensions included."""
    return {
        key: _value(getattr(settings, name))
        for name, key in (*_KEYS, *_EXTENSIONS)
        if getattr(settings, name) != getattr(base, name)
    }


def _local_rule(rule: Rule) -> dict[str, Any]:
    named = (("hostname", rule.hostname), ("path", rule.path), ("service", rule.service.text))
    settings = {key: value for key, value in changed_settings(rule.settings).items() if key in _KNOWN}
    if not rule.settings.access.required:
        settings.pop("access", None)
    return {**{key: value for key, value in named if value}, "originRequest": settings}


def _warp(ingress: Ingress) -> dict[str, Any]:
    usual = {"connectTimeout": 5, "maxActiveFlows": 0, "tcpKeepAlive": 30}
    warp = ingress.warp_routing
    return {key: _value(warp[key]) for key, value in usual.items() if warp.get(key, value) != value}


def _full(settings: OriginSettings) -> dict[str, Any]:
    shown = {key: _value(getattr(settings, name)) for name, key in _KEYS}
    shown["ipRules"] = shown["ipRules"] or None
    access = settings.access
    shown["access"] = {**({"required": True} if access.required else {}), "teamName": access.team_name,
                       "audTag": list(access.audience) or None,
                       **({"environment": access.environment} if access.environment else {})}  # fmt: skip
    order = ("connectTimeout", "tlsTimeout", "tcpKeepAlive", "noHappyEyeballs", "keepAliveTimeout")
    first = {key: shown.pop(key) for key in order}
    return {**first, **shown, **{key: value for key, value in changed_settings(settings).items() if key not in _KNOWN}}


_KNOWN: Final = frozenset(key for _, key in _KEYS)


def _value(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, AccessSettings):
        return {
            "required": value.required, "teamName": value.team_name, "audTag": list(value.audience),
            **({"environment": value.environment} if value.environment else {}),
        }  # fmt: skip
    if isinstance(value, IPRule):
        return {"prefix": str(value.network), "ports": list(value.ports) or None, "allow": value.allow}
    return [_value(item) for item in value] if isinstance(value, tuple) else value
