"""From a configuration's document to a rule set that can be put in force.

Owns: defaults and their inheritance, the checks of rules and their texts. In: Document, decoded JSON, or a single
origin. Out: Ingress; ConfigError naming rule, key and reason. Never: opens anything.

Read in this order: ingress_model.py (what a rule set is), build_ingress, ingress_services.py (what a service is).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final

from msgspec import UNSET, structs

from connector.errors import ConfigError
from connector.proxy.go_url import without_userinfo
from connector.proxy.idna_names import lookup_name
from connector.proxy.ingress_document import (
    AccessDocument,
    Document,
    IPRuleDocument,
    OriginRequestDocument,
    RuleDocument,
    read_json_document,
)
from connector.proxy.ingress_model import (
    DEFAULT_INGRESS,
    AccessSettings,
    Ingress,
    IPRule,
    OriginSettings,
    Rule,
    Service,
    ServiceKind,
)
from connector.proxy.ingress_services import parse_service, port_problem, service_from_url_flag
from connector.proxy.patterns import PatternError, compile_path

__all__ = [
    "DEFAULT_INGRESS", "LOCAL_VERSION", "AccessSettings", "IPRule", "Ingress", "OriginSettings", "Rule", "Service",
    "ServiceKind", "build_ingress", "check_extensions", "ingress_from_url", "parse_remote_config", "parse_service",
    "service_from_url_flag", "single_origin",
]  # fmt: skip

LOCAL_VERSION: Final = -1
"""The version of what flags or a file configure; remote version 0 already wins."""


USUAL: Final = OriginSettings()


def parse_remote_config(version: int, config: object, base: OriginSettings = USUAL) -> Ingress:
    """Return the rule set of a pushed configuration (decoded JSON). Errors: ConfigError."""
    return build_ingress(read_json_document(config), version, base)


def build_ingress(document: Document, version: int, base: OriginSettings = USUAL) -> Ingress:
    """Return the rule set of a document; without rules that is DEFAULT_INGRESS's. Errors: ConfigError.

    `base` holds what counts where the document says nothing: this process may have defaults of its own.
    """
    defaults = _overlay(base, document.origin_request)
    warp = document.warp_routing
    warp_routing = {
        name: value
        for name, value in (
            ("connectTimeout", warp.connect_timeout),
            ("tcpKeepAlive", warp.tcp_keep_alive),
            ("maxActiveFlows", warp.max_active_flows),
        )
        if value is not UNSET
    }
    warnings: list[str] = []
    if warp_routing.get("connectTimeout", 0) < 0:
        warnings.append(f"warp-routing.connectTimeout: {_PAST.format(warp_routing['connectTimeout'])}")
    if not document.ingress:
        return Ingress(version, DEFAULT_INGRESS.rules, warp_routing, tuple(warnings), defaults)
    count = len(document.ingress)
    rules = tuple(_rule(rule, number, count, defaults, warnings) for number, rule in enumerate(document.ingress))
    return Ingress(version, rules, warp_routing, tuple(warnings), defaults)


def single_origin(service: Service, settings: OriginSettings) -> Ingress:
    """Return the rule set of one origin given by flags."""
    problem = port_problem(service)
    rule = Rule(0, service, settings=_narrowed(settings, service))
    return Ingress(LOCAL_VERSION, (rule,), warnings=(problem,) if problem else (), defaults=settings)


def ingress_from_url(url: str, settings: OriginSettings | None = None) -> Ingress:
    """Return the rule set of `--url`; `localhost:8080` means http. Errors: ConfigError."""
    return single_origin(service_from_url_flag(url), settings or OriginSettings())


# -- one rule


def _rule(source: RuleDocument, number: int, count: int, defaults: OriginSettings, warnings: list[str]) -> Rule:
    """Return rule `number` of `count`. The order of checks is cloudflared's: service, access, hostname, path."""
    own = source.origin_request
    try:
        settings = _overlay(defaults, own)
        service = parse_service(source.service, bastion=settings.bastion_mode)
        if service.kind is ServiceKind.BASTION and not settings.bastion_mode:
            settings = structs.replace(settings, bastion_mode=True)
        own_rules: tuple[IPRule, ...] = ()
        if service.kind is ServiceKind.SOCKS and own.ip_rules is not UNSET:
            own_rules = tuple(_ip_rule(rule) for rule in own.ip_rules)
        access = _access(own.access) if own.access is not UNSET else AccessSettings()
        if access.required and access.audience and not access.team_name:
            raise ConfigError("access.TeamName cannot be blank when access.audTags are present")
        _check_hostname(source, number, count)
        pattern = compile_path(source.path) if source.path else None
        check_extensions(settings)
        settings = _narrowed(settings, service)
    except PatternError as error:
        raise ConfigError(f"Rule #{number + 1} has an invalid regex: {error}") from None
    except ConfigError as error:
        error.advice = error.advice or f"see ingress rule #{number + 1} (service {without_userinfo(source.service)!r})"
        raise
    rule = Rule(number, service, source.hostname, source.path, pattern, settings, access, own_rules)
    warnings.extend(f"Rule #{number + 1}: {text}" for text in _doubts(rule))
    return rule


