"""The self-check: a real MQTT client through every hop, each failure named after its hop.

Owns: MQTT sessions for checking (paho, driven without its thread), the steps and their order.
In: an address, TLS and WebSocket settings, users. Out: steps with times; HopError for the first that fails.
Never: blocks longer than its deadlines; runs on the event loop's thread (callers use `asyncio.to_thread`).

Strategy. paho can run its own thread, whose exceptions then need carrying over. Here the caller's thread calls
`loop()` until something it waits for is there, or the deadline passes, or `cancelled` is set.
"""

from __future__ import annotations

import http.client
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.client import WebsocketConnectionError
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from launcher.credentials import User
from launcher.errors import HopError

TLS, WEBSOCKET = "public TLS", "WebSocket"
CONNECT, SUBSCRIBE, PUBLISH, DELIVERY = "MQTT CONNECT", "MQTT SUBSCRIBE", "MQTT PUBLISH", "delivery"

STEP_SECONDS = 10.0
"""Longest wait for one answer. Everything is on this machine: what takes longer is stuck."""

CHECK_TOPIC = "health/selfcheck"
PROXY_HEADER = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x7f\x00\x00\x01\xff\xff\x23\x29"
"""PROXY protocol 2 for a TCP connection from 127.0.0.1 (its specification, section 2.2), for checks of a listener that
wants one. The command LOCAL, made for this, is refused by Mosquitto 2.1."""

REFUSALS = {134, 135}
"""Bad user name or password; not authorized (MQTT 5 section 3.2.2.2). Brokers answer either, and paho translates the
two codes of MQTT 3.1.1 to them."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect: plain MQTT when `ws_path` is None, TLS when `cafile` is set."""

    host: str
    port: int
    ws_path: str | None = None
    cafile: Path | None = None
    mqtt5: bool = True
    proxied: bool = False
    """The listener wants a PROXY protocol header first (Mosquitto 2.1's `enable_proxy_protocol`)."""

    secure: bool = False
    """TLS with the CAs of the system; `cafile` implies TLS too."""

    @property
    def tls(self) -> bool:
        """Whether there is TLS."""
        return self.secure or self.cafile is not None

    def context(self) -> ssl.SSLContext:
        """TLS settings as any client would have them: the edge's CA or the system's, and the name checked."""
        return ssl.create_default_context(cafile=str(self.cafile) if self.cafile is not None else None)

    @property
    def url(self) -> str:
        """The address as MQTT clients write it."""
        scheme = ("mqtt" if self.ws_path is None else "ws") + ("s" if self.tls else "")
        return f"{scheme}://{self.host}:{self.port}{self.ws_path or ''}"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was found to work."""

    hop: str
    detail: str
    ms: float


Report = Callable[[Step], None]


class RefusedError(Exception):
    """The broker answered CONNECT with a reason code other than success."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} (code {code})")
        self.code = code


class _Client(mqtt.Client):
    """paho that remembers its socket: when the WebSocket handshake fails it forgets to close it."""

    dialled: socket.socket | None = None
    preamble = b""

    def _create_socket_connection(self) -> socket.socket:
        self.dialled = super()._create_socket_connection()
        if self.preamble:
            self.dialled.sendall(self.preamble)
        return self.dialled

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        wrapped = super()._ssl_wrap_socket(tcp_sock)
        self.dialled = wrapped
        return wrapped


