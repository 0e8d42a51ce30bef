"""Version rules of configuration pushes, on real ingress rules."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.app.config import RunConfig
from connector.app.logs import Logger, LogOutput
from connector.app.orchestrator import Orchestrator
from connector.errors import WireError
from connector.proxy.ingress import DEFAULT_INGRESS, Ingress, OriginSettings, ingress_from_url
from connector.wire.token import decode_token

TOKEN = (
    "eyJhIjoiMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYiLCJzIjoiQUFFQ0F3UUZCZ2NJQ1FvTERBME9EeEFSRWhNVUZSWVhHQmthR3h3"
    "ZEhoOD0iLCJ0IjoiZjFlMmQzYzQtYjVhNi00OTc4LThhOWItMGMxZDJlM2Y0YTViIn0="
)
GOOD = {"ingress": [{"service": "http_status:404"}]}
BAD = {"ingress": [{"hostname": "a.example.com", "service": "http_status:404"}]}


class Holder:
    """Where the dispatcher would be: keeps what is put in force."""

    def __init__(self) -> None:
        self.seen: list[Ingress] = []
        self.doubts: tuple[str, ...] = ()

    @property
    def ingress(self) -> Ingress:
        return self.seen[-1] if self.seen else DEFAULT_INGRESS

    def set_ingress(self, ingress: Ingress) -> tuple[str, ...]:
        self.seen.append(ingress)
        return self.doubts


class Setup:
    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.holder = Holder()
        self.orchestrator = Orchestrator(self.holder, Logger(LogOutput(stream=self.stream, json_lines=True)))

    def push(self, version: object, config: object) -> dict[str, object]:
        body = json.dumps({"version": version, "config": config}).encode()
        answer = json.loads(self.orchestrator.on_configuration(body))
        assert isinstance(answer, dict)
        return answer

    @property
    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


def test_a_push_gets_the_defaults_of_this_process() -> None:
    setup = Setup()
    log = Logger(LogOutput(stream=setup.stream, json_lines=True))
    orchestrator = Orchestrator(setup.holder, log, OriginSettings(ws_keep_alive=40))
    orchestrator.apply(1, GOOD)
    assert setup.holder.ingress.rules[0].settings.ws_keep_alive == 40


def test_what_cannot_work_is_said_of_a_push() -> None:
    setup = Setup()
    setup.holder.doubts = ("Rule #1: a doubt",)
    setup.push(1, {"ingress": [{"service": "http://h:99999"}]})
    warnings = [line["message"] for line in setup.lines if line["level"] == "warn"]
    assert len(warnings) == 2
    assert "99999" in str(warnings[0])
    assert warnings[1] == "Configuration: Rule #1: a doubt"


def test_version_0_beats_the_local_configuration() -> None:
    setup = Setup()
    assert setup.orchestrator.version == -1
    assert setup.push(0, GOOD) == {"lastAppliedVersion": 0, "err": None}
    assert len(setup.holder.seen) == 1
    (line,) = setup.lines
    assert (line["message"], line["version"], line["level"]) == ("Updated to new configuration", 0, "info")
    assert json.loads(str(line["config"])) == GOOD


def test_the_reply_is_exactly_as_the_edge_reads_it() -> None:
    setup = Setup()
    assert setup.orchestrator.on_configuration(b'{"version":7,"config":{}}') == b'{"lastAppliedVersion":7,"err":null}'


@pytest.mark.parametrize("version", [7, 6, 0, -5])
def test_what_is_not_newer_changes_nothing_and_is_no_error(version: int) -> None:
    setup = Setup()
    setup.push(7, GOOD)
    assert setup.push(version, {}) == {"lastAppliedVersion": 7, "err": None}
    assert len(setup.holder.seen) == 1


def test_a_bad_configuration_leaves_the_old_one_and_says_why() -> None:
    setup = Setup()
    setup.push(1, GOOD)
    answer = setup.push(2, BAD)
    assert answer["lastAppliedVersion"] == 1
    assert "last ingress rule" in str(answer["err"])
    assert len(setup.holder.seen) == 1
    assert setup.lines[-1]["level"] == "error"
    assert setup.lines[-1]["version"] == 2
    assert setup.push(3, GOOD) == {"lastAppliedVersion": 3, "err": None}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_wire_error(body: bytes) -> None:
    setup = Setup()
    with pytest.raises(WireError):
        setup.orchestrator.on_configuration(body)
    assert setup.orchestrator.version == -1


@pytest.mark.parametrize("version", [1.5, "7", True, 2**31, [1]])
def test_a_version_that_is_no_int32_is_a_wire_error(version: object) -> None:
    with pytest.raises(WireError):
        Setup().push(version, GOOD)


def test_key_names_have_no_case() -> None:
    setup = Setup()
    answer = setup.orchestrator.on_configuration(b'{"Version":3,"CONFIG":{"ingress":[{"service":"http_status:200"}]}}')
    assert json.loads(answer)["lastAppliedVersion"] == 3


def test_after_the_end_nothing_is_applied() -> None:
    setup = Setup()
    setup.orchestrator.shut()
    assert setup.push(1, GOOD) == {"lastAppliedVersion": -1, "err": "connector already shut down"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=8,
)


@given(version=st.integers(0, 2**31 - 1), config=JSON)
def test_any_json_is_applied_or_refused_with_words(version: int, config: object) -> None:
    setup = Setup()
    answer = setup.push(version, config)
    applied = answer["err"] is None
    assert answer["lastAppliedVersion"] == (version if applied else -1)
    assert len(setup.holder.seen) == applied


def test_the_local_configuration_report() -> None:
    setup, config = Setup(), RunConfig(decode_token(TOKEN))
    zero = {"connectTimeout": 0, "tlsTimeout": 0, "tcpKeepAlive": 0, "keepAliveConnections": 0, "keepAliveTimeout": 0}
    assert json.loads(setup.orchestrator.local_configuration(config)) == {
        "ingress": [{"service": "http_status:503", "originRequest": {**zero, "proxyAddress": ""}}],
        "warp-routing": {},
    }
    setup.orchestrator.apply_local(ingress_from_url("http://localhost:8000"))
    config.settings = {"loglevel": "debug", "protocol": "http2", "token": "*****", "url": "http://localhost:8000"}
    assert json.loads(setup.orchestrator.local_configuration(config)) == {
        "__configuration_flags": {"loglevel": "debug", "protocol": "http2"},
        "ingress": [{"service": "http://localhost:8000", "originRequest": {}}],
        "warp-routing": {},
    }


def test_local_rules_give_way_to_the_edge() -> None:
    setup = Setup()
    first = ingress_from_url("http://a")
    assert setup.orchestrator.apply_local(first) == [
        "~ rule #1 *: service http_status:503 -> http://a, connectTimeout 0 -> default, keepAliveConnections 0 -> "
        "default, keepAliveTimeout 0 -> default, proxyAddress  -> default, tcpKeepAlive 0 -> default, tlsTimeout 0 -> "
        "default"
    ]
    assert setup.orchestrator.apply_local(first) == []
    assert setup.push(0, GOOD)["err"] is None
    assert setup.orchestrator.apply_local(first) is None
    assert setup.holder.ingress.version == 0