def _check_hostname(source: RuleDocument, number: int, count: int) -> None:
    hostname = source.hostname
    if re.search(r"^(?:[^:\[\]]*|\[[^\[\]]*\]):[^:\[\]]*$", hostname):
        raise ConfigError("Hostname cannot contain a port")
    if "*" in hostname[1:]:
        raise ConfigError(
            'Hostname patterns can have at most one wildcard character ("*") and it can only be used for subdomains, '
            'e.g. "*.example.com"'
        )
    catch_all = hostname in {"", "*"} and not source.path
    if number == count - 1 and not catch_all:
        raise ConfigError(
            "The last ingress rule must match all URLs (i.e. it should not have a hostname or path filter)"
        )
    if number < count - 1 and catch_all:
        raise ConfigError(
            f"Rule #{number + 1} is matching the hostname '{hostname}', but this will match every hostname, meaning "
            "the rules which follow it will never be triggered."
        )


_PAST: Final = "{:g} s are over before they begin; every connection will fail"


def _doubts(rule: Rule) -> list[str]:
    """Return what cloudflared accepts although it cannot work, or does not do what it seems to."""
    found = []
    if problem := port_problem(rule.service):
        found.append(f"service: {problem}; every request will fail")
    hostname, settings = rule.hostname, rule.settings
    if hostname.startswith("*.") and not hostname.isascii() and (name := lookup_name(hostname[2:])):
        found.append(f"hostname: a wildcard is compared as written; browsers send *.{name}, so write that")
    elif hostname.startswith("*") and len(hostname) > 1 and hostname[1] != ".":
        found.append(f"hostname: {hostname} matches only itself; a wildcard is *.example.com")
    for key, value in (
        ("httpHostHeader", settings.http_host_header),
        ("originServerName", settings.origin_server_name),
    ):
        if not re.fullmatch(r"[!-~]*", value):
            found.append(f"originRequest.{key}: {value!r} is not a host name; every request will fail")
    for key, seconds in (("connectTimeout", settings.connect_timeout), ("tlsTimeout", settings.tls_timeout)):
        if seconds < 0 and rule.service.kind not in {ServiceKind.STATUS, ServiceKind.HELLO}:
            found.append(f"originRequest.{key}: {_PAST.format(seconds)}")
    if rule.access.required and not rule.access.audience:
        found.append("originRequest.access: no audTag, so nobody is let in")
    if rule.service.kind is ServiceKind.SOCKS and not rule.ip_rules:
        found.append("originRequest.ipRules: the rule has none of its own, so every destination is refused")
    return found


