"""What the leading process and its workers say to each other, and how it looks on the socket between them.

Owns: every message, its encoding, the frame. In: messages, bytes. Out: bytes, messages.
Never: I/O; decides anything.

A frame is four bytes of length (big-endian) and a msgpack array that begins with the message's name. Both ends are the
same program of the same version, so a message that does not decode is a bug, and ends the worker.

`Settings` and `Rules` hold pickles: both are objects of this program that no format of its own describes (a rule set
that was read from a local file with its flags, the flags' checked values), on a socket that only we hold.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from connector.protocol.protocol_choice import RemoteFeatures, Selector, Transport
from connector.protocol.protocol_race import DialPlan, QuicPath

MAX_MESSAGE: Final = 32 * 1024 * 1024
"""Bytes of one message: a rule set of 1 MiB JSON is a few MiB of objects, a heap profile or a page of metrics as
much. More is a bug."""

HEAD: Final = 4


class Message(msgspec.Struct, tag=True, array_like=True):
    """One message."""


# -- to a worker ------------------------------------------------------------------------------------------------------


class Settings(Message):
    """The first message: who the worker is and what the run was asked to do. `token` may have been rotated since."""

    worker: int
    connector_id: str
    threshold: int
    """Level of log lines that somebody wants."""
    config: bytes
    version: int
    """Of the configuration in force."""
    rules: bytes


class Run(Message):
    """Keep this connection up. `registered`: some connection of the tunnel has been registered before."""

    conn_index: int
    registered: bool


class Stop(Message):
    """Drain: every connection unregisters, and what is in flight has `seconds`."""

    seconds: float


class Quit(Message):
    """End now."""


class Check(Message):
    """Find out whether the link of this connection still works."""

    conn_index: int


class Wake(Message):
    """End the back-off sleep of this connection."""

    conn_index: int


class MoveOn(Message):
    """Leave this connection's link to drain apart; dial again after `delay` seconds (None: at once, without a line)."""

    conn_index: int
    delay: float | None = None


class Address(Message):
    """Answers NeedAddress; no host: none is left."""

    conn_index: int
    host: str
    port: int


class Connected(Message):
    """How many connections of the whole tunnel are registered now."""

    count: int


class Choice(Message):
    """What is known about transports now."""

    selector: Selector
    path: QuicPath
    record: RemoteFeatures
    port: int


class UseToken(Message):
    """Registrations use this token from now on."""

    account_tag: str
    secret: bytes
    tunnel_id: str
    endpoint: str

    def __repr__(self) -> str:
        return "<UseToken>"


class DropToken(Message):
    """The edge refused the newest token: the one before is in force again."""


class Rules(Message):
    """Get this rule set ready, but do not use it yet. Answered by Prepared."""

    serial: int
    version: int
    rules: bytes


class Enforce(Message):
    """Put the rule set that is ready in force (`use`), or forget it."""

    serial: int
    use: bool


class PushDone(Message):
    """Answers Push: the version in force, and an error's text or nothing."""

    serial: int
    version: int
    error: str


class Ask(Message):
    """Asks for a page, or for `metrics`. Answered by Numbers or Text."""

    serial: int
    page: str
    query: dict[str, list[str]]


class PageDone(Message):
    """Answers AskPage."""

    serial: int
    status: int
    body: bytes
    content_type: str


class LogLevel(Message):
    """Level of log lines that somebody wants from now on."""

    threshold: int


class Streamer(Message):
    """Who watches the log through another worker; nobody: empty."""

    actor: str


class LogEvent(Message):
    """One event of the log, for the session that streams here."""

    level: str
    event: str
    text: str


class EndStream(Message):
    """The session that streams here has to end. `code` and `reason` as in a WebSocket's close."""

    code: int
    reason: str


class Probe(Message):
    """Shake hands over QUIC with this address. Answered by Probed."""

    host: str
    port: int


class FlowMoved(Message):
    """A UDP flow of version 3 began in another worker, at this time: if it is here, it has moved there."""

    flow_id: bytes
    began: float


class Ping(Message):
    """Answered by Pong."""

    serial: int


# -- from a worker ----------------------------------------------------------------------------------------------------


class Hello(Message):
    """The worker is ready for work."""

    icmp_sources: list[str]


class Failed(Message):
    """The worker cannot start, and no other could."""

    error: str
    advice: str


class Log(Message):
    """One log line."""

    level: str
    message: str
    fields: dict[str, Any]


class NeedAddress(Message):
    """Which address has this connection?"""

    conn_index: int


