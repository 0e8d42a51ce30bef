"""Tunnels: the TOML file and its errors, `--ingress`, remembered secrets, versions, host routing."""

import json
from pathlib import Path

import pytest

from connector.devedge.authority import StateDir
from connector.devedge.faults import parse_faults
from connector.devedge.server import Settings, tunnel_token
from connector.devedge.tunnels import (
    Declaration,
    Directory,
    TunnelStore,
    check_name,
    parse_ingress_flags,
    read_config_file,
)
from connector.errors import ConfigError, UsageError
from connector.wire.token import decode_token

GOOD = """
[tunnels.demo]
id = "f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b"
account = "0123456789abcdef0123456789abcdef"
secret = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
hostnames = ["MQTT.example.com", "*.wild.test"]
ingress = [
    { hostname = "m.example.com", path = "^/mqtt", service = "http://127.0.0.1:83", originRequest.connectTimeout = 3 },
    { service = "http_status:404" },
]
originRequest = { keepAliveTimeout = 60, noTLSVerify = true }
warp-routing = { maxActiveFlows = 10 }

[tunnels.second]
"""


def test_a_full_file(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(GOOD)
    demo, second = TunnelStore(StateDir(tmp_path / "state")).resolve(read_config_file(file))
    token = decode_token(tunnel_token(demo))
    assert str(token.tunnel_id) == "f1e2d3c4-b5a6-4978-8a9b-0c1d2e3f4a5b"
    assert token.secret == bytes(range(32))
    assert token.account_tag == "0123456789abcdef0123456789abcdef"
    assert demo.config == {
        "ingress": [
            {
                "service": "http://127.0.0.1:83",
                "hostname": "m.example.com",
                "path": "^/mqtt",
                "originRequest": {"connectTimeout": 3},
            },
            {"service": "http_status:404"},
        ],
        "originRequest": {"keepAliveTimeout": 60, "noTLSVerify": True},
        "warp-routing": {"maxActiveFlows": 10},
    }
    assert demo.all_hostnames == ["demo.localhost", "mqtt.example.com", "*.wild.test", "m.example.com"]
    assert (second.config, second.version) == (None, 0)
    assert "secret" not in repr(demo)
    stored = json.loads((tmp_path / "state" / "tunnels.json").read_text())
    assert "secret" not in stored["demo"]  # given by the file, not kept twice
    assert len(second.secret) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tunnels = [", "not valid TOML"),
        ("", "no tunnel is declared"),
        ("[tunnel.x]", r"tunnel: unknown key"),
        ("tunnels = 3", r"tunnels: no tunnel"),
        ("[tunnels]\nx = 3", r"tunnels\.x: must be a table, not a number"),
        ('[tunnels."a b"]', "not a DNS label"),
        ("[tunnels.x]\nservices = 1", r"tunnels\.x\.services: unknown key"),
        ("[tunnels.x]\nid = 'abc'", r"tunnels\.x\.id: not a UUID"),
        ("[tunnels.x]\nid = 7", r"tunnels\.x\.id: must be a text"),
        ("[tunnels.x]\naccount = ''", r"tunnels\.x\.account: must not be empty"),
        ("[tunnels.x]\nsecret = 'no base64!'", r"tunnels\.x\.secret: not standard base64"),
        ("[tunnels.x]\nsecret = 'YWJj'", r"tunnels\.x\.secret: shorter than 16 bytes"),
        ("[tunnels.x]\nhostnames = 'a.test'", r"tunnels\.x\.hostnames: must be a list"),
        (
            "[tunnels.x]\nhostnames = ['a.test', 'http://b']",
            r"tunnels\.x\.hostnames\[1\]: 'http://b' is not a hostname",
        ),
        ("[tunnels.x]\ningress = 'http://a'", r"tunnels\.x\.ingress: must be a list of tables, not a text"),
        ("[tunnels.x]\ningress = ['http://a']", r"tunnels\.x\.ingress\[0\]: must be a table"),
        ("[tunnels.x]\ningress = [{ hostname = 'a.test' }]", r"ingress\[0\]\.service: missing"),
        ("[tunnels.x]\ningress = [{ service = 'web' }]", r"ingress\[0\]\.service: 'web' is no service"),
        ("[tunnels.x]\ningress = [{ service = 'http://a', host = 'b' }]", r"ingress\[0\]\.host: unknown key"),
        ("[tunnels.x]\ningress = [{ service = 'http://a', hostname = 'b:1' }]", r"ingress\[0\]\.hostname: 'b:1'"),
        (
            "[tunnels.x]\ningress = [{ service = 'http://a', hostname = 'b.test' }]",
            r"the last rule must match everything",
        ),
        ("[tunnels.x]\ningress = [{ service = 'http://a', originRequest = 3 }]", r"originRequest: must be a table"),
        ("[tunnels.x]\noriginRequest = { connectTimeout = 07:32:00 }", r"connectTimeout: JSON has no a time"),
        ("[tunnels.x]\nwarp-routing = []", r"warp-routing: must be a table"),
    ],
)
def test_errors_name_file_key_and_reason(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config_file(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.toml: No such file"):
        read_config_file(tmp_path / "nope.toml")


def test_ingress_flags() -> None:
    config = parse_ingress_flags(["a.test=http://127.0.0.1:1", "unix:/run/a=b.sock"])
    assert config == {
        "ingress": [{"hostname": "a.test", "service": "http://127.0.0.1:1"}, {"service": "unix:/run/a=b.sock"}]
    }
    assert parse_ingress_flags(["a.test=tcp://127.0.0.1:1"])["ingress"][-1] == {"service": "http_status:404"}
    with pytest.raises(ConfigError, match="second service"):
        parse_ingress_flags(["http://a", "http://b"])
    with pytest.raises(ConfigError, match="is no service"):
        parse_ingress_flags(["a.test=web"])
    with pytest.raises(ConfigError, match="not be empty"):
        parse_ingress_flags(["=http://a"])


def test_secrets_are_remembered_and_versions_rise_with_changes(tmp_path: Path) -> None:
    store = TunnelStore(StateDir(tmp_path))

    def resolve(config: object) -> tuple[str, int]:
        declaration = Declaration("demo")
        declaration.config = config  # type: ignore[assignment]
        [tunnel] = store.resolve([declaration])
        return tunnel_token(tunnel), tunnel.version

    token, version = resolve({"ingress": []})
    assert version == 1
    assert resolve({"ingress": []}) == (token, 1)
    assert resolve({"ingress": [{"service": "http_status:404"}]}) == (token, 2)
    assert resolve(None) == (token, 0)
    assert resolve({"ingress": []}) == (token, 3)  # higher than anything a connector may have seen
    assert store.knows("demo")
    assert not store.knows("other")


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    store = TunnelStore(StateDir(tmp_path))
    for text in ("nonsense", "[]", '{"demo":{"id":"x","secret":"AA=="}}'):
        (tmp_path / "tunnels.json").write_text(text)
        with pytest.raises(ConfigError, match=r"tunnels\.json"):
            store.resolve([Declaration("demo")])


def test_hosts_lead_to_tunnels(tmp_path: Path) -> None:
    one, two = Declaration("one"), Declaration("two")
    one.hostnames = ["a.test", "*.b.test"]
    two.config = {"ingress": [{"hostname": "c.b.test", "service": "http://x"}, {"service": "http://y"}]}
    store = TunnelStore(StateDir(tmp_path))
    tunnels = store.resolve([one, two])
    directory = Directory(tunnels)

    def name(host: str) -> str | None:
        found = directory.by_host(host)
        return found.name if found else None

    assert name("a.test") == "one"
    assert name("x.b.test") == "one"
    assert name("x.y.b.test") == "one"
    assert name("b.test") is None
    assert name("c.b.test") == "two"
    assert name("two.localhost") == "two"
    assert name("localhost") is None  # two tunnels: not clear which
    assert Directory(tunnels[:1]).by_host("127.0.0.1") is tunnels[0]
    two.hostnames = ["a.test"]
    with pytest.raises(ConfigError, match=r"'a\.test' belongs to two tunnels"):
        Directory(store.resolve([one, two]))


def test_two_tunnels_cannot_share_an_id(tmp_path: Path) -> None:
    one, two = Declaration("one"), Declaration("two")
    [made] = TunnelStore(StateDir(tmp_path)).resolve([one])
    two.id = made.id
    with pytest.raises(ConfigError, match="the same id"):
        TunnelStore(StateDir(tmp_path)).resolve([one, two])


def test_names() -> None:
    assert check_name("My-tunnel1", "--tunnel") == "My-tunnel1"
    for bad in ("", "-a", "a-", "a.b", "ü", "x" * 64):
        with pytest.raises(ConfigError, match="not a DNS label"):
            check_name(bad, "--tunnel")


def test_ingress_needs_one_tunnel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 tunnels"):
        Settings(tmp_path, tunnel_names=["a", "b"], ingress=["http://x"]).declarations()
    file = tmp_path / "edge.toml"
    file.write_text(GOOD.split("[tunnels.second]", maxsplit=1)[0])
    with pytest.raises(ConfigError, match="has ingress rules"):
        Settings(tmp_path, config_file=file, ingress=["http://x"]).declarations()
    with pytest.raises(ConfigError, match="no tunnel"):
        Settings(tmp_path).declarations()


def test_faults() -> None:
    faults = parse_faults(["registration=EDUPCONN*2", "goaway-after:1.5s", "close-after:3-requests", "idle-cut:2"])
    assert [faults.take_registration() for _ in range(3)] == ["EDUPCONN", "EDUPCONN", None]
    assert (faults.after, faults.close_after, faults.idle_cut) == ({"goaway-after": 1.5}, 3, 2.0)
    assert faults.active() == ["registration=EDUPCONN*2", "goaway-after:1.5s", "close-after:3-requests", "idle-cut:2"]
    told: list[str] = []
    faults.on_added = told.append
    faults.add("delay:20ms")
    faults.add("loss:5%")
    assert (told, faults.delay, faults.loss) == (["delay", "loss"], 0.02, 0.05)
    faults.clear("delay:20ms")
    assert (faults.delay, faults.loss, faults.close_after) == (0.0, 0.05, 3)
    faults.clear()
    assert (faults.active(), faults.loss, faults.after) == ([], 0.0, {})
    with pytest.raises(UsageError, match="in force"):
        faults.clear("delay")
    faults.add("reset:3")
    assert [faults.take_request() for _ in range(6)] == [False, False, True] * 2
    faults = parse_faults(["registration=retry-after:7"])
    assert (faults.take_registration(), faults.retry_after) == ("retry-after", 7.0)
    for bad in (
        "x",
        "registration=x",
        "registration=stall*x",
        "goaway-after:x",
        "close-after:0",
        "idle-cut:-1",
        "idle-cut:nan",
        "delay:x",
        "slow:0",
        "loss:101",
        "reset:0",
    ):
        with pytest.raises(UsageError, match="--fault"):
            parse_faults([bad])
