"""An engine that goes away, a token that nobody knows: one line, and the next `up` goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

from tests.containers.stacks import (
    ENGINE,
    inspect,
    launcher,
    stack,
)


class Door(threading.Thread):
    """A unix socket before the engine's that closes for good after `requests` connections were made."""

    def __init__(self, path: Path, connections: int) -> None:
        super().__init__(daemon=True)
        self.left = connections
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.open: list[socket.socket] = []
        self.copiers: list[threading.Thread] = []

    def run(self) -> None:
        while self.left > 0:
            ours, _ = self.listener.accept()
            self.left -= 1
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(str(ENGINE / "docker.sock"))
            self.open += [ours, theirs]
            for one, other in ((ours, theirs), (theirs, ours)):
                copier = threading.Thread(target=self._copy, args=(one, other), daemon=True)
                self.copiers.append(copier)
                copier.start()
        self.listener.close()
        for end in self.open:  # gone: in the middle of whatever was going on
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for copier in self.copiers:
            copier.join()
        for end in self.open:
            end.close()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_an_engine_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    with stack("tgone", tmp_path) as made:
        for number, connections in enumerate((2, 3, 4)):
            path = Path(f"/tmp/tgone-{os.getpid()}-{number}.sock")
            door = Door(path, connections)
            door.start()
            try:
                line = made.up(DOCKER_HOST=f"unix://{path}").one_line()
            finally:
                door.join(60)
                path.unlink()
            assert any(words in line for words in ("went away", "does not answer", "did not answer")), line
        result = made.up().good()
        assert result.event("status")["up"]
        if not made.passwords:
            made.passwords["device"] = made.run("user passwd", "device").good().event("users")["users"][0]["password"]
        made.public()
    assert (
        "no docker engine"
        in launcher(
            "up", "--engine", "docker", "--state-dir", tmp_path / "no", "--json", DOCKER_HOST="unix:///nowhere.sock"
        ).one_line()
    )


def test_a_token_that_the_edge_does_not_know(tmp_path: Path) -> None:
    with stack("ttoken", tmp_path) as made:
        (tmp_path / "foreign").mkdir()
        from tests.support.processes import edge_token

        foreign = edge_token(tmp_path / "foreign", "other")
        made.edge.token.write_text(foreign)
        line = made.up("--timeout", "20").one_line()
        assert "connector" in line
        assert inspect(made.broker)["State"]["Running"]
        made.edge.token.write_text("eyJub3QiOiJhIHRva2VuIn0=")
        bad = made.up()
        assert bad.status == 2
        assert "is not a tunnel token" in bad.event("failed")["message"]
