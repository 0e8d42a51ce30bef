"""Rules from JSON: what is accepted, which text refuses the rest, and which rule serves a request."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Any

import pytest

from connector.errors import ConfigError
from connector.proxy.ingress import (
    DEFAULT_INGRESS,
    Ingress,
    IPRule,
    OriginSettings,
    ServiceKind,
    ingress_from_url,
    parse_remote_config,
    parse_service,
)
from connector.proxy.limits import MATCH_CACHE

LAST = {"service": "http_status:404"}


def rules(*entries: dict[str, Any], **top: Any) -> Ingress:
    return parse_remote_config(1, {"ingress": [*entries, LAST], **top})


def test_example_of_the_documentation() -> None:
    ingress = parse_remote_config(
        7,
        {
            "ingress": [
                {
                    "hostname": "app.example.com",
                    "path": "^/api",
                    "service": "https://localhost:8443",
                    "originRequest": {"noTLSVerify": True, "connectTimeout": 10},
                },
                {"hostname": "*.example.com", "service": "http://10.0.0.5:80"},
                {"service": "http_status:404"},
            ],
            "originRequest": {"keepAliveTimeout": 60},
            "warp-routing": {"maxActiveFlows": 1000, "enabled": True},
        },
    )
    assert ingress.version == 7
    assert ingress.warp_routing == {"maxActiveFlows": 1000}
    api, wild, last = ingress.rules
    assert (api.service.host, api.service.port, api.service.tls) == ("localhost", 8443, True)
    assert api.settings == OriginSettings(connect_timeout=10, keep_alive_timeout=60, no_tls_verify=True)
    assert wild.settings == OriginSettings(keep_alive_timeout=60)
    assert (last.service.kind, last.service.status, last.index) == (ServiceKind.STATUS, 404, 2)


@pytest.mark.parametrize("config", [{}, None, {"ingress": []}, {"ingress": None}, {"other": 1}])
def test_no_rules_is_valid_and_means_503(config: object) -> None:
    ingress = parse_remote_config(3, config)
    assert ingress.version == 3
    assert ingress.rules == DEFAULT_INGRESS.rules
    assert ingress.match(b"any.example", b"/").service.status == 503


def test_keys_are_case_insensitive_and_unknown_ones_ignored() -> None:
    ingress = parse_remote_config(
        1, {"INGRESS": [{"Service": "http://h:1", "ORIGINREQUEST": {"NoTlsVerify": True}, "extra": {}}], "x": []}
    )
    assert ingress.rules[0].settings.no_tls_verify


def test_a_zero_value_of_a_rule_counts_as_set() -> None:
    ingress = rules(
        {"service": "http://h:1", "hostname": "a.b", "originRequest": {"noTLSVerify": False, "connectTimeout": 0}},
        originRequest={"noTLSVerify": True, "connectTimeout": 5, "ipRules": [{"prefix": "10.0.0.0/8"}]},
    )
    settings = ingress.rules[0].settings
    assert not settings.no_tls_verify
    assert settings.connect_timeout == 0
    assert settings.ip_rules == (IPRule(ip_network("10.0.0.0/8")),)
    assert ingress.rules[1].settings.no_tls_verify


WRONG: list[tuple[Any, str]] = [
    ([], "^the configuration must be a JSON object, not a list"),
    ({"ingress": {}}, "ingress must be a JSON list, not an object"),
    ({"ingress": ["x"]}, r"ingress\[0\] must be a JSON object"),
    ({"ingress": [{"service": 5}]}, r"ingress\[0\].service must be a JSON string, not a number"),
    ({"originRequest": {"connectTimeout": 1.5}}, "originRequest.connectTimeout must be an integer number of seconds"),
    ({"originRequest": {"connectTimeout": "30s"}}, "connectTimeout must be an integer number of seconds, not a string"),
    ({"originRequest": {"connectTimeout": True}}, "connectTimeout must be an integer"),
    ({"originRequest": {"connectTimeout": 10**400}}, "originRequest.connectTimeout does not fit into 64 bits"),
    ({"originRequest": {"keepAliveTimeout": -(2**63) - 1}}, "originRequest.keepAliveTimeout does not fit into 64 bits"),
    ({"originRequest": {"noTLSVerify": "yes"}}, "noTLSVerify must be a JSON boolean"),
    ({"warp-routing": {"maxActiveFlows": "1"}}, "warp-routing.maxActiveFlows must be"),
]


@pytest.mark.parametrize(("config", "words"), WRONG)
def test_wrong_types_are_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_remote_config(1, config)


INVALID: list[tuple[list[dict[str, Any]], str]] = [
    ([{"hostname": "a.b:80", "service": "http://h"}, LAST], "^Hostname cannot contain a port$"),
    ([{"hostname": "a.*.b", "service": "http://h"}, LAST], "^Hostname patterns can have at most one wildcard"),
    ([{"hostname": "*.a.*", "service": "http://h"}, LAST], "^Hostname patterns can have at most one wildcard"),
    ([{"hostname": "a.b", "service": "http://h"}], r"^The last ingress rule must match all URLs \(i.e. it should not"),
    ([{"path": "x", "service": "http://h"}], "^The last ingress rule must match all URLs"),
    ([{"service": "http://h"}, LAST], "^Rule #1 is matching the hostname '', but this will match every hostname"),
    ([{"hostname": "*", "service": "http://h"}, LAST], r"^Rule #1 is matching the hostname '\*'"),
    ([{"hostname": "a.b", "path": "(", "service": "http://h"}, LAST], "^Rule #1 has an invalid regex: "),
    ([{"hostname": "a.b", "path": "(?=x)", "service": "http://h"}, LAST], "^Rule #1 has an invalid regex: "),
    ([{"service": ""}], "is an invalid address, please make sure it has a scheme and a hostname$"),
    ([{"service": "localhost:8080"}], "localhost:8080 is an invalid address, please make sure"),
    ([{"service": "127.0.0.1:8080"}], "first path segment in URL cannot contain colon"),
    ([{"service": "http://"}], "http:// is an invalid address, please make sure"),
    (
        [{"service": "http://h/"}],
        "http://h/ is an invalid address, ingress rules don't support proxying to",
    ),
    ([{"service": "http://h/x"}], "http://h/x is an invalid address, ingress rules don't support"),
    ([{"service": "http://u:hunter2@h/x"}], "^http://h/x is an invalid address"),
    ([{"service": "http_status:abc"}], "^invalid HTTP status code"),
    ([{"service": "http_status:99"}], "^invalid HTTP status code"),
    ([{"service": "http_status:1000"}], "^invalid HTTP status code"),
    ([{"service": "http_status:" + "9" * 5_000}], "^invalid HTTP status code: 9{20} is not between"),
    ([{"service": "http_status:-200"}], "^invalid HTTP status code: -200 is not between"),
    (
        [{"service": "http://h", "originRequest": {"access": {"required": True, "audTag": ["x"]}}}],
        "^access.TeamName cannot be blank when access.audTags are present$",
    ),
    (
        [{"service": "socks-proxy", "originRequest": {"ipRules": [{"ports": [80]}]}}],
        "^unable to create ip rule for socks-proxy: ",
    ),
    (
        [{"service": "socks-proxy", "originRequest": {"ipRules": [{"prefix": "10.0.0.0/8", "ports": [0]}]}}],
        "^unable to create ip rule for socks-proxy: invalid port 0, needs",
    ),
]


@pytest.mark.parametrize(("entries", "words"), INVALID)
def test_invalid_rules_are_refused_with_cloudflareds_words(entries: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_remote_config(1, {"ingress": entries})


SERVICES: list[tuple[str, dict[str, Any]]] = [
    ("http://h", {"kind": ServiceKind.HTTP, "host": "h", "port": 80, "tls": False}),
    ("HTTPS://h", {"kind": ServiceKind.HTTP, "host": "h", "port": 443, "tls": True}),
    ("ws://h:9001", {"kind": ServiceKind.HTTP, "host": "h", "port": 9001, "tls": False}),
    ("wss://h", {"kind": ServiceKind.HTTP, "port": 443, "tls": True}),
    ("http://[::1]:80", {"host": "::1", "authority": "[::1]"}),
    ("unix:/run/x.sock", {"kind": ServiceKind.HTTP, "path": "/run/x.sock", "tls": False, "authority": "localhost"}),
    ("unix+tls:x.sock", {"kind": ServiceKind.HTTP, "path": "x.sock", "tls": True}),
    ("http_status:503", {"kind": ServiceKind.STATUS, "status": 503}),
    ("http_status:+0404", {"kind": ServiceKind.STATUS, "status": 404}),
    ("hello_world", {"kind": ServiceKind.HELLO}),
    ("hello-world", {"kind": ServiceKind.HELLO}),
    ("bastion", {"kind": ServiceKind.BASTION}),
    ("socks-proxy", {"kind": ServiceKind.SOCKS}),
    ("tcp://h", {"kind": ServiceKind.TCP, "port": 7864}),
    ("ssh://h", {"kind": ServiceKind.TCP, "port": 22}),
    ("rdp://h", {"kind": ServiceKind.TCP, "port": 3389}),
    ("smb://h", {"kind": ServiceKind.TCP, "port": 445}),
    ("foo://h:5", {"kind": ServiceKind.TCP, "port": 5}),
]


@pytest.mark.parametrize(("text", "expected"), SERVICES)
def test_services(text: str, expected: dict[str, Any]) -> None:
    service = parse_service(text)
    assert {name: getattr(service, name) for name in expected} == expected


DOUBTFUL: list[tuple[dict[str, Any], str]] = [
    ({"service": "http://h:99999"}, "Rule #1: service: the port of http://h:99999 is beyond 65535"),
    ({"service": "foo://h"}, "Rule #1: service: foo://h has no port, and the scheme foo has no default"),
    ({"service": "http://h", "originRequest": {"httpHostHeader": "a\r\nb"}}, "httpHostHeader: 'a.r.nb' is not a host"),
    ({"service": "socks-proxy"}, "ipRules: the rule has none of its own, so every destination is refused"),
    ({"service": "http://h", "originRequest": {"access": {"required": True, "teamName": "t"}}}, "nobody is let in"),
    ({"service": "http://h", "hostname": "*.bücher.de"}, r"browsers send \*.xn--bcher-kva.de"),
    ({"service": "http://h", "hostname": "*foo"}, "matches only itself"),
    ({"service": "tcp://h:1", "originRequest": {"connectTimeout": -1}}, "connectTimeout: -1 s are over before"),
    ({"service": "http://h", "originRequest": {"tlsTimeout": -1}}, "tlsTimeout: -1 s are over before"),
]


@pytest.mark.parametrize(("rule", "words"), DOUBTFUL)
def test_what_cloudflared_takes_but_cannot_work_is_warned_about(rule: dict[str, Any], words: str) -> None:
    entries = [rule, LAST] if "hostname" in rule else [rule]
    ingress = parse_remote_config(1, {"ingress": entries})
    assert len(ingress.warnings) == 1
    assert re.search(words, ingress.warnings[0])


def test_a_negative_limit_of_private_flows_is_warned_about() -> None:
    ingress = parse_remote_config(1, {"warp-routing": {"connectTimeout": -1}})
    assert ingress.warnings == (
        "warp-routing.connectTimeout: -1 s are over before they begin; every connection will fail",
    )


def test_a_socks_proxy_obeys_its_own_rules_only() -> None:
    own = [{"prefix": "10.1.2.3/8", "ports": [443, 80], "allow": True}]
    ingress = parse_remote_config(
        1, {"ingress": [{"service": "socks-proxy", "originRequest": {"ipRules": own}}],
            "originRequest": {"ipRules": [{"prefix": "nonsense"}, {"prefix": "::/0"}]}},
    )  # fmt: skip
    assert ingress.rules[0].ip_rules == (IPRule(ip_network("10.0.0.0/8"), (80, 443), True),)
    assert ingress.defaults.ip_rules == (IPRule(ip_network("::/0")),)


def test_extensions() -> None:
    settings = (
        rules(originRequest={"wsKeepAlive": 40, "wsSubprotocols": ["mqtt"], "proxyProtocol": "v2", "accessLog": True})
        .rules[0]
        .settings
    )
    assert (settings.ws_keep_alive, settings.ws_subprotocols) == (40, ("mqtt",))
    assert (settings.proxy_protocol, settings.access_log) == ("v2", True)


@pytest.mark.parametrize(("written", "seconds"), [(True, 40), (False, 0), (0, 0), (7, 7)])
def test_a_websocket_is_kept_alive_for_the_usual_time(written: object, seconds: int) -> None:
    assert rules(originRequest={"wsKeepAlive": written}).rules[0].settings.ws_keep_alive == seconds


def test_defaults_of_this_process_are_for_rules_that_say_nothing() -> None:
    base = OriginSettings(ws_keep_alive=40, ws_subprotocols=("mqtt",), proxy_protocol="v2", connect_timeout=30)
    own = {"service": "http://h", "hostname": "a", "originRequest": {"wsKeepAlive": 0, "proxyProtocol": ""}}
    config = {"originRequest": {"wsSubprotocols": ["v12.stomp"]}, "ingress": [own, {"service": "http://h"}]}
    first, second = parse_remote_config(1, config, base).rules
    assert (first.settings.ws_keep_alive, first.settings.proxy_protocol) == (0, "")
    assert (second.settings.ws_keep_alive, second.settings.proxy_protocol) == (40, "v2")
    assert first.settings.ws_subprotocols == second.settings.ws_subprotocols == ("v12.stomp",)


@pytest.mark.parametrize(
    "wrong", [{"wsKeepAlive": -1}, {"proxyProtocol": "v1"}, {"wsSubprotocols": ["a b"]}, {"accessLog": "yes"}]
)
def test_extensions_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        rules(originRequest=wrong)


def test_bastion_mode_overrides_a_url() -> None:
    assert parse_service("http://h", bastion=True).kind is ServiceKind.BASTION
    assert parse_service("http_status:200", bastion=True).kind is ServiceKind.STATUS


MATCHES: list[tuple[str, str, int]] = [
    ("app.example.com", "/", 1),
    ("app.example.com", "/api/x", 0),
    ("app.example.com", "/%61pi", 0),
    ("app.example.com", "/x?/api", 1),
    ("app.example.com:8443", "/api", 0),
    ("x.example.com", "/", 2),
    ("a.b.example.com", "/", 2),
    ("example.com", "/", 4),
    ("App.Example.com", "/", 4),
    ("xn--bcher-kva.de", "/", 3),
    ("bücher.de", "/", 3),
    ("[::1]:80", "/", 4),
    ("", "", 4),
    ("*foo", "/", 4),
]


@pytest.mark.parametrize(("host", "target", "index"), MATCHES)
def test_the_first_rule_that_matches_serves(host: str, target: str, index: int) -> None:
    ingress = rules(
        {"hostname": "app.example.com", "path": "^/api", "service": "http://h"},
        {"hostname": "app.example.com", "service": "http://h"},
        {"hostname": "*.example.com", "service": "http://h"},
        {"hostname": "bücher.de", "service": "http://h"},
    )
    for _ in range(2):
        assert ingress.match(host.encode(), target.encode()).index == index
    assert ingress.match(host, target).index == index


def test_a_path_without_hostname_matches_every_host() -> None:
    ingress = rules({"path": r"\.png$", "service": "http://h"})
    assert ingress.match(b"any", b"/a.png").index == 0
    assert ingress.match(b"any", b"/a.png/b").index == 1
    assert ingress.match(b"any", b"/a.png%0a").index == 1


def test_hosts_cannot_fill_the_memory() -> None:
    ingress = rules({"hostname": "*.example.com", "service": "http://h"})
    for number in range(3 * MATCH_CACHE):
        assert ingress.match(b"%d.example.com" % number, b"/").index == 0
    assert len(ingress._hosts) <= MATCH_CACHE


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("localhost:8080", "localhost", 8080),
        ("http://h:1/path", "h", 1),
        ("https://h", "h", 443),
        ("[::1]:5", "::1", 5),
    ],
)
def test_single_origin_from_a_flag(url: str, host: str, port: int) -> None:
    service = ingress_from_url(url).match(b"any", b"/x").service
    assert (service.host, service.port) == (host, port)


def test_single_origin_of_an_unknown_scheme() -> None:
    with pytest.raises(ConfigError, match=r"Currently Cloudflare Tunnel does not support gopher protocol\.$"):
        ingress_from_url("gopher://h")