class Session:
    """One MQTT connection under check. Use as a context manager; leaving it disconnects.

    `durable`: a client id whose session the broker keeps (MQTT 3.1.1 only: 5 says it with an expiry).
    """

    def __init__(
        self,
        target: Target,
        user: str | None,
        password: str | None,
        *,
        cancelled: threading.Event | None = None,
        durable: str | None = None,
    ) -> None:
        self.target = target
        self._cancelled = cancelled or threading.Event()
        self._connack: int | None = None
        self._connack_text = ""
        self.session_present = False
        self._disconnected: str | None = None
        self._suback: dict[int | None, list[int]] = {}
        self._puback: dict[int, int] = {}
        self.messages: list[tuple[str, bytes]] = []
        self._client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=durable or f"selfcheck-{secrets.token_hex(4)}",
            clean_session=None if target.mqtt5 else durable is None,
            transport="tcp" if target.ws_path is None else "websockets",
            protocol=MQTTProtocolVersion.MQTTv5 if target.mqtt5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        self._client.connect_timeout = STEP_SECONDS
        if target.proxied:
            self._client.preamble = PROXY_HEADER
        if target.ws_path is not None:
            self._client.ws_set_options(path=target.ws_path)
        if target.tls:
            self._client.tls_set_context(target.context())
        if user is not None:
            self._client.username_pw_set(user, password)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message

    def _on_connect(self, _c: Any, _u: Any, flags: Any, reason: Any, _props: Any = None) -> None:
        self.session_present = bool(flags.session_present)
        self._connack, self._connack_text = reason.value, str(reason)

    def _on_disconnect(self, _c: Any, _u: Any, _flags: Any, reason: Any, _props: Any = None) -> None:
        self._disconnected = str(reason)

    def _on_subscribe(self, _c: Any, _u: Any, mid: int, reasons: Any, _props: Any = None) -> None:
        self._suback[mid] = [reason.value for reason in reasons]

    def _on_publish(self, _c: Any, _u: Any, mid: int, reason: Any, _props: Any = None) -> None:
        self._puback[mid] = reason.value

    def _on_message(self, _c: Any, _u: Any, message: Any) -> None:
        self.messages.append((message.topic, bytes(message.payload)))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._client.disconnect()
            self._client.loop(0.01)
        except (OSError, ValueError):
            pass
        self._client._reset_sockets()  # what its destructor does; without its thread nothing else does it in time
        if self._client.dialled is not None:
            self._client.dialled.close()

    def _until(self, arrived: Callable[[], bool], hop: str, what: str) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while not arrived():
            if self._cancelled.is_set():
                raise HopError(hop, "interrupted")
            if time.monotonic() >= deadline:
                raise HopError(hop, f"no {what} within {STEP_SECONDS:.0f} s from {self.target.url}")
            code = self._client.loop(0.1)
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS and not arrived():
                why = self._disconnected or mqtt.error_string(code)
                raise HopError(hop, f"connection lost while waiting for {what}: {why}")

    def connect(self) -> None:
        """Dial, TLS, WebSocket, CONNECT; RefusedError when the broker says no."""
        try:
            self._client.connect(self.target.host, self.target.port, keepalive=30)
        except WebsocketConnectionError as error:
            raise HopError(WEBSOCKET, f"{self.target.url}: {explain_upgrade(self.target) or error}") from error
        except ssl.SSLError as error:
            raise HopError(TLS, f"{self.target.url}: {error}") from error
        except (OSError, ValueError) as error:
            hop = CONNECT if self.target.ws_path is None else WEBSOCKET
            raise HopError(hop, f"cannot connect to {self.target.url}: {error}") from error
        self._until(lambda: self._connack is not None, CONNECT, "CONNACK")
        assert self._connack is not None
        if self._connack != 0:
            raise RefusedError(self._connack, self._connack_text)

    def subscribe(self, topic: str) -> None:
        """SUBSCRIBE with QoS 1 and its SUBACK."""
        code, mid = self._client.subscribe(topic, qos=1)
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise HopError(SUBSCRIBE, mqtt.error_string(code))
        self._until(lambda: mid in self._suback, SUBSCRIBE, "SUBACK")
        granted = self._suback[mid]
        if granted != [1]:
            raise HopError(SUBSCRIBE, f"the broker granted {granted} for {topic!r} instead of QoS 1")

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """PUBLISH with QoS 1 and its PUBACK; returns the reason code."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise HopError(PUBLISH, mqtt.error_string(info.rc))
        self._until(lambda: info.mid in self._puback, PUBLISH, "PUBACK")
        return self._puback[info.mid]

    def receive(self, topic: str, payload: bytes) -> None:
        """Wait until exactly this message was delivered."""
        self._until(lambda: (topic, payload) in self.messages, DELIVERY, "the message just published")


def explain_upgrade(target: Target) -> str:
    """Ask for the WebSocket once more by plain HTTP and say what came instead of 101; empty when it cannot be said."""
    connection: http.client.HTTPConnection
    if target.tls:
        connection = http.client.HTTPSConnection(target.host, target.port, timeout=5, context=target.context())
    else:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=5)
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Protocol": "mqtt",
    }
    try:
        connection.request("GET", target.ws_path or "/", headers=headers)
        response = connection.getresponse()
        text = f"the upgrade was answered with {response.status} {response.reason}"
        if response.status != 101:
            body = response.read(400).decode("utf-8", "replace").strip()
            text += f": {body.splitlines()[0][:160]}" if body else ""
        return text
    except (OSError, http.client.HTTPException) as error:
        return f"the upgrade was not answered: {error}"
    finally:
        connection.close()


def check_listener(target: Target, user: User, *, cancelled: threading.Event | None = None) -> float:
    """An authenticated CONNECT; returns milliseconds. The broker's readiness."""
    begun = time.monotonic()
    with Session(target, user.name, user.password, cancelled=cancelled) as session:
        session.connect()
    return (time.monotonic() - begun) * 1000.0