# -- settings

_COPIED: Final = tuple(
    name for name in OriginRequestDocument.__struct_fields__
    if name not in {"ip_rules", "access", "ws_subprotocols"}
)  # fmt: skip


def _overlay(base: OriginSettings, source: OriginRequestDocument) -> OriginSettings:
    """Return `base` with what `source` sets; a value equal to zero counts as set, an empty `ipRules` does not."""
    changes: dict[str, Any] = {}
    for name in _COPIED:
        value = getattr(source, name)
        if value is not UNSET:
            changes[name] = float(value) if isinstance(value, float) else value
    if source.ip_rules is not UNSET and source.ip_rules:
        changes["ip_rules"] = tuple(_valid_ip_rules(source.ip_rules))
    if source.access is not UNSET:
        changes["access"] = _access(source.access)
    if source.ws_subprotocols is not UNSET:
        changes["ws_subprotocols"] = tuple(source.ws_subprotocols)
    return structs.replace(base, **changes) if changes else base


def _valid_ip_rules(sources: list[IPRuleDocument]) -> list[IPRule]:
    """Return those rules that are valid: only a socks-proxy refuses the others."""
    found = []
    for source in sources:
        try:
            found.append(_ip_rule(source))
        except ConfigError:
            pass
    return found


def _ip_rule(source: IPRuleDocument) -> IPRule:
    prefix = "" if source.prefix is UNSET else source.prefix
    ports = [] if source.ports is UNSET else source.ports
    if not prefix:
        raise ConfigError("unable to create ip rule for socks-proxy: no prefix provided")
    try:
        if not re.fullmatch(r"[0-9A-Fa-f:.]+/[0-9]{1,3}", prefix):
            raise ValueError
        network = ipaddress.ip_network(prefix, strict=False)
    except ValueError:
        raise ConfigError(f"unable to create ip rule for socks-proxy: unable to parse cidr: {prefix}") from None
    for port in sorted(ports):
        if not 1 <= port <= 65535:
            raise ConfigError(
                f"unable to create ip rule for socks-proxy: invalid port {port}, needs to be between 1 and 65535"
            )
    return IPRule(network, tuple(sorted(ports)), source.allow is True)


def _access(source: AccessDocument) -> AccessSettings:
    return AccessSettings(
        source.required is True,
        "" if source.team_name is UNSET else source.team_name,
        () if source.audience is UNSET else tuple(source.audience),
        "" if source.environment is UNSET else source.environment,
    )


_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+")


_PROXY = re.compile(r"(?:v2(?:@[^\s,]+:[0-9]+(?:,[^\s,]+:[0-9]+)*)?)?")


def check_extensions(settings: OriginSettings) -> None:
    """Refuse nonsense in the keys that cloudflared does not have."""
    if not _PROXY.fullmatch(settings.proxy_protocol):
        raise ConfigError(
            f"originRequest.proxyProtocol cannot be {settings.proxy_protocol!r}",
            advice="Allowed: v2, v2@HOST:PORT[,HOST:PORT...] (for the services there alone), or nothing.",
        )
    if settings.ws_keep_alive < 0:
        raise ConfigError("originRequest.wsKeepAlive must be 0 (off) or more")
    for name in settings.ws_subprotocols or ():
        if not _TOKEN.fullmatch(name):
            raise ConfigError(f"originRequest.wsSubprotocols: {name!r} is not a subprotocol's name")


def _narrowed(settings: OriginSettings, service: Service) -> OriginSettings:
    """Return the settings with `v2@HOST:PORT` decided: a default for all rules, most of which lead elsewhere."""
    version, _, places = settings.proxy_protocol.partition("@")
    if not places:
        return settings
    host = f"[{service.host}]" if ":" in service.host else service.host
    here = f"{host}:{service.port}".lower() in places.lower().split(",")
    return structs.replace(settings, proxy_protocol=version if here else "")
