"""The single origin that flags describe, and the rules that a run starts with.

Owns: the mapping of flags to a service and to originRequest. In: Flags, LocalConfig. Out: Ingress; ConfigError.
Never: opens anything.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import structs

from connector.app.flags import Flags
from connector.app.local_config import LocalConfig
from connector.errors import ConfigError
from connector.proxy.ingress import (
    DEFAULT_INGRESS,
    LOCAL_VERSION,
    Ingress,
    OriginSettings,
    Service,
    ServiceKind,
    build_ingress,
    check_extensions,
    parse_service,
    service_from_url_flag,
    single_origin,
)

SETTING_FLAGS: Final = {
    "proxy-connect-timeout": "connect_timeout",
    "proxy-tls-timeout": "tls_timeout",
    "proxy-tcp-keepalive": "tcp_keep_alive",
    "proxy-no-happy-eyeballs": "no_happy_eyeballs",
    "proxy-keepalive-connections": "keep_alive_connections",
    "proxy-keepalive-timeout": "keep_alive_timeout",
    "http-host-header": "http_host_header",
    "origin-server-name": "origin_server_name",
    "origin-ca-pool": "ca_pool",
    "no-tls-verify": "no_tls_verify",
    "no-chunked-encoding": "disable_chunked_encoding",
    "bastion": "bastion_mode",
    "proxy-address": "proxy_address",
    "proxy-port": "proxy_port",
    "http2-origin": "http2_origin",
}

DEFAULT_FLAGS: Final = ("ws-keepalive", "ws-subprotocols", "proxy-protocol")
"""Flags for what cloudflared's rules do not have; see `own_defaults`."""


def start_rules(flags: Flags, local: LocalConfig | None) -> Ingress:
    """Return the rules that serve until the edge pushes others: of the file, else of flags, else 503 to everything."""
    document = local.file.document if local is not None else None
    if document is not None and document.ingress:
        return build_ingress(document, LOCAL_VERSION, own_defaults(flags))
    service = _service(flags)
    settings = settings_from_flags(flags)
    ingress = (
        structs.replace(DEFAULT_INGRESS, defaults=settings) if service is None else single_origin(service, settings)
    )
    if document is not None:
        ingress = structs.replace(ingress, warp_routing=build_ingress(document, LOCAL_VERSION).warp_routing)
    return ingress


def settings_from_flags(flags: Flags) -> OriginSettings:
    """Return the originRequest that flags describe; flags that nobody set count as the defaults."""
    changes: dict[str, Any] = {name: flags.value(flag) for flag, name in SETTING_FLAGS.items() if flags.is_set(flag)}
    if flags.is_set("socks5"):
        changes["proxy_type"] = "socks"
    return structs.replace(own_defaults(flags), **changes)


def own_defaults(flags: Flags) -> OriginSettings:
    """Return what counts where a rule says nothing: cloudflared's defaults, and flags for what it does not have.

    So a connector whose rules come from a dashboard, which cannot name these keys, is told by its environment.
    Errors: ConfigError.
    """
    names = tuple(flags.texts("ws-subprotocols"))
    settings = OriginSettings(
        ws_keep_alive=flags.number("ws-keepalive"),
        ws_subprotocols=names or None,
        proxy_protocol=flags.text("proxy-protocol"),
    )
    if settings.ws_keep_alive < 0:
        raise ConfigError("--ws-keepalive must be 0 (off) or more")
    try:
        check_extensions(settings)
    except ConfigError as error:
        text = str(error).replace("originRequest.wsSubprotocols", "--ws-subprotocols")
        error.args = (text.replace("originRequest.proxyProtocol", "--proxy-protocol"),)
        raise
    return settings


def _service(flags: Flags) -> Service | None:
    """Return the service of the first flag that is set, in cloudflared's order."""
    if flags.is_set("hello-world"):
        return parse_service("hello_world")
    if flags.is_set("bastion"):
        return parse_service("bastion")
    if flags.is_set("unix-socket") and flags.is_set("url"):
        raise ConfigError(
            "Error validating --unix-socket: --unix-socket must be used exclusively.",
            advice=f"{flags.source('url')} is set as well: leave one of them out.",
        )
    if flags.is_set("url"):
        return service_from_url_flag(flags.text("url"))
    if flags.is_set("unix-socket"):
        path = flags.text("unix-socket")
        return Service(ServiceKind.HTTP, f"unix:{path}", path=path)
    return None