def round_trip(target: Target, user: User, topic: str, *, cancelled: threading.Event | None = None) -> float:
    """CONNECT, SUBSCRIBE, a QoS 1 message to itself; returns milliseconds. RefusedError, HopError."""
    begun = time.monotonic()
    with Session(target, user.name, user.password, cancelled=cancelled) as session:
        session.connect()
        session.subscribe(topic)
        payload = secrets.token_hex(16).encode()
        code = session.publish(topic, payload)
        if code >= 128:
            raise HopError(PUBLISH, f"the broker refused the message: reason code {code}")
        session.receive(topic, payload)
    return (time.monotonic() - begun) * 1000.0


def check_tls(target: Target) -> str:
    """A TLS handshake with the public side; returns the version."""
    advice = f"check by hand: openssl s_client -connect {target.host}:{target.port}"
    advice += f" -CAfile {target.cafile}" if target.cafile is not None else ""
    try:
        with (
            socket.create_connection((target.host, target.port), STEP_SECONDS) as plain,
            target.context().wrap_socket(plain, server_hostname=target.host) as secure,
        ):
            return secure.version() or "TLS"
    except ssl.SSLCertVerificationError as error:
        raise HopError(TLS, f"{target.url}: {error.verify_message}", advice=advice) from error
    except OSError as error:
        raise HopError(TLS, f"{target.url}: {error}", advice=advice) from error


def _refusal(target: Target, user: str | None, password: str | None, who: str, stop: threading.Event | None) -> Step:
    begun = time.monotonic()
    with Session(target, user, password, cancelled=stop) as session:
        try:
            session.connect()
        except RefusedError as error:
            if error.code not in REFUSALS:
                raise HopError(CONNECT, f"{who} was refused for another reason: {error}") from error
            return Step(CONNECT, f"{who} refused", (time.monotonic() - begun) * 1000.0)
    raise HopError(CONNECT, f"{who} was let in", advice="this broker is open: stop, and report it as a bug")


def run(
    target: Target,
    demo: User,
    health: User,
    report: Report,
    *,
    topic: str = CHECK_TOPIC,
    cancelled: threading.Event | None = None,
) -> None:
    """All steps against `target`, reported as they succeed; HopError names the first hop that fails."""
    begun = time.monotonic()

    def done(hop: str, detail: str) -> None:
        nonlocal begun
        now = time.monotonic()
        report(Step(hop, detail, (now - begun) * 1000.0))
        begun = now

    if target.tls:
        done(TLS, f"{check_tls(target)}, certificate verified")
    with Session(target, health.name, health.password, cancelled=cancelled) as session:
        try:
            session.connect()
        except RefusedError as error:
            raise HopError(CONNECT, f"user {health.name!r} was refused: {error}") from error
        done(CONNECT, f"accepted over {'wss' if target.tls else 'ws'} (MQTT {'5' if target.mqtt5 else '3.1.1'})")
        session.subscribe(topic)
        done(SUBSCRIBE, f"{topic} granted with QoS 1")
        payload = secrets.token_hex(16).encode()
        code = session.publish(topic, payload)
        if code >= 128:
            raise HopError(PUBLISH, f"the broker refused the message: reason code {code}")
        acknowledged = (time.monotonic() - begun) * 1000.0
        session.receive(topic, payload)
        done(DELIVERY, f"QoS 1 message back, PUBACK after {acknowledged:.1f} ms")
        if target.mqtt5:  # 3.1.1 has no way to say that a message was refused
            code = session.publish(f"{demo.name}/selfcheck", payload)
            if code != 135:
                raise HopError(PUBLISH, f"user {health.name!r} may publish outside its topic: reason code {code}")
            done(PUBLISH, "outside its topics refused")
    with Session(target, demo.name, demo.password, cancelled=cancelled) as session:
        try:
            session.connect()
        except RefusedError as error:
            raise HopError(CONNECT, f"user {demo.name!r} was refused: {error}") from error
    done(CONNECT, f"user {demo.name!r} accepted")
    report(_refusal(target, demo.name, secrets.token_urlsafe(12), "wrong password", cancelled))
    report(_refusal(target, None, None, "anonymous", cancelled))
