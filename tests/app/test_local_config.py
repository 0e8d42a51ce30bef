"""The configuration file: where it is found, what it sets, the credentials it leads to, and its rules at the start."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from connector.app import local_config
from connector.app.cli import main
from connector.app.config import RunConfig, run_config
from connector.app.flags import Flags, parse_level
from connector.app.local_config import configured_flags, find_config, find_token
from connector.app.origin_flags import start_rules
from connector.errors import ConfigError, ConnectorError, UsageError
from connector.proxy.ingress import DEFAULT_INGRESS, OriginSettings, ServiceKind

ID = "f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b"
SECRET = bytes(range(32))
CREDENTIALS = {
    "AccountTag": "0123456789abcdef0123456789abcdef",
    "TunnelSecret": base64.b64encode(SECRET).decode(),
    "TunnelID": ID,
    "Endpoint": "",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Default directories of this test only; those of the machine are not looked at."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(local_config, "DIRECTORIES", ("~/first", "~/second"))
    return tmp_path


def start(text: str, *argv: str, path: Path, env: dict[str, str] | None = None) -> tuple[Flags, Any]:
    file = path / "c.yml"
    file.write_text(text)
    return configured_flags(Flags([parse_level(["--config", str(file), *argv])], env or {}))


def test_the_first_default_file_is_taken(home: Path) -> None:
    assert find_config() == ""
    assert configured_flags(Flags([parse_level([])], {}))[1] is None
    for name in ("second/config.yml", "first/config.yaml", "first/config.yml"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(f"tunnel: {name}\n")
        _, local = configured_flags(Flags([parse_level([])], {}))
        assert local is not None
        assert local.file.tunnel == name


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="open /does/not/exist: no such file or directory"):
        configured_flags(Flags([parse_level(["--config", "/does/not/exist"])], {}))
    with pytest.raises(ConfigError, match="is a directory"):
        configured_flags(Flags([parse_level(["--config", str(tmp_path)])], {}))


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_bytes(b"#" * (local_config.MAX_FILE + 1))
    with pytest.raises(ConfigError, match="larger than 1024 KiB"):
        configured_flags(Flags([parse_level(["--config", str(tmp_path / "c.yml")])], {}))


def test_command_line_beats_environment_beats_file(home: Path) -> None:
    text = (
        "loglevel: debug\nretries: 7\nmetrics: localhost:1\ngrace-period: 45s\nedge: [a:1, b:2]\nno-autoupdate: true\n"
    )
    flags, _ = start(text, "--retries", "3", path=home, env={"TUNNEL_METRICS": "localhost:2"})
    assert flags.text("loglevel") == "debug"
    assert flags.number("retries") == 3
    assert flags.text("metrics") == "localhost:2"
    assert flags.number("grace-period") == 45
    assert flags.texts("edge") == ["a:1", "b:2"]
    assert flags.value("no-autoupdate") is True
    assert flags.source("loglevel") == f"the key loglevel of {home / 'c.yml'}"
    assert flags.settings()["grace-period"] == "45s"
    assert flags.settings()["edge"] == "[a:1 b:2]"


def test_secrets_of_a_file_are_not_shown(home: Path) -> None:
    flags, _ = start("token: hunter2\n", path=home)
    assert flags.text("token") == "hunter2"
    assert flags.settings()["token"] == "*****"


@pytest.mark.parametrize(
    "text",
    [
        "retries: 0", "retries: -1", "grace-period: 0s", "grace-period: -5s", "loglevel: ''", "no-autoupdate: false",
        "output: json", "config: x", "max-active-flows: 5",
    ],
)  # fmt: skip
def test_values_that_do_not_count(home: Path, text: str) -> None:
    flags, _ = start(text + "\n", path=home)
    name = text.partition(":")[0]
    assert flags.source(name) == ("--config" if name == "config" else "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edge-ip-version: 4", "expected string found int for edge-ip-version"),
        ("edge-ip-version: '5'", "invalid value .5. for the key edge-ip-version"),
        ("retries: five", "expected int found string for retries"),
        ("retries: true", "expected int found bool for retries"),
        ("retries: 1.5", "expected int found float64 for retries"),
        ("grace-period: 30", "expected duration found int for grace-period"),
        ("grace-period: soon", 'invalid duration "soon" for grace-period'),
        ("no-autoupdate: 1", "expected boolean found int for no-autoupdate"),
        ("loglevel:", "expected string found <nil> for loglevel"),
        ("edge: a:1", "expected string slice found string for edge"),
        ("edge: [1]", r"expected string slice found \[\]interface \{\} for edge"),
        ("metrics: {a: b}", r"expected string found map\[string\]interface \{\} for metrics"),
    ],
)
def test_types_are_strict(home: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start(text + "\n", path=home)
    name = text.partition(":")[0]
    value = {"no-autoupdate": f"--{name}=true", "retries": f"--{name}=1", "grace-period": f"--{name}=1s"}
    start(text + "\n", value.get(name, f"--{name}=4" if "ip" in name else f"--{name}=error"), path=home)


FLAGS: list[tuple[list[str], dict[str, Any], ServiceKind]] = [
    (["--url", "localhost:8080"], {}, ServiceKind.HTTP),
    (["--url", "https://h/path", "--no-tls-verify"], {"no_tls_verify": True}, ServiceKind.HTTP),
    (["--url", "tcp://h:5", "--socks5"], {"proxy_type": "socks"}, ServiceKind.TCP),
    (["--url", "ssh://h", "--proxy-connect-timeout", "5s"], {"connect_timeout": 5}, ServiceKind.TCP),
    (["--hello-world", "--url", "http://h"], {}, ServiceKind.HELLO),
    (["--bastion", "--url", "http://h"], {"bastion_mode": True}, ServiceKind.BASTION),
    (["--unix-socket", "/run/x"], {}, ServiceKind.HTTP),
    (["--proxy-tls-timeout", "1m"], {"tls_timeout": 60}, ServiceKind.STATUS),
    (["--proxy-tcp-keepalive", "500ms"], {"tcp_keep_alive": 0.5}, ServiceKind.STATUS),
    (["--proxy-no-happy-eyeballs"], {"no_happy_eyeballs": True}, ServiceKind.STATUS),
    (["--proxy-keepalive-connections", "0"], {"keep_alive_connections": 0}, ServiceKind.STATUS),
    (["--proxy-keepalive-timeout", "0s"], {"keep_alive_timeout": 0}, ServiceKind.STATUS),
    (["--http-host-header", "x"], {"http_host_header": "x"}, ServiceKind.STATUS),
    (["--origin-server-name", "x"], {"origin_server_name": "x"}, ServiceKind.STATUS),
    (["--origin-ca-pool", "x"], {"ca_pool": "x"}, ServiceKind.STATUS),
    (["--no-chunked-encoding"], {"disable_chunked_encoding": True}, ServiceKind.STATUS),
    (["--http2-origin"], {"http2_origin": True}, ServiceKind.STATUS),
    (["--proxy-address", "x", "--proxy-port", "5"], {"proxy_address": "x", "proxy_port": 5}, ServiceKind.STATUS),
    ([], {}, ServiceKind.STATUS),
]


@pytest.mark.parametrize(("argv", "changes", "kind"), FLAGS)
def test_a_single_origin_from_flags(argv: list[str], changes: dict[str, Any], kind: ServiceKind) -> None:
    ingress = start_rules(Flags([parse_level(argv)], {}), None)
    expected = OriginSettings(**changes)
    assert ingress.defaults == expected
    (rule,) = ingress.rules
    assert rule.service.kind is kind
    assert ingress.version == -1
    if kind is ServiceKind.STATUS:
        assert ingress.rules == DEFAULT_INGRESS.rules
    else:
        assert rule.settings == expected


EXTENSIONS: list[tuple[list[str], dict[str, str], str, dict[str, Any]]] = [
    (["--ws-keepalive", "--url", "http://h"], {}, "", {"ws_keep_alive": 40}),
    (["--ws-keepalive", "20s"], {}, "", {"ws_keep_alive": 20}),
    (["--ws-keepalive=true"], {}, "", {"ws_keep_alive": 40}),
    (["--ws-keepalive=off"], {"TUNNEL_WS_KEEPALIVE": "on"}, "", {}),
    ([], {"TUNNEL_WS_KEEPALIVE": "true"}, "", {"ws_keep_alive": 40}),
    ([], {}, "ws-keepalive: true", {"ws_keep_alive": 40}),
    ([], {}, "ws-keepalive: 25s", {"ws_keep_alive": 25}),
    ([], {}, "originRequest: {wsKeepAlive: true}", {"ws_keep_alive": 40}),
    ([], {}, "originRequest: {wsKeepAlive: 15s}", {"ws_keep_alive": 15}),
    ([], {"TUNNEL_WS_KEEPALIVE": "9s"}, "originRequest: {wsKeepAlive: off}", {}),
    (["--proxy-protocol", "v2"], {}, "", {"proxy_protocol": "v2"}),
    ([], {"TUNNEL_PROXY_PROTOCOL": "v2"}, "", {"proxy_protocol": "v2"}),
    ([], {}, "proxy-protocol: v2", {"proxy_protocol": "v2"}),
    (["--proxy-protocol", "v2@H:80"], {}, "", {"proxy_protocol": "v2"}),
    ([], {"TUNNEL_PROXY_PROTOCOL": "v2@mosquitto:9001"}, "", {}),
    ([], {}, "proxy-protocol: 'v2@[::1]:9001,h:80'", {"proxy_protocol": "v2"}),
    (["--ws-subprotocols", "mqtt"], {}, "", {"ws_subprotocols": ("mqtt",)}),
    ([], {"TUNNEL_WS_SUBPROTOCOLS": "mqtt, mqttv3.1"}, "", {"ws_subprotocols": ("mqtt", "mqttv3.1")}),
    ([], {}, "ws-subprotocols: [mqtt]", {"ws_subprotocols": ("mqtt",)}),
]


@pytest.mark.parametrize(("argv", "environ", "text", "changes"), EXTENSIONS)
def test_defaults_for_what_cloudflared_does_not_have(
    home: Path, argv: list[str], environ: dict[str, str], text: str, changes: dict[str, Any]
) -> None:
    (home / "config.yml").write_text(f"{text}\ningress: [{{service: http://h}}]\n")
    flags, local = configured_flags(Flags([parse_level(["--config", str(home / "config.yml"), *argv])], environ))
    assert start_rules(flags, local).rules[0].settings == OriginSettings(**changes)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ws-keepalive=-1s"], "--ws-keepalive must be 0"),
        (["--ws-subprotocols", "a b"], "--ws-subprotocols: 'a b' is not"),
        (["--proxy-protocol", "v1"], "--proxy-protocol cannot be 'v1'"),
        (["--proxy-protocol", "v2@mosquitto"], "--proxy-protocol cannot be"),
    ],
)
def test_defaults_that_make_no_sense(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start_rules(Flags([parse_level(argv)], {}), None)


URLS = [
    ("localhost:8080", "http://localhost:8080"),
    ("localhost", "http://localhost"),
    ("127.0.0.1", "http://127.0.0.1"),
    ("127.0.0.1:80", "http://127.0.0.1:80"),
    ("::1", "http://[::1]"),
    ("[::1]", "http://[::1]"),
    ("[::1]:8080", "http://[::1]:8080"),
    ("http://[::1]", "http://[::1]"),
    ("https://localhost:8080/api/", "https://localhost:8080"),
    ("rdp://bücher.de", "rdp://xn--bcher-kva.de:3389"),
    ("tcp://h:1", "tcp://h:1"),
]


@pytest.mark.parametrize(("url", "text"), URLS)
def test_what_url_means(url: str, text: str) -> None:
    assert start_rules(Flags([parse_level(["--url", url])], {}), None).rules[0].service.text == text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--url", ""], "Error validating origin URL: URL should not be empty"),
        (["--url", "gopher://h"], "Currently Cloudflare Tunnel does not support gopher protocol."),
        (["--url", "bücher.de:80"], "URL bücher.de:80 has invalid format"),
        (["--url", "ws://h"], "Currently Cloudflare Tunnel does not support ws protocol."),
        (["--url", "http://h", "--unix-socket", "x"], "--unix-socket must be used exclusively."),
    ],
)
def test_single_origins_that_are_none(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start_rules(Flags([parse_level(argv)], {}), None)


def test_rules_of_the_file_beat_flags(home: Path) -> None:
    text = "ingress: [{service: 'http_status:418'}]\nwarp-routing: {maxActiveFlows: 5, connectTimeout: 1500ms}\n"
    flags, local = start(text, "--url", "http://h", path=home)
    ingress = start_rules(flags, local)
    assert ingress.rules[0].service.status == 418
    assert ingress.warp_routing == {"maxActiveFlows": 5, "connectTimeout": 1.5}
    flags, local = start("warp-routing: {maxActiveFlows: 5}\nurl: http://h\n", path=home)
    ingress = start_rules(flags, local)
    assert (ingress.rules[0].service.host, ingress.warp_routing) == ("h", {"maxActiveFlows": 5})


# -- credentials


def token_of(home: Path, text: str, *words: str, argv: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Any:
    flags, local = start(text, *argv, path=home, env=env)
    return find_token(flags, words, local)


def write(path: Path, **changes: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    fields = {name: value for name, value in {**CREDENTIALS, **changes}.items() if value is not None}
    path.write_text(json.dumps(fields))
    return path


def test_a_tunnel_named_in_the_file_with_its_credentials(home: Path) -> None:
    file = write(home / "cred.json")
    token = token_of(home, f"tunnel: {ID}\ncredentials-file: {file}\n")
    assert (token.tunnel_id, token.secret, token.account_tag) == (UUID(ID), SECRET, CREDENTIALS["AccountTag"])
    assert token_of(home, f"tunnel: my-tunnel\ncredentials-file: {file}\n").tunnel_id == UUID(ID)
    assert token_of(home, "", "my-tunnel", argv=("--cred-file", str(file))).tunnel_id == UUID(ID)
    other = ID.replace("f1", "aa")
    assert token_of(home, f"tunnel: {ID}\ncredentials-file: {file}\n", other).tunnel_id == UUID(other)


def test_credentials_are_looked_for(home: Path) -> None:
    with pytest.raises(ConfigError, match="tunnel credentials file not found") as raised:
        token_of(home, f"tunnel: {ID}\n")
    assert f"{ID}.json" in raised.value.advice
    write(home / "second" / f"{ID}.json", TunnelID=None)
    assert token_of(home, f"tunnel: {ID}\n").tunnel_id == UUID(ID)
    write(home / "third" / f"{ID}.json", AccountTag="near the certificate")
    token = token_of(home, f"tunnel: {ID}\norigincert: {home / 'third' / 'cert.pem'}\n")
    assert token.account_tag == "near the certificate"


def test_credentials_in_the_environment_win(home: Path) -> None:
    file = write(home / "cred.json", AccountTag="file")
    env = {"TUNNEL_CRED_CONTENTS": json.dumps({**CREDENTIALS, "AccountTag": "environment", "TunnelID": None})}
    token = token_of(home, f"tunnel: {ID}\ncredentials-file: {file}\n", env=env)
    assert (token.account_tag, token.tunnel_id) == ("environment", UUID(ID))
    token = token_of(home, f"tunnel: name\ncredentials-file: {file}\n", env=env)
    assert (token.account_tag, token.tunnel_id) == ("environment", UUID(ID))


@pytest.mark.parametrize(
    ("text", "words", "kind"),
    [
        ("", "requires the token of the tunnel to run", UsageError),
        ("tunnel: my-tunnel\n", "my-tunnel is not a tunnel's ID, and no credentials file says", ConfigError),
        ("tunnel: x\ncredentials-file: /does/not/exist\n", "'/does/not/exist' doesn't exist or is not", ConfigError),
        (f"tunnel: {ID}\ncredentials-file: ~/cert.pem\n", "should be .json but you gave a .pem", ConfigError),
        (f"tunnel: {ID}\ncredentials-file: ~/bad.json\n", "bad.json: Provided tunnel credentials are not", ConfigError),
        ("tunnel: my-tunnel\ncredentials-file: ~/old.json\n", "old.json holds no TunnelID", ConfigError),
    ],
)
def test_credentials_that_cannot_be_had(home: Path, text: str, words: str, kind: type[ConnectorError]) -> None:
    (home / "cert.pem").write_text("x")
    (home / "bad.json").write_text("{")
    write(home / "old.json", TunnelID=None)
    with pytest.raises(kind, match=words) as raised:
        token_of(home, text)
    assert raised.value.advice


def test_a_run_of_a_file_alone(home: Path) -> None:
    file = write(home / "cred.json", Endpoint="fed")
    text = f"tunnel: {ID}\ncredentials-file: {file}\ningress: [{{service: 'http_status:404'}}]\nprotocol: http2\n"
    flags, local = start(text, path=home)
    config: RunConfig = run_config(flags, [], "", local)
    assert (config.token.tunnel_id, config.protocol, config.region) == (UUID(ID), "http2", "fed")
    assert config.ingress.rules[0].service.status == 404
    assert config.watched == (flags, local)


@pytest.mark.parametrize("at", range(4))
def test_a_flag_may_stand_at_every_level(home: Path, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.yml").write_text("ingress: [{service: http://h}]\n")
    words = ["tunnel", "ingress", "validate"]
    assert main([*words[:at], "--config", str(home / "config.yml"), *words[at:]]) == 0
    assert capsys.readouterr().out.endswith("OK\n")
