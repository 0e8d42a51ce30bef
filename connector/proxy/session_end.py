"""Telling the edge that a UDP session of version 2 ended here: one RPC stream, without a task.

Owns: one such stream and its time limit. In: session ID, text. Out: the call and a farewell.
Never: cares what the answer says: the session is gone in any case.
"""

from __future__ import annotations

from connector.errors import WireError
from connector.protocol.counts import COUNTS
from connector.protocol.idle_wheel import IdleWheel
from connector.protocol.ports import Buffer, DatagramPort, ResetCode
from connector.wire.capnp import MessageCounter
from connector.wire.session_rpc import ANSWERS, FAREWELL, encode_unregister

ANSWER_SECONDS = 5.0
"""Limit of the answer. Precedent: cloudflared's --rpc-timeout."""

MAX_ANSWER = 64 * 1024
"""Bytes of one message of the answer; real ones have some 100."""

_LABELS = ("session", "unregister_udp_session")


class SessionEnd:
    """One call. It lies in the idle wheel until it is answered; implements StreamSink."""

    __slots__ = ("_answers", "_port", "_wheel", "active_at", "idle", "slot")

    def __init__(self, link: DatagramPort, session_id: bytes, text: str, wheel: IdleWheel, now: float) -> None:
        self.active_at = now
        self.idle = ANSWER_SECONDS
        self.slot = 0
        self._answers = MessageCounter(MAX_ANSWER)
        self._wheel = wheel
        COUNTS.add("cloudflared_rpc_client_operations", *_LABELS)
        self._port = link.open_rpc(encode_unregister(session_id, text), self)
        if self._port is not None:
            wheel.add(self)

    def on_data(self, data: Buffer) -> None:
        """Count the answers; after the last one say goodbye."""
        port = self._port
        if port is None:
            return
        port.consumed(len(data))
        try:
            self._answers.feed(data)
        except WireError:
            self._give_up()
            return
        if self._answers.messages >= ANSWERS:
            self._port = None
            self._wheel.remove(self)
            port.write(FAREWELL)
            port.write_eof()
            port.stop_reading()

    def on_eof(self) -> None:
        """The edge ended the stream before it had answered."""
        self._give_up()

    def on_reset(self, error: BaseException | None) -> None:
        """The stream or the link is gone."""
        if self._port is not None:
            self._port = None
            self._wheel.remove(self)

    def pause_writing(self) -> None:
        """Nothing more comes from here anyway."""

    def resume_writing(self) -> None:
        """Nothing waits."""

    def on_idle(self, now: float) -> None:
        """No answer in time."""
        self._give_up()

    def _give_up(self) -> None:
        port, self._port = self._port, None
        if port is not None:
            COUNTS.add("cloudflared_rpc_client_failures", *_LABELS)
            self._wheel.remove(self)
            port.reset(ResetCode.CANCELLED)