class Rotate(Message):
    """Take another address for this connection."""

    conn_index: int
    unreachable: bool
    leave_region: bool


class Unreached(Message):
    """A dial reached nobody."""


class Registered(Message):
    """This connection is registered."""

    conn_index: int
    host: str
    port: int
    transport: Transport
    location: str


class Disconnected(Message):
    """This connection is not registered any more."""

    conn_index: int


class Ended(Message):
    """This connection has ended: as asked, or to wait with all (`together`), or with what ends the run (`error`)."""

    conn_index: int
    together: bool
    error: str
    advice: str


class CameUp(Message):
    """See TransportChoice.came_up."""

    transport: Transport
    raced: bool
    quic_heard: bool
    quic_failed: bool
    forbidden: bool


class DialFailed(Message):
    """See TransportChoice.dial_failed."""

    plan: DialPlan
    forbidden: bool


class LinkEnded(Message):
    """See TransportChoice.link_ended."""

    transport: Transport
    by_edge: bool


class UsePort(Message):
    """See TransportChoice.use_port."""

    port: int


class TokenNews(Message):
    """The edge took or refused the token with this secret."""

    secret: bytes
    accepted: bool

    def __repr__(self) -> str:
        return f"<TokenNews accepted={self.accepted}>"


class Push(Message):
    """The edge pushed a configuration; `config` is JSON."""

    serial: int
    version: int
    config: bytes


class Prepared(Message):
    """Answers Rules; no error: the rule set is ready."""

    serial: int
    error: str
    advice: str


Number = tuple[str, tuple[str, ...], float]
Buckets = tuple[str, tuple[str, ...], tuple[float, ...], list[int], float]
"""Family, label values, upper bounds, counts, sum."""


class Numbers(Message):
    """Answers Ask for `metrics`."""

    serial: int
    numbers: list[Number]
    histograms: list[Buckets]


class Text(Message):
    """Answers Ask."""

    serial: int
    text: str


class AskPage(Message):
    """Management asks for a page that is the whole connector's."""

    serial: int
    page: str
    query: dict[str, list[str]]


class Listen(Message):
    """A management session streams the log from now on, or no longer (empty)."""

    actor: str


class Probed(Message):
    """How the probe went; no error: QUIC answered."""

    error: str
    forbidden: bool


class FlowBegan(Message):
    """A UDP flow of version 3 began, at this time of the machine's clock."""

    flow_id: bytes
    began: float


class Pong(Message):
    """Answers Ping."""

    serial: int


ToWorker = (
    Settings | Run | Stop | Quit | Check | Wake | MoveOn | Address | Connected | Choice | UseToken | DropToken | Rules
    | Enforce | PushDone | Ask | PageDone | LogLevel | Streamer | LogEvent | EndStream | Probe | FlowMoved | Ping
)  # fmt: skip
ToLeader = (
    Hello | Failed | Log | NeedAddress | Rotate | Unreached | Registered | Disconnected | Ended | CameUp | DialFailed
    | LinkEnded | UsePort | TokenNews | Push | Prepared | Numbers | Text | AskPage | Listen | Probed | FlowBegan | Pong
)  # fmt: skip

to_worker: Final[msgspec.msgpack.Decoder[ToWorker]] = msgspec.msgpack.Decoder(ToWorker)
to_leader: Final[msgspec.msgpack.Decoder[ToLeader]] = msgspec.msgpack.Decoder(ToLeader)
_encoder: Final = msgspec.msgpack.Encoder(enc_hook=str)  # fields of log lines may be anything


class MessageTooLargeError(Exception):
    """A message beyond MAX_MESSAGE."""


def encode(message: Message) -> bytes:
    """Give one frame. Errors: MessageTooLargeError."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise MessageTooLargeError(f"{type(message).__name__} has {len(body)} bytes, more than {MAX_MESSAGE}")
    return len(body).to_bytes(HEAD, "big") + body


class FrameReader:
    """Cuts bytes into the bodies of frames."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> list[bytes]:
        """Give the bodies that are whole now. Errors: MessageTooLargeError."""
        buffer = self._buffer
        buffer += data
        bodies = []
        start = 0
        while len(buffer) - start >= HEAD:
            size = int.from_bytes(buffer[start : start + HEAD], "big")
            if size > MAX_MESSAGE:
                raise MessageTooLargeError(f"a frame of {size} bytes, more than {MAX_MESSAGE}")
            end = start + HEAD + size
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[start + HEAD : end]))
            start = end
        if start:
            del buffer[:start]
        return bodies
