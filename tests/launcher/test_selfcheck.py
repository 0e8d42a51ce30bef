"""The self-check against brokers and against things that are none: every failure names its hop."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import embedded, mosquitto, selfcheck
from launcher.credentials import User
from launcher.errors import HopError
from tests.launcher.support import accepts, needs_mosquitto, running_mosquitto, users
from tests.support.aio import run


@contextlib.contextmanager
def web_server(status: int, body: bytes) -> Iterator[int]:
    """Answers every request like this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def listener(answer: bytes | None = None) -> Iterator[int]:
    """Accepts, says `answer` and closes; with None it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    if answer is None:
                        done.wait(20)
                    else:
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def check(target: selfcheck.Target) -> HopError:
    demo, health = users()
    with pytest.raises(HopError) as caught:
        selfcheck.run(target, demo, health, lambda step: None)
    return caught.value


def closed_port() -> int:
    return mosquitto.free_ports(1)[0]


def test_a_closed_port_is_a_websocket_failure() -> None:
    error = check(selfcheck.Target("127.0.0.1", closed_port(), "/mqtt"))
    assert error.hop == selfcheck.WEBSOCKET
    assert "refused" in error.message


def test_an_answer_other_than_101_is_told_with_its_status_and_text() -> None:
    with web_server(502, b"Unable to reach the origin service\nmore") as port:
        error = check(selfcheck.Target("127.0.0.1", port, "/mqtt"))
    assert error.hop == selfcheck.WEBSOCKET
    assert "502 Bad Gateway: Unable to reach the origin service" in error.message
    assert "more" not in error.message


def test_a_peer_that_closes_is_told() -> None:
    with listener(b"") as port:
        error = check(selfcheck.Target("127.0.0.1", port, "/mqtt"))
    assert error.hop == selfcheck.WEBSOCKET


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    for name in ("one", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
             "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=directory, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    return directory


def test_plain_text_where_tls_should_be_is_a_tls_failure(certificates: Path) -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        error = check(selfcheck.Target("127.0.0.1", port, "/mqtt", certificates / "one.pem"))
    assert error.hop == selfcheck.TLS
    assert "openssl s_client" in error.advice


def test_a_certificate_of_another_ca_is_a_tls_failure(certificates: Path) -> None:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "other.pem", certificates / "other.key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        error = check(selfcheck.Target("127.0.0.1", server.getsockname()[1], "/mqtt", certificates / "one.pem"))
        thread.join()
    assert error.hop == selfcheck.TLS
    assert "self-signed" in error.message or "self signed" in error.message


def test_a_broker_that_says_nothing_is_a_connect_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "STEP_SECONDS", 0.3)
    with listener(None) as port:
        error = check(selfcheck.Target("127.0.0.1", port))
    assert error.hop == selfcheck.CONNECT
    assert "no CONNACK" in error.message


def test_interrupting_ends_the_wait() -> None:
    stop = threading.Event()
    stop.set()
    demo, health = users()
    with listener(None) as port, pytest.raises(HopError, match="interrupted"):
        selfcheck.run(selfcheck.Target("127.0.0.1", port), demo, health, lambda step: None, cancelled=stop)


@needs_mosquitto
def test_a_wrong_password_for_the_health_user_is_a_connect_failure(tmp_path: Path) -> None:
    demo, health = users()

    async def main() -> HopError:
        async with running_mosquitto(tmp_path, demo, health) as broker:
            target = selfcheck.Target("127.0.0.1", broker.ws_port, "/mqtt")
            wrong = User(health.name, "wrong", health.topics)
            with pytest.raises(HopError) as caught:
                await asyncio.to_thread(selfcheck.run, target, demo, wrong, lambda step: None)
            return caught.value

    error = run(main())
    assert error.hop == selfcheck.CONNECT
    assert "'health' was refused" in error.message


@needs_mosquitto
def test_a_user_without_rights_to_the_topic_is_a_subscribe_failure(tmp_path: Path) -> None:
    demo, _ = users()
    health = User("health", "x" * 24, ("elsewhere",))

    async def main() -> HopError:
        async with running_mosquitto(tmp_path, demo, health) as broker:
            target = selfcheck.Target("127.0.0.1", broker.ws_port, "/mqtt")
            with pytest.raises(HopError) as caught:
                await asyncio.to_thread(selfcheck.run, target, demo, health, lambda step: None)
            return caught.value

    # Mosquitto grants the subscription and refuses the message; other brokers refuse the subscription.
    assert run(main()).hop in {selfcheck.SUBSCRIBE, selfcheck.PUBLISH}


@needs_mosquitto
def test_an_open_broker_is_a_failure(tmp_path: Path) -> None:
    demo, health = users()
    binary = mosquitto.find_mosquitto()
    assert binary is not None

    async def main() -> HopError:
        from launcher.processes import Child

        port = mosquitto.free_ports(1)[0]
        conf = tmp_path / "open.conf"
        conf.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        child = await Child.start("broker", [binary.path, "-c", str(conf)])
        try:
            target = selfcheck.Target("127.0.0.1", port)
            while True:
                try:
                    await asyncio.to_thread(selfcheck.check_listener, target, health)
                    break
                except HopError:
                    await asyncio.sleep(0.02)
            with pytest.raises(HopError) as caught:
                await asyncio.to_thread(selfcheck.run, target, demo, health, lambda step: None)
            return caught.value
        finally:
            await child.stop()

    error = run(main())
    assert "may publish outside its topic" in error.message or "was let in" in error.message


@pytest.mark.skipif(not embedded.available(), reason="NO amqtt HERE: the embedded broker is not tested")
def test_the_embedded_broker_keeps_the_same_rules(tmp_path: Path) -> None:
    demo, health = users()
    steps: list[selfcheck.Step] = []
    lines: list[str] = []

    async def main() -> None:
        broker = await mosquitto.start_embedded(
            tmp_path, [demo, health], on_line=lambda _, line: lines.append(line), ready=lambda b: accepts(b, health)
        )
        try:
            target = selfcheck.Target("127.0.0.1", broker.ws_port, "/mqtt", mqtt5=False)
            await asyncio.to_thread(selfcheck.run, target, demo, health, steps.append)

            def outside() -> list[int]:
                with selfcheck.Session(target, health.name, health.password) as session:
                    session.connect()
                    with pytest.raises(HopError) as caught:
                        session.subscribe("demo/#")
                    assert caught.value.hop == selfcheck.SUBSCRIBE
                    return []

            await asyncio.to_thread(outside)
        finally:
            await broker.child.stop()
        assert broker.child.status == 0, list(broker.child.tail)

    run(main(), limit=60)
    assert [step.hop for step in steps][:3] == [selfcheck.CONNECT, selfcheck.SUBSCRIBE, selfcheck.DELIVERY]
    assert steps[-1].detail == "anonymous refused"
    assert not any(secret in line for line in lines for secret in (demo.password, health.password))


def test_the_embedded_broker_says_what_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedded.main([]) == 2
    assert "usage" in capsys.readouterr().err
