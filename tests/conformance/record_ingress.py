"""Asks cloudflared what it makes of the corpus of configurations, and writes its answers down.

    CLOUDFLARED=/path/to/cloudflared python -m tests.conformance.record_ingress

The result is `ingress_verdicts.json`, which test_ingress_corpus.py holds this program to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("ingress_verdicts.json")

LAST = "  - service: http_status:404\n"
FILES = [
    "ingress:\n" + LAST,
    "",
    "# x\n",
    "---\n",
    "null\n",
    "foo\n",
    "5\n",
    "[]\n",
    "{}\n",
    "ingress: []\n",
    "ingress:\n",
    "ingress: {}\n",
    "ingress: 5\n",
    "ingress:\n  - 5\n",
    "ingress:\n  - null\n",
    "ingress:\n  - \n" + LAST,
    "ingress:\n  - service: 5\n",
    "ingress:\n  - service: yes\n",
    "ingress:\n  - service: null\n",
    "ingress:\n  - service: [a]\n",
    "ingress:\n  - service: {a: b}\n",
    "ingress:\n  - service: 2001-01-01\n",
    "ingress:\n  - hostname: *\n    service: http://h\n",
    'ingress:\n  - hostname: "*"\n    service: http://h\n',
    "ingress:\n  - hostname: *.foo\n    service: http://h\n" + LAST,
    "ingress:\n  - service: http_status:404\n    service: http_status:405\n",
    "ingress:\n" + LAST + "ingress:\n" + LAST,
    "foo: 1\nfoo: 2\ningress:\n" + LAST,
    "ingress:\n  - service: http_status:404\n    Service: x\n    extra: 1\n",
    "Ingress:\n" + LAST,
    "a: &a {noTLSVerify: true}\ningress:\n  - service: http_status:404\n    originRequest: *a\n",
    "a: &a {noTLSVerify: true, foo: 1}\ningress:\n  - service: http_status:404\n"
    "    originRequest:\n      <<: *a\n      connectTimeout: 5s\n",
    "a: &a {x: y}\ningress:\n  - service: http_status:404\n    originRequest:\n      <<: 5\n",
    "---\ningress:\n" + LAST + "---\nfoo: [\n",
    "ingress:\n\t- service: x\n",
    "ingress: [{service: 'http_status:404'}]\n",
    "tunnel: 5\ningress:\n" + LAST,
    "tunnel: [5]\ningress:\n" + LAST,
    "tunnel:\ningress:\n" + LAST,
    "warp-routing: 5\ningress:\n" + LAST,
    "warp-routing: {enabled: true}\ningress:\n" + LAST,
    "warp-routing: {maxActiveFlows: -1}\ningress:\n" + LAST,
    "warp-routing: {maxActiveFlows: 18446744073709551615}\ningress:\n" + LAST,
    "warp-routing: {maxActiveFlows: 18446744073709551616}\ningress:\n" + LAST,
    "warp-routing: {connectTimeout: 1}\ningress:\n" + LAST,
    "loglevel: 5\ningress:\n" + LAST,
    "retries: x\ningress:\n" + LAST,
    "url: http://x\ningress:\n" + LAST,
    "hello-world: true\ningress:\n" + LAST,
    "edge-ip-version: 4\ningress:\n" + LAST,
    "metrics: [1]\ningress:\n" + LAST,
    "token: abc\ningress:\n" + LAST,
    "grace-period: 5\ningress:\n" + LAST,
    "protocol: foo\ningress:\n" + LAST,
    "\xef\xbb\xbfingress:\n" + LAST,
    'ingress:\n  - service: "http_status:404\\u0000"\n',
    "ingress:\n  - service: !!str http_status:404\n",
    "ingress:\n  - service: !foo http_status:404\n",
    "ingress:\n  - service: http_status:404 # x\n",
    "ingress:\n  - service: 'http_status:404\n",
    "ingress:\n  - service: >\n      http_status:404\n",
    "? {a: b}\n: c\ningress:\n" + LAST,
    "1: 2\ningress:\n" + LAST,
    "true: 2\ningress:\n" + LAST,
    "ingress:\n- service: http://h\n  hostname: a.b\n  originRequest: null\n"
    "- service: http_status:4\n  originRequest:\n",
    "ingress:\n- service: http_status:404\n  originRequest: 5\n",
    "ingress:\n- service: http_status:404\n  originRequest: []\n",
    "originRequest: []\ningress:\n" + LAST,
    "originRequest: x\ningress:\n" + LAST,
    "ingress: &i\n" + LAST + "x: *i\n",
    "ingress: *i\n",
    "%YAML 1.1\n---\ningress:\n" + LAST,
    "ingress:\n - service: http_status:404\n   path:\n",
    "ingress:\n - service: http_status:0404\n",
    "ingress:\n - service: http_status:+404\n",
    "ingress:\n - service: http_status: 404\n",
    "a: &a\n  b: *a\ningress:\n" + LAST,
    "a: &a [*a]\ningress:\n" + LAST,
    "ingress:\n  - service: http_status:404\n    originRequest: {noTLSVerify: true, noTLSVerify: false}\n",
    "ingress:\n  - service: !!binary aHR0cDovL2g=\n",
    "ingress:\n  - service: !!null x\n",
    "ingress:\n  - service: http_status:404\n    originRequest: {noTLSVerify: !!str true}\n",
    "ingress:\n  - service: http_status:404\n    originRequest: {noTLSVerify: !!bool 'true'}\n",
    "ingress:\n  - service: http_status:404\n    originRequest: {keepAliveConnections: !!int '5'}\n",
    "%YAML 1.2\n---\ningress:\n" + LAST,
    "ingress:\r\n  - service: http_status:404\r\n",
    "--- \ningress:\n" + LAST + "...\n",
    "ingress:\n  - hostname: '*'\n    path: /x\n    service: http://h\n" + LAST,
    "ingress:\n  - path: /x\n    service: http://h\n",
    'ingress:\n  - service: "http://h\\n"\n',
]
SETTINGS = {
    "connectTimeout": [
        "30s",
        "5",
        "'5'",
        "0",
        "'0'",
        '"30s"',
        "1.5h",
        "-5s",
        "1h1m1s1ms1us1ns",
        "1µs",
        "5x",
        "''",
        "~",
        "[5s]",
        "true",
        "yes",
        "1.5",
        "+5s",
        ".5s",
        "5.s",
        "5 s",
        "9999999999h",
    ],
    "noTLSVerify": [
        "true",
        "True",
        "TRUE",
        "tRUE",
        "yes",
        "Yes",
        "y",
        "Y",
        "on",
        "On",
        "off",
        "no",
        "n",
        "0",
        "1",
        "'true'",
        '"yes"',
        "''",
        "~",
    ],
    "keepAliveConnections": [
        "5",
        "0x10",
        "010",
        "0o10",
        "0b11",
        "1_000",
        "1.5",
        "1e3",
        "'5'",
        "-5",
        "99999999999999999999",
        "9223372036854775807",
        "9223372036854775808",
        "true",
        ".inf",
        "1.0",
        ".5",
    ],
    "proxyPort": ["5", "-1", "1.5", "99999999", "'1'", "18446744073709551616", "1e25"],
    "httpHostHeader": ["a", "5", "1.50", "true", "~", "null", "''", "[a]", "{a: b}", "2001-01-01", "0x10"],
    "caPool": ["/nonexistent"],
    "ipRules": [
        "[]",
        "~",
        "5",
        "[{prefix: 10.0.0.0/8, ports: [80], allow: true}]",
        "[{prefix: 10.0.0.0/8, ports: ['80']}]",
        "[{prefix: x}]",
        "[5]",
        "[{foo: 1}]",
        "[{ports: [80.5]}]",
    ],
    "access": [
        "~",
        "true",
        "{}",
        "{required: true}",
        "{required: true, audTag: [a]}",
        "{required: true, audTag: [a], teamName: t}",
        "{required: true, audTag: a}",
        "{required: 1}",
        "{required: 'true'}",
        "{audTag: [5, null]}",
        "{teamName: 5, foo: 6}",
    ],
    "bastionMode": ["true"],
    "http2Origin": ["true"],
    "proxyType": ["socks", "foo"],
    "proxyAddress": ["x"],
    "matchSNItoHost": ["true"],
    "matchSNIToHost": ["true"],
    "disableChunkedEncoding": ["maybe"],
    "originServerName": ["x"],
    "tlsTimeout": ["1s"],
    "tcpKeepAlive": ["1s"],
    "keepAliveTimeout": ["x"],
    "noHappyEyeballs": ["true"],
    "foo": ["1"],
}
for k, vs in SETTINGS.items():
    for v in vs:
        FILES.append(f"ingress:\n  - service: http://h\n    originRequest: {{{k}: {v}}}\n")
    FILES.append(f"originRequest: {{{k}: {vs[0]}}}\ningress:\n  - service: http://h\n")
FILES += [
    f"ingress:\n  - service: {s}\n    originRequest: {{ipRules: [{r}]}}\n"
    for s in ("socks-proxy", "http://h")
    for r in (
        "{prefix: 10.0.0.0/8}",
        "{prefix: 10.0.0.1/8, ports: [0]}",
        "{prefix: 10.0.0.1}",
        "{prefix: 10.0.0.01/8}",
        "{prefix: '::/0'}",
        "{prefix: '::1%eth0/128'}",
        "{prefix: 10.0.0.0/33}",
        "{prefix: 10.0.0.0/255.0.0.0}",
        "{prefix: ''}",
        "{ports: [65536], prefix: 1.2.3.4/32}",
        "{prefix: 10.0.0.0/08}",
        "{prefix: '::ffff:1.2.3.4/120'}",
        "{prefix: 010.0.0.0/8}",
        "{prefix: ' 10.0.0.0/8'}",
    )
]

SERVICES = [
    "http://h",
    "http://h:",
    "http://h:80:90",
    "http://::1",
    "http://[::1]",
    "http://[::1]:80",
    "http://[::1",
    "http://a[::1]",
    "http://[1.2.3.4]",
    "http://[zz]",
    "http://[fe80::1%25eth0]:80",
    "http://[fe80::1%eth0]",
    "http://a b",
    "http://a%20b",
    "http://a%zz",
    "http://a%C3%BC",
    "http://bücher.de:80",
    "http://u:p@h",
    "http://u:p@h@i",
    "http://u p@h",
    "http://h?x",
    "http://h?",
    "http://h#f",
    "http://h#",
    "http://h?q#%zz",
    "HTTP://H",
    "h:80",
    "127.0.0.1:80",
    "localhost:8080",
    "http:h",
    "http:/h",
    "//h",
    "/h",
    "http:///x",
    "http://h/",
    "http://h//",
    "*",
    ":x",
    "1http://h",
    "ht_tp://h",
    "http://h\x01",
    "http://h\\x",
    "http://h|x",
    "http://h<x>",
    'http://h"x',
    "http://h:8a",
    "http://",
    "http://:80",
    "http://h:99999",
    "tcp://h",
    "ssh://h:",
    "foo+bar://h",
    "ssh://[::1]",
    "tcp://h:1?x=2",
    "tcp://u:p@h",
    "http://h%2580",
    "http://h%25",
    "unix:",
    "",
    "http://h\u0085",
    "http://h:０",
    " http://h",
    "http://h ",
    "http://h:80/%2f",
    "rdp://bü.de",
    "h",
    "http://h^",
    "http://h`",
    "http://h{}",
    "http://..",
    "http://*",
]
PATHS = [
    "(",
    "a**",
    "(?=x)",
    "[z-a]",
    "\\Z",
    "a{1001}",
    "a)",
    "\\",
    "(?P<1>x)",
    "(?P<n>x)(?P<n>y)",
    "*a",
    "[",
    "(?i",
    "\\pN",
    "\\p{Foo}",
    "\\C",
    "(?<n>a)",
    "((a{100}){100}){100}",
    "a{,2}",
    "x{2,1}",
    "(?U)a+",
    "[[:foo:]]",
    "\\8",
    "\\x{110000}",
    "(a{1000}){2}",
    "(?",
    ")",
    "(?)",
    "(?:)",
    "()",
    "a(?i)b",
    "(?i-s:x)",
    "(?-)",
    "(?i-)",
    "(?P<>x)",
    "(?P<n",
    "(?P=n)",
    "(?<!a)",
    "(?#c)",
    "a++",
    "a?+",
    "a*?",
    "a??",
    "a???",
    "[a",
    "[]a]",
    "[^]a]",
    "[a-\\d]",
    "[\\d-z]",
    "\\Qab",
    "\\E",
    "\\Q\\E*",
    "^*",
    "$*",
    "\\b+",
    "(?:^)*",
    "|",
    "||",
    "*",
    "+",
    "?",
    "a|*",
    "(*)",
    "{",
    "{1}",
    "a{1",
    "a{1,",
    "a{1}{2}",
    "a{1}*",
    "a{1}?",
    "\\x",
    "\\xg",
    "\\x{",
    "\\x{}",
    "\\x4",
    "\\0",
    "\\01",
    "\\1",
    "\\18",
    "\\a\\f\\n\\r\\t\\v",
    "\\_",
    "\\é",
    "\\-",
    "[[:^alpha:]]",
    "[[:alpha:]",
    "[\\Q]\\E]",
    "\\pL",
    "\\p{Greek}",
    "\\P{^Greek}",
    "\\p{^Greek}",
    "\\p",
    "\\p{",
    "\\p{Any}",
    "\\pZ",
    "(?s).",
    "(?x) a",
    "(?L)a",
    "(?u)a",
    "(?m)^a$",
    "a{0}",
    "a{0,0}",
    "a{1000}",
    "(a{500}){3}",
    "(?i)K",
    "[K-k]",
    "(?P<name>a)(?P=name)",
    "(?>a)",
    "a{1,1000}{1,2}",
    "x{1000}{1}",
    "(a*)*",
    "(a|aa)+$",
    "\\z",
    "\\A",
    "\\G",
    "\\R",
    "\\X",
    "\\K",
    "\\h",
    "\\H",
    "\\N",
    "\\u0041",
    "\\N{DIGIT}",
    "(?(1)a|b)",
    "[a-z&&[aeiou]]",
    "[\\w-\\s]",
    "[--/]",
    "[+--]",
    "[a\\]",
    "\\cA",
    "\\p{L}",
    "\\p{Letter}",
    "\\p{greek}",
    "\\p{Latin}",
    "\\p{Lu}",
    "(?P<ü>x)",
    "(?P<a b>x)",
    "(?P<a-b>x)",
    "(" * 1000 + ")" * 1000,
    "(" * 1001 + ")" * 1001,
    "((((((((((x{2}){2}){2}){2}){2}){2}){2}){2}){2}){2})",
    "\\p{IsGreek}",
    "\ufffd",
    "[\u00e9-\u00ea]",
    "\\d+{2}",
    "(?i)(?-i)a",
    "\\pL*?",
    "[[:word:]]",
    "[[:ascii:]]",
    "[\\pN]",
    "[\\p{Foo}]",
    "[\\C]",
    "[\\z]",
    "[\\A]",
    "[\\b]",
    "[\\B]",
    "\\B",
    "(?P<n>",
    "(?P",
    "(?P>",
    "(?Pn)",
    "(?'n'a)",
    "a{99999999999}",
    "a{2,99999999999}",
    "x{0,1001}",
]
HOSTS = [
    "App.Example.com", "*.bücher.de", "bücher.de", "BÜCHER.de", "faß.de", "☃.net", "_x.Example.com", "-a.Example.com",
    "a-.Ex.com", "ab--c.Ex.com", "xn--bcher-kva.De", "Ex.com.", ".Ex.com", "a..Ex.com", "büc_her.de", "ﬁ.de",
    "a。Ex.com", "x" * 70 + ".Ex.com", "ü" * 70 + ".de", "*.example.com", "*example.com", "*", "example.com",
    "a:80", "[::1]:80", "[::1]", "::1", "a:", ":80", "a.*.b", "**.a", "*.*.a", "a*", "*.", "*.a.b:80", "a:b:c", "a b",
]  # fmt: skip
REQUESTS = [
    "app.example.com", "App.Example.com", "x.bücher.de", "x.xn--bcher-kva.de", "xn--bcher-kva.de", "bücher.de",
    "BÜCHER.de", "xn--fa-hia.de", "fass.de", "xn--n3h.net", "_x.example.com", "_x.Example.com", "-a.example.com",
    "a-.ex.com", "ab--c.ex.com", "ex.com.", "ex.com", "a..ex.com", "fi.de", "a.ex.com", "a.b.example.com",
    "example.com", ".example.com", "*.example.com", "xexample.com", "[::1]", "a",
]  # fmt: skip
EXAMPLE = """\
ingress:
  - hostname: app.example.com
    path: ^/api
    service: https://localhost:8443
    originRequest: {noTLSVerify: true, connectTimeout: 10s}
  - hostname: "*.example.com"
    service: http://10.0.0.5:80
  - hostname: static.example.org
    path: \\.(jpg|png|css)$
    service: unix:/run/static.sock
  - hostname: ssh.example.org
    service: ssh://u:p@localhost
  - path: (?i)^/HELLO/[0-9]+
    service: hello-world
  - hostname: "*"
    path: /bastion
    service: http://localhost
    originRequest: {bastionMode: true}
  - hostname: café.example.org
    path: "^/é$"
    service: socks-proxy
  - service: http_status:404
