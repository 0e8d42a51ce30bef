"""Hot reload: what is noticed, what is put in force, and what the log says about it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from connector.app.config_watch import ConfigWatch
from connector.app.flags import Flags, parse_level
from connector.app.local_config import configured_flags
from connector.app.logs import Logger, LogOutput
from connector.app.orchestrator import Orchestrator
from connector.app.origin_flags import start_rules
from connector.errors import ConfigError
from connector.proxy.ingress import DEFAULT_INGRESS, Ingress
from tests.support.aio import run, until
from tests.support.processes import connector, dev_edge, edge_token

FIRST = """\
ingress:
  - hostname: a.example
    service: http://one:1
    originRequest: {connectTimeout: 30s}
  - hostname: b.example
    service: http://user:hunter2@two:2
  - service: http_status:404
loglevel: info
"""
SECOND = """\
ingress:
  - hostname: b.example
    service: http://user:hunter3@two:2
  - hostname: a.example
    service: http://one:11
    originRequest: {connectTimeout: 5s, noTLSVerify: true}
  - hostname: c.example
    path: ^/x
    service: unix:/run/c
  - service: http_status:404
warp-routing: {maxActiveFlows: 7}
loglevel: debug
"""


class Holder:
    def __init__(self) -> None:
        self.seen: list[Ingress] = []
        self.broken = False

    @property
    def ingress(self) -> Ingress:
        return self.seen[-1] if self.seen else DEFAULT_INGRESS

    def set_ingress(self, ingress: Ingress) -> tuple[str, ...]:
        if self.broken:
            raise ConfigError("caPool '/x' cannot be read: gone")
        self.seen.append(ingress)
        return ()


class Clock:
    """A loop that only knows timers; `tick` runs the one that is armed."""

    def __init__(self) -> None:
        self.armed: list[Any] = []

    def call_later(self, delay: float, callback: Any) -> Any:
        self.armed.append(callback)
        return self

    def cancel(self) -> None:
        self.armed.clear()

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.armed.pop()()


class Setup:
    def __init__(self, path: Path, text: str = FIRST, *argv: str) -> None:
        self.path = path / "config.yml"
        self.path.write_text(text)
        flags, local = configured_flags(Flags([parse_level(["--config", str(self.path), *argv])], {}))
        assert local is not None
        self.stream = io.StringIO()
        self.holder = Holder()
        log = Logger(LogOutput(stream=self.stream, json_lines=True))
        self.orchestrator = Orchestrator(self.holder, log)
        self.holder.set_ingress(start_rules(flags, local))
        self.watch = ConfigWatch(flags, local, self.orchestrator, log)
        self.clock = Clock()
        self.watch.start(cast("asyncio.AbstractEventLoop", self.clock), signals=False)

    def replace(self, text: str) -> None:
        """As editors save: a new file under the old name."""
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.rename(self.path)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines()]


def test_a_change_is_taken_once_it_stands_still(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.clock.tick(3)
    assert len(setup.holder.seen) == 1
    setup.replace(SECOND)
    setup.clock.tick()
    assert len(setup.holder.seen) == 1
    setup.clock.tick(3)
    assert len(setup.holder.seen) == 2
    assert setup.holder.ingress.match(b"c.example", b"/x").service.path == "/run/c"
    assert setup.messages() == [
        "Reloaded the configuration file",
        "Configuration: ~ rule #2 a.example: service http://one:1 -> http://one:11, connectTimeout 5, noTLSVerify True",
        "Configuration: + rule #3 c.example path ^/x: unix:/run/c",
        "Configuration: ~ the order of the rules",
        "Configuration: ~ warp-routing: maxActiveFlows 7",
        "Some changes take effect after a restart only",
    ]
    assert setup.lines()[-1]["keys"] == "loglevel"
    assert "hunter" not in setup.stream.getvalue()
    setup.watch.stop()
    assert not setup.clock.armed


def test_a_rule_that_goes_is_said(tmp_path: Path) -> None:
    setup = Setup(tmp_path, SECOND)
    setup.replace("ingress: [{service: 'http_status:404'}]\nloglevel: debug\n")
    setup.clock.tick(2)
    assert "Configuration: - rule #3 c.example path ^/x: unix:/run/c" in setup.messages()
    assert "Configuration: ~ warp-routing: maxActiveFlows 7 -> default" in setup.messages()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ingress: [", "error parsing YAML"),
        ("ingress: [{service: x}]\n", "x is an invalid address"),
        ("ingress: [{hostname: a, service: 'http_status:404'}]\n", "The last ingress rule must match all URLs"),
        ("ingress: [{hostname: a, path: '(', service: 'http://h'}, {service: 'http://h'}]\n", "invalid regex"),
        ("loglevel: 5\n", "expected string found int for loglevel"),
    ],
)
def test_a_wrong_file_changes_nothing_and_is_told_once(tmp_path: Path, text: str, words: str) -> None:
    setup = Setup(tmp_path)
    setup.replace(text)
    setup.clock.tick(5)
    assert len(setup.holder.seen) == 1
    (line,) = setup.lines()
    assert line["message"] == "The configuration file was not reloaded; the old rules stay"
    assert words in line["error"]
    setup.replace(SECOND)
    setup.clock.tick(5)
    assert len(setup.holder.seen) == 2


def test_an_origin_that_cannot_start_keeps_the_old_rules(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.holder.broken = True
    setup.replace(SECOND)
    setup.clock.tick(2)
    assert len(setup.holder.seen) == 1
    assert "caPool" in setup.lines()[-1]["error"]


def test_a_file_that_goes_and_comes_back(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.path.unlink()
    setup.clock.tick(3)
    assert setup.messages() == ["The configuration file is gone; the rules stay as they are"]
    setup.path.write_text(SECOND)
    setup.clock.tick(2)
    assert len(setup.holder.seen) == 2


def test_a_link_that_is_switched_is_noticed(tmp_path: Path) -> None:
    """As Kubernetes replaces a ConfigMap."""
    for name, text in (("one", FIRST), ("two", SECOND)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yml").write_text(text)
        os.utime(tmp_path / name / "config.yml", ns=(1, 1))
    link = tmp_path / "data"
    link.symlink_to("one")
    setup = Setup(tmp_path / "data")
    setup.clock.tick()
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").rename(link)
    setup.clock.tick(2)
    assert len(setup.holder.seen) == 2


def test_a_signal_reloads_without_a_change(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.watch.reload()
    assert setup.messages() == ["The configuration file was read again; its rules are the same"]
    assert len(setup.holder.seen) == 2  # the files that rules name may have changed


def test_rules_of_the_edge_stay(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.orchestrator.apply(4, {"ingress": [{"service": "http_status:200"}]})
    setup.replace(SECOND)
    setup.clock.tick(2)
    assert setup.holder.ingress.version == 4
    line = next(line for line in setup.lines() if line["message"].startswith("The configuration file was read again"))
    assert line["version"] == 4


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.replace(FIRST.replace("connectTimeout", "connectTimeuot"))
    setup.clock.tick(2)
    assert any("field connectTimeuot not found" in text for text in setup.messages())


def test_flags_of_the_file_are_read_again_but_the_command_line_wins(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "url: http://one\nhttp-host-header: a\n", "--http-host-header", "mine")
    setup.replace("url: http://two\nhttp-host-header: b\n")
    setup.clock.tick(2)
    rule = setup.holder.ingress.rules[0]
    assert (rule.service.host, rule.settings.http_host_header) == ("two", "mine")


def test_the_signal_is_ignored_after_the_end(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    before = signal.getsignal(signal.SIGHUP)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        setup.watch.start(loop)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(setup.messages, what="reload")
        setup.watch.stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    try:
        run(main())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_reloads_its_file(tmp_path: Path) -> None:
    """The whole program, locally managed: rules of the file serve, are reported, and change with the file."""
    with dev_edge(tmp_path) as (edge, listening):
        config = tmp_path / "config.yml"
        token = tmp_path / "token"
        token.write_text(edge_token(tmp_path))
        keys = f"token-file: {token}\nedge: ['{listening['edge']}']\ncacert: {listening['ca']}\nprotocol: http2\n"
        config.write_text(keys + "ingress: [{service: 'http_status:418'}]\n")
        with connector("tunnel", "--config", config, "--output", "json", "run") as child:
            report = edge.event("local_configuration")
            assert report["config"]["ingress"] == [{"service": "http_status:418", "originRequest": {}}]
            new = tmp_path / "new.yml"
            new.write_text(keys + "ingress: [{service: 'http_status:419'}]\n")
            new.rename(config)
            child.message("Configuration: ~ rule #1 *: service http_status:418 -> http_status:419")
            config.write_text(keys + "ingress: []\n")
            child.signal(signal.SIGHUP)
            child.message("Configuration: ~ rule #1 *: service http_status:419 -> http_status:503")
            child.signal()
            assert child.wait() == 0
