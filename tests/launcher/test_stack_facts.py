"""What commands read out of the connector's words, what containers are told, and what is printed."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import pytest

from launcher import brokerconf, stack
from launcher import containerspec as spec
from launcher.brokerconf import Dialect
from launcher.containerprobe import understand
from launcher.output import Output, rows_of
from launcher.pullprogress import PullProgress
from launcher.stack import Check, LogLine, ServiceState, StackState
from launcher.stackdir import Settings, StackError

PUSH = {"ingress": [{"hostname": "m.example.com", "service": "http://mosquitto:9001"}, {"service": "http_status:404"}]}


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"level": "info", "message": "Updated to new configuration", "config": json.dumps(PUSH)}),
        f"2026-01-01T00:00:00Z INF Updated to new configuration config={json.dumps(json.dumps(PUSH))} version=7",
    ],
)
def test_the_rule_is_found_in_the_log_or_in_the_answer(line: str) -> None:
    settings = Settings(engine="docker")
    found = stack.rules_of(stack.pushed_configuration(["noise", line, "more"]))
    assert found == stack.rules_of({"version": 7, "config": PUSH})
    rule, hosts = stack.describe_rules(found, settings)
    assert rule == "m.example.com -> http://mosquitto:9001"
    assert hosts == ["m.example.com"]


def test_a_rule_that_leads_elsewhere_is_told() -> None:
    rules = [("m.example.com", "http://localhost:9001"), ("*", "http_status:404")]
    rule, hosts = stack.describe_rules(rules, Settings(engine="docker"))
    assert rule.startswith("none leads to http://mosquitto:9001")
    assert hosts == []
    assert stack.describe_rules(rules, Settings(engine="native"))[1] == ["m.example.com"]
    assert stack.describe_rules([], Settings()) == ("", [])
    for nonsense in (None, [], {"config": 1}, {"ingress": [1, {"service": 2}]}):
        assert stack.rules_of(nonsense) == []
    assert stack.pushed_configuration(["Updated to new configuration config=broken"]) is None


def test_the_last_error_is_one_that_still_matters() -> None:
    error = "2026-01-01T00:00:00Z ERR Unable to reach the origin service"
    assert stack.last_error(["x", error, "y"]) == "Unable to reach the origin service"
    assert stack.last_error([error, "2026-01-01T00:00:01Z INF Registered tunnel connection connIndex=0"]) == ""
    assert stack.last_error(['{"level":"error","message":"a","error":"b"}']) == "a: b"
    assert stack.last_error(["Error: no token", "{broken"]) == "Error: no token"
    assert stack.last_error([]) == ""


def test_the_connectors_doctor_is_read() -> None:
    hops = [
        {"hop": "dns", "status": "ok", "ms": 1.5, "detail": "d"},
        {"hop": "udp", "status": "warn", "ms": 0, "detail": "w", "advice": "a"},
        {"hop": "http", "status": "skip", "ms": 0, "detail": ""},
        {"hop": "mqtt", "status": "fail", "ms": 2, "detail": "f", "advice": "b"},
    ]
    checks = stack.doctor_checks(json.dumps({"hops": hops}))
    assert [(check.name, check.good) for check in checks] == [("hop dns", True), ("hop udp", None), ("hop mqtt", False)]
    assert stack.doctor_checks("unknown command: doctor") == []


def test_probe_lines() -> None:
    settings = Settings()
    assert understand(["version 2.1.2", "plugins /usr/lib", "writable"], settings) == Dialect((2, 1, 2), "/usr/lib")
    for lines, words in (
        (["sh: mosquitto: not found", "writable"], "tells its version"),
        (["version 1.6.12", "writable"], "2.0 is needed"),
        (["version 2.0.11", "lacks mosquitto_rr", "writable"], "has no mosquitto_rr"),
        (["version 2.0.11", "unwritable sh: x: Permission denied"], "tunnel-broker-data: Permission denied"),
        (["version 2.0.11", "writable", "candidate 3", "said Error: Unknown x"], "refuses that configuration: Error"),
    ):
        with pytest.raises(StackError, match=words) as caught:
            understand(lines, settings)
        assert caught.value.advice


def test_container_descriptions_hold_no_secret_and_tell_changes_apart() -> None:
    settings = Settings(hostname="h")
    broker, connector = spec.broker_spec(settings, None), spec.connector_spec(settings, ca=False)
    assert spec.digest(broker) == spec.digest(spec.broker_spec(settings, None))
    assert spec.digest(broker) != spec.digest(broker, "other")
    assert spec.sealed(settings, "secret") != spec.sealed(Settings(), "secret")
    assert "secret" not in spec.sealed(settings, "secret")
    for one in (broker, connector):
        host = one["HostConfig"]
        assert "PortBindings" not in host
        assert host["CapDrop"] == ["ALL"]
        assert host["ReadonlyRootfs"]
        assert "TUNNEL_TOKEN" not in json.dumps(one)
    assert "Env" not in broker
    assert connector["Cmd"][-3:] == ["run", "--token-file", spec.TOKEN]
    assert connector["StopTimeout"] > 30


def test_archives_are_private_and_owned() -> None:
    data = spec.archive({"a": "x", "health/b": b"y"}, 1883)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        entries = {entry.name: entry for entry in tar}
    assert entries["health"].isdir()
    assert entries["health"].mode == 0o700
    assert {entry.uid for entry in entries.values()} == {1883}
    assert entries["a"].mode == entries["health/b"].mode == 0o600


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def state(**changes: Any) -> StackState:
    services = [
        ServiceState("broker", "running", "healthy", "image", 2, "2026-01-01T00:00:00"),
        ServiceState("connector", "running", "registered", "image"),
    ]
    facts = {"services": services, "ready_connections": 4, "rule": "r", "hostnames": ["m.example.com"]}
    return StackState("tunnel", "Docker", "/d", **{**facts, **changes})


def test_status_is_one_table_with_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    Output(out=out).status(state())
    assert "\x1b[32m" in out.getvalue()
    assert "wss://m.example.com:443/mqtt" in out.getvalue()
    assert "2 restarts" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    for plain in (Terminal(), io.StringIO()):
        Output(out=plain).status(state(last_error="evil \x1b[31m text", open_to_everyone=True))
        assert "\x1b" not in plain.getvalue()
        assert "OPEN" in plain.getvalue()
    assert state().up
    assert not state(ready_connections=0).up
    assert not state(services=[]).up


def test_programs_get_json_lines_and_people_text() -> None:
    out, errors = io.StringIO(), io.StringIO()
    output = Output(as_json=True, out=out, errors=errors)
    output.progress("broker", "x")
    output.status(state())
    output.log(LogLine("broker", "t", "line"))
    output.check(Check("n", None, "t", "a", 1.0))
    output.users({"u": "p"}, why="w")
    output.warning("w")
    output.text("for people")
    output.failure("m", "a")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line.get("event") for line in lines] == ["progress", "status", None, "check", "users", "warning", "failed"]
    assert errors.getvalue() == ""
    out, errors = io.StringIO(), io.StringIO()
    output = Output(out=out, errors=errors)
    output.log(LogLine("broker", "t", "bad \x1b[2J line"))
    output.check(Check("n", False, "t", "do this"))
    output.failure("m\nx", "a")
    assert "\x1b" not in out.getvalue()
    assert "what to do: do this" in out.getvalue()
    assert errors.getvalue().startswith("launcher: m\\x0ax\n")
    assert rows_of([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc  d"]
    assert rows_of([]) == []


def test_the_broker_learns_client_addresses_where_both_ends_can() -> None:
    said: list[str] = []

    def port(settings: Settings, dialect: Dialect, *, sends: bool = True, own: str | None = None) -> int:
        reading = brokerconf.read(own) if own is not None else None
        return stack.proxied_port(settings, reading, dialect, lambda _, text: said.append(text), sends=sends)

    old, new = Dialect((2, 0, 11)), Dialect((2, 1, 2))
    assert port(Settings(), new) == 9001
    assert port(Settings(engine="native", ws_port=9002), new) == 9002
    assert port(Settings(), new, sends=False) == port(Settings(), old) == port(Settings(proxy_protocol=False), new) == 0
    assert not said
    assert port(Settings(proxy_protocol=True), old) == 0
    assert "2.1 does" in said[0]
    own = "listener 1883\nlistener 8000\nprotocol websockets\n"
    assert port(Settings(), new, own=own + "enable_proxy_protocol 2\n") == 8000
    assert port(Settings(), new, own=own) == 0


def test_what_a_dashboard_cannot_say_reaches_the_connector_and_only_the_broker_gets_a_header() -> None:
    settings = Settings(name="x", proxied_port=9001)
    environment = spec.connector_spec(settings, ca=False)["Env"]
    assert "TUNNEL_WS_KEEPALIVE=40s" in environment
    assert "TUNNEL_PROXY_PROTOCOL=v2@mosquitto:9001,x-broker:9001" in environment
    assert not any("PROXY" in one for one in spec.connector_spec(Settings(name="x"), ca=False)["Env"])
    assert "enable_proxy_protocol 2" in spec.broker_conf(Dialect((2, 1, 2)), settings)
    native = Settings(engine="native", proxied_port=9001)
    assert stack.proxy_option(native) == "v2@localhost:9001,127.0.0.1:9001"


def test_the_database_is_told_with_what_it_costs() -> None:
    assert stack.database_check(12_345, Settings()).text == "12 kB, saved after each change"
    large = stack.database_check(20_000_000, Settings())
    assert (large.good, large.text) == (None, "20.0 MB, saved after each change")
    assert "--durability interval" in large.advice
    assert "loses what is newer" in stack.database_check(20_000_000, Settings(durability="interval")).text


def test_a_pull_is_told_in_a_handful_of_lines() -> None:
    size = 40_000_000
    layers = [{"status": "Pulling fs layer", "progressDetail": {}, "id": one} for one in "ab"]
    loads = [
        {"status": "Downloading", "progressDetail": {"current": now, "total": size}, "id": "a"}
        for now in range(0, size, 100_000)
    ]
    unpacked = [
        {"status": "Extracting", "progressDetail": {"current": now, "total": size}, "id": "a"}
        for now in range(0, size, 100_000)
    ]
    messages = [{"status": "Pulling from eclipse-mosquitto", "id": "2.1.2"}, *layers]
    messages += [{"status": "Already exists", "progressDetail": {}, "id": "b"}, *loads, *unpacked]
    messages += [{"status": "Pull complete", "progressDetail": {}, "id": "a"}, {"status": "Digest: sha256:12"}]
    progress = PullProgress()
    told = [text for message in messages if (text := progress.line(message))]
    assert len(told) == 13
    assert told[0] == "pulling: 1 of 2 layers ready"
    assert "pulling: 20.0 of 40.0 MB, 1 of 2 layers ready" in told
    assert told[-2:] == ["pulling: 40.0 of 40.0 MB, 2 of 2 layers ready", "pulled: sha256:12"]