originRequest: {keepAliveTimeout: 60s}
warp-routing: {maxActiveFlows: 1000}
"""
URLS = [
    "https://app.example.com/api/x", "https://app.example.com/x", "https://app.example.com", "http://x.example.com:8443/",
    "https://example.com/", "https://static.example.org/a.png", "https://static.example.org/a.png?x",
    "https://static.example.org/a?x=.png", "https://static.example.org/a.png/", "https://static.example.org/a%2epng",
    "https://static.example.org/a.png%0a", "ssh://ssh.example.org", "https://any/hello/7", "https://any/x/hello/7",
    "https://any/bastion", "https://caf%C3%A9.example.org/%C3%A9", "https://café.example.org/é",
    "https://xn--caf-dma.example.org/%c3%a9", "https://café.example.org/%e9", "app.example.com", "app.example.com/api",
    "app.example.com:443/api", "//app.example.com/api", "/api", "https:///api", "https://", "", ":", "https://a b/",
    "https://[::1]/hello/1", "https://[::1]:80/hello/1", "mailto:x@app.example.com", "https://u:p@app.example.com/api",
    "HTTPS://APP.EXAMPLE.COM/api", "https://app.example.com./api", "https://app.example.com/%zz",
    "https://app.example.com//api", "https://app.example.com/a/../api", "*",
]  # fmt: skip
TEXTS = [
    "", "{}", "null", "[]", "5", "{", '{"ingress":[]}', '{"ingress":null}', '{"ingress":{}}', '{"ingress":[null]}',
    '{"ingress":[{"service":"http_status:404"}]}', '{"INGRESS":[{"SERVICE":"http_status:404"}]}',
    '{"ingress":[{"service":5}]}', '{"ingress":[{"service":null}]}', '{"ingress":[5]}',
    '{"ingress":[{"service":"http_status:404","foo":{}}],"bar":[]}', '{"ingress":[{"service":"http_status:404"}]} x',
    '{"ingress":[{"service":"http_status:404"}],"originRequest":5}', '{"ingress":[{"service":"unix:/\\ud800"}]}',
    '{"ingress":[{"service":"http_status:404"}],"warp-routing":5}',
    '{"ingress":[{"service":"http_status:404"}],"WarpRouting":5}',
    '{"ingress":[{"service":"http_status:404"}],"warprouting":{"maxActiveFlows":-1}}',
    '{"ingress":[{"service":"http_status:404"}],"warprouting":{"maxActiveFlows":18446744073709551615}}',
    '{"ingress":[{"service":"http_status:404"}],"warprouting":{"connectTimeout":5,"tcpKeepAlive":null}}',
    '{"ingress":[{"hostname":"a.b","service":"http://h"},{"service":"http_status:404","originRequest":null}]}',
]  # fmt: skip
JSON_VALUES = {
    "connectTimeout": ["5", "0", "-5", "1.5", "1.0", "1e3", '"5"', '"5s"', "null", "true", "[]", "9223372036854775807",
                       "9223372036854775808", "1" + "0" * 400, "-0"],
    "noTLSVerify": ["true", "false", "null", "0", "1", '"true"', "[]"],
    "keepAliveConnections": ["5", "1.0", "1e2", "-1", "null", '"5"', "9223372036854775807", "9223372036854775808"],
    "proxyPort": ["5", "-1", "1.5", "18446744073709551615", "18446744073709551616"],
    "httpHostHeader": ['"a"', "5", "null", '""', "[]", '"a b"'],
    "ipRules": ["[]", "null", "{}", "[null]", '[{"prefix":5}]', '[{"prefix":"x"}]', '[{"ports":["80"]}]',
                '[{"ports":null,"prefix":null}]', '[{"ports":[null]}]', '[{"allow":"yes"}]'],
    "access": ["null", "{}", "5", '{"required":true}', '{"required":"true"}', '{"required":true,"audTag":["a"]}',
               '{"required":true,"audTag":["a"],"teamName":"t"}', '{"required":true,"audTag":"a"}', '{"audTag":[null]}',
               '{"required":false,"audTag":["a"]}', '{"AUDTAG":["a"],"REQUIRED":true}'],
    "NOTLSVERIFY": ["5", "true"], "http2Origin": ["true", "5"], "bastionMode": ["true"],
}  # fmt: skip


def cases() -> list[dict[str, Any]]:
    """Return every case: `args` behind `tunnel [--config FILE]`, and the text of FILE where there is one."""
    found: list[dict[str, Any]] = []

    def add(args: list[str], file: str | None = None) -> None:
        case: dict[str, Any] = {"args": args}
        if file is not None:
            case["file"] = file
        if case not in found:
            found.append(case)

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)  # JSON is YAML

    for file in FILES:
        add(["ingress", "validate"], file)
    for service in SERVICES:
        add(["ingress", "validate"], f"ingress: [{{service: {text(service)}}}]\n")
        add(["ingress", "rule", "https://a/"], f"ingress: [{{service: {text(service)}}}]\n")
    for path in PATHS:
        rule = {"hostname": "a.b", "path": path, "service": "http://h"}
        add(["ingress", "validate", "--json", text({"Ingress": [rule, {"service": "http_status:404"}]})])
    for host in HOSTS:
        add(["ingress", "validate"], f"ingress: [{{hostname: {text(host)}, service: http://h}},\n{LAST.strip()[2:]}]\n")
    wide = [host for host in HOSTS if "*" not in host[1:] and ":" not in host and host != "*"]
    rules = "".join(f"  - {{hostname: {text(host)}, service: unix:{number}}}\n" for number, host in enumerate(wide))
    for host in REQUESTS:
        add(["ingress", "rule", f"https://{host}/"], f"ingress:\n{rules}{LAST}")
    for url in URLS:
        add(["ingress", "rule", url], EXAMPLE)
    add(["ingress", "validate"], EXAMPLE)
    add(["ingress", "validate"])
    add(["ingress", "rule", "https://a/"])
    add(["ingress", "rule", "https://a/"], "")
    add(["ingress", "rule", "https://a/"], "tunnel: x\n")
    add(["--url", "http://x", "ingress", "validate"], EXAMPLE)
    for line in TEXTS:
        add(["ingress", "validate", "--json", line])
    for key, values in JSON_VALUES.items():
        for value in values:
            head = '{"ingress":[{"service":"socks-proxy","originRequest":' if key == "ipRules" else None
            head = head or '{"ingress":[{"service":"http://h","originRequest":'
            add(["ingress", "validate", "--json", f'{head}{{"{key}":{value}}}}}]}}'])
    return found


def ask(command: str, case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return cloudflared's answer: status, stdout and stderr; the file's path is written as FILE."""
    words = [command, "tunnel"]
    path = directory / f"{abs(hash(json.dumps(case)))}.yml"
    if "file" in case:
        path.write_text(case["file"], encoding="utf-8")
        words += ["--config", str(path)]
    environ = {"HOME": str(directory), "PATH": os.environ.get("PATH", "")}
    done = subprocess.run([*words, *case["args"]], capture_output=True, timeout=60, env=environ, check=False)
    out, err = (part.decode("utf-8", "replace").replace(str(path), "FILE") for part in (done.stdout, done.stderr))
    # Log lines carry the time of day.
    err = "".join(line for line in err.splitlines(keepends=True) if not line[:4].isdigit())
    return {"status": done.returncode, "stdout": out, "stderr": err}


def record(command: str) -> list[dict[str, Any]]:
    """Ask everything."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        every = cases()
        return [
            {**case, **answer}
            for case, answer in zip(every, pool.map(lambda case: ask(command, case, Path(name)), every), strict=True)
        ]


if __name__ == "__main__":
    if "CLOUDFLARED" not in os.environ:
        sys.exit("CLOUDFLARED is not set")
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in record(os.environ["CLOUDFLARED"]))
    RECORDED.write_text(f"[\n{lines}\n]\n")
