from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connector.app.logs import FOLD_ENTRIES, FOLD_SECONDS, Logger, LogOutput, capture_stdlib


class Sink:
    """A logger into memory with a clock that the test turns."""

    def __init__(self, *, level: str = "debug", json_lines: bool = False, colour: bool = False) -> None:
        self.stream = io.StringIO()
        self.now = 1000.0
        self.output = LogOutput(
            level=level,
            json_lines=json_lines,
            colour=colour,
            stream=self.stream,
            clock=lambda: self.now,
            wall_clock=lambda: 1_787_220_000.0,
        )
        self.log = Logger(self.output)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


def test_the_console_format() -> None:
    sink = Sink()
    sink.log.info(
        "Registered tunnel connection", location="lis01", connIndex=0, ip="198.41.200.13", event=0, protocol="http2"
    )
    sink.log.error("", error='broke "here"', connIndex=1)
    sink.log.warn("x", flag=True, items=["a", "b"], back="a\\b", accent="é", empty="", line="a\nb")
    assert sink.lines == [
        "2026-08-20T10:00:00Z INF Registered tunnel connection connIndex=0 event=0 ip=198.41.200.13 location=lis01 "
        "protocol=http2",
        '2026-08-20T10:00:00Z ERR  error="broke \\"here\\"" connIndex=1',
        '2026-08-20T10:00:00Z WRN x accent="é" back="a\\\\b" empty= flag=true items=["a","b"] line="a\\nb"',
    ]


def test_the_json_format_has_sorted_keys() -> None:
    sink = Sink(json_lines=True)
    sink.log.bind(connIndex=2).info("hi", ip="::1", event=0)
    assert sink.lines == [
        '{"connIndex":2,"event":0,"ip":"::1","level":"info","message":"hi","time":"2026-08-20T10:00:00Z"}'
    ]


def test_levels_filter() -> None:
    sink = Sink(level="warn")
    sink.log.info("no")
    sink.log.debug("no")
    sink.log.warn("yes")
    sink.log.fatal("yes")
    assert [line.split()[1] for line in sink.lines] == ["WRN", "FTL"]


def test_colours_are_only_there_when_asked_for() -> None:
    sink = Sink(colour=True)
    sink.log.info("hi", a=1, error="e")
    assert sink.lines == [
        "\x1b[90m2026-08-20T10:00:00Z\x1b[0m \x1b[32mINF\x1b[0m hi \x1b[31merror=\x1b[0m\x1b[31me\x1b[0m "
        "\x1b[36ma=\x1b[0m1"
    ]
    plain = Sink(colour=True, json_lines=True)
    plain.log.info("hi")
    assert "\x1b" not in plain.lines[0]


def test_a_message_cannot_forge_a_line() -> None:
    sink = Sink()
    sink.log.info("a\nb\rc", field="x\ny")
    assert len(sink.lines) == 1


def test_repeats_are_folded_and_counted() -> None:
    sink = Sink()
    for _ in range(50):
        sink.log.error("Request failed", error="refused")
    sink.log.error("Request failed", error="other")
    sink.log.info("no error, no folding")
    sink.log.info("no error, no folding")
    assert len(sink.lines) == 4
    sink.now += FOLD_SECONDS + 1
    sink.log.error("Request failed", error="refused")
    assert sink.lines[4:] == [
        "2026-08-20T10:00:00Z ERR Request failed error=refused repeated=49",
        "2026-08-20T10:00:00Z ERR Request failed error=refused",
    ]
    sink.log.error("Request failed", error="refused")
    sink.output.close()
    assert sink.lines[-1] == "2026-08-20T10:00:00Z ERR Request failed error=refused repeated=1"


def test_folding_is_bounded_and_loses_no_count() -> None:
    sink = Sink()
    for number in range(FOLD_ENTRIES + 10):
        sink.log.error("x", error=f"e{number}")
        sink.log.error("x", error=f"e{number}")
    sink.output.close()
    assert sum("repeated=1" in line for line in sink.lines) == FOLD_ENTRIES + 10


@pytest.mark.parametrize("json_lines", [False, True])
@given(secret=st.binary(min_size=16, max_size=48))
def test_no_line_shows_a_registered_secret(json_lines: bool, secret: bytes) -> None:
    sink = Sink(json_lines=json_lines)
    token = base64.b64encode(b'{"s":"' + base64.b64encode(secret) + b'"}').decode()
    sink.output.redactor.add(token)
    sink.output.redactor.add_bytes(secret)
    forms = [
        token,
        token.rstrip("="),
        base64.b64encode(secret).decode(),
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode(),
        secret.hex(),
    ]
    for form in forms:
        sink.log.error(f"message {form}", error=f"error {form}", nested={"deep": [form]})
        sink.log.bug("bug", ValueError(form))
    text = sink.stream.getvalue()
    assert "*****" in text
    assert not [form for form in forms if form in text]
    assert token not in repr(sink.output.redactor)
    if json_lines:
        for line in sink.lines:
            json.loads(line)


def test_a_reader_that_went_away_does_not_matter() -> None:
    sink = Sink()
    sink.stream.close()
    sink.log.info("nobody listens")


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
def test_the_standard_loggers_lines_become_ours() -> None:
    sink = Sink(json_lines=True)
    capture_stdlib(sink.log)
    logging.getLogger("asyncio").info("not this")
    try:
        raise RuntimeError("inside")
    except RuntimeError:
        logging.getLogger("asyncio").exception("Task %s failed", "t")
    (entry,) = [json.loads(line) for line in sink.lines]
    assert (entry["level"], entry["message"], entry["logger"]) == ("error", "Task t failed", "asyncio")
    assert entry["error"] == "RuntimeError: inside"
