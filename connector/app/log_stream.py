"""The management log stream: log events as WebSocket messages, to one person at a time.

Owns: sessions, their filters, limits and closes. In: frames of a client, events of the log. Out: frames.
Never: holds the log up (what does not fit its queue is dropped); writes from inside a log call (it may come from the
middle of a transport's work), but from a callback of the loop.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from connector.app.log_formats import EVENT_NAMES
from connector.app.logs import Logger
from connector.protocol.ports import Buffer, StreamPort
from connector.wire.ws_messages import (
    CLOSE,
    NORMAL,
    PING,
    PONG,
    TEXT,
    UNSUPPORTED_DATA,
    MessageReader,
    WebSocketError,
    encode_close,
    encode_frame,
)

INVALID_COMMAND, LIMIT_EXCEEDED, IDLE_EXCEEDED = 4001, 4002, 4003

WINDOW = 30
"""Events that wait for a session; more are dropped, as in cloudflared."""

MAX_MESSAGE = 32 * 1024
"""Bytes of a client's message, as in cloudflared; real ones have under 200."""

PING_SECONDS = 15.0
IDLE_SECONDS = 300.0
"""Without streaming for so long a session is closed."""

_LEVELS = ("debug", "info", "warn", "error")


class Filters:
    """What a session wants: events of these types, of this level and above, and of those a part."""

    __slots__ = ("events", "level", "sampling")

    def __init__(self, source: Any = None) -> None:
        """Read `filters` of a start_streaming; ValueError for what cloudflared refuses."""
        source = {} if source is None else source
        if not isinstance(source, dict):
            raise ValueError("filters are no object")
        events = source.get("events") or []
        level = source.get("level")
        sampling = source.get("sampling") or 0
        if not isinstance(events, list) or any(event not in EVENT_NAMES for event in events):
            raise ValueError("unknown event type")
        if level is not None and level not in _LEVELS:
            raise ValueError("unknown level")
        if not isinstance(sampling, (int, float)) or isinstance(sampling, bool):
            raise ValueError("sampling is no number")
        self.events = frozenset(events)
        self.level = _LEVELS.index(level) if level is not None else 0
        self.sampling = float(sampling)

    def want(self, level: str, event: str) -> bool:
        """Tell whether an event passes; the last part of the answer is chance."""
        if _LEVELS.index(level) < self.level or (self.events and event not in self.events):
            return False
        return not 0 < self.sampling < 1 or random.random() < self.sampling  # noqa: S311  (no secret)


class LogStreams:
    """All sessions of a process; at most one streams, of all workers where there are some."""

    def __init__(self, log: Logger) -> None:
        self.log = log
        self.loop = asyncio.get_running_loop()
        self.sessions: set[LogStream] = set()
        self.streaming: LogStream | None = None
        self.elsewhere = ""
        """In a worker: who streams through another one."""
        self.on_actor: Callable[[str], None] = lambda actor: None
        """Called before streaming begins, with who streams."""

    def start(self, session: LogStream) -> bool:
        """Let `session` stream; it takes over from another of the same actor. False: somebody else is streaming."""
        current = self.streaming
        busy = self.elsewhere or (current.actor if current is not None and current is not session else "")
        if busy:
            if busy != session.actor:
                self.log.warn(
                    "Another management session request was attempted but one session already being served; "
                    "there is a limit of streaming log sessions to reduce overall performance impact."
                )
                return False
            self.log.info(
                "Another management session request for the same actor was requested; "
                "the other session will be disconnected to handle the new request."
            )
            if current is not None and current is not session:
                current.end(NORMAL, "context closed")
        self.streaming = session
        self.on_actor(session.actor)
        self.log.output.listen(session.on_event)
        return True

    def stop(self, session: LogStream) -> None:
        """Let `session` stream no more."""
        if self.streaming is session:
            self.streaming = None
            self.log.output.listen(None)

    def close(self) -> None:
        """End every session: the connector ends, and does not wait for those who watch."""
        for session in list(self.sessions):
            session.end(NORMAL, "context closed")


class LogStream:
    """One WebSocket; a StreamSink. Streams from start_streaming to stop_streaming."""

    def __init__(self, streams: LogStreams, port: StreamPort, actor: str, *, deflate: bool = False) -> None:
        self.actor = actor
        self.filters = Filters()
        self._streams = streams
        self._loop = streams.loop
        self._port = port
        self._deflate: Final = deflate
        self._reader = MessageReader(masked=True, limit=MAX_MESSAGE, deflate=deflate)
        self._queue: deque[str] = deque()
        self._flush_due = False
        self._paused = False
        self._ended = False
        self._ping = self._loop.call_later(PING_SECONDS, self._on_ping)
        self._idle: asyncio.TimerHandle | None = None
        streams.sessions.add(self)
        self._wait_idle()

    # -- from the log

    def on_event(self, level: str, event: str, text: str) -> None:
        """Queue an event that passes the filters."""
        if len(self._queue) < WINDOW and self.filters.want(level, event):
            self._queue.append(text)
            if not self._flush_due and not self._paused:
                self._flush_due = True
                self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        while self._queue and not self._paused and not self._ended:
            self._send(f'{{"type":"logs","logs":[{self._queue.popleft()}]}}'.encode())

    # -- from the edge

    def on_data(self, data: Buffer) -> None:
        """Read frames."""
        raw = bytes(data)
        self._port.consumed(len(raw))
        if self._ended:
            return
        try:
            messages = self._reader.receive(raw)
        except WebSocketError as error:
            self.end(error.code, str(error))
            return
        for message in messages:
            if self not in self._streams.sessions:
                return
            if message.opcode == PING:
                self._port.write(encode_frame(PONG, message.data))
            elif message.opcode == CLOSE:
                self.end(NORMAL if message.code == 1005 else message.code, "")
            elif message.opcode == TEXT:
                self._command(message.data)
            elif message.opcode != PONG:
                self.end(UNSUPPORTED_DATA, "invalid message type was provided")

    def on_eof(self) -> None:
        """The client is gone."""
        self._finish()
        self._port.write_eof()

    def on_reset(self, error: BaseException | None) -> None:
        """The client is gone."""
        self._finish()

    def pause_writing(self) -> None:
        """Keep events; beyond WINDOW they are dropped."""
        self._paused = True

    def resume_writing(self) -> None:
        """Send what was kept."""
        self._paused = False
        if self._queue and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    # -- inside

    def _command(self, data: bytes) -> None:
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.end(UNSUPPORTED_DATA, str(error))
            return
        kind = message.get("type", "") if isinstance(message, dict) else ""
        if kind == "start_streaming":
            try:
                filters = Filters(message.get("filters"))
            except ValueError:
                self.end(INVALID_COMMAND, "expected start streaming as first event")
                return
            if not self._streams.start(self):
                self.end(LIMIT_EXCEEDED, "limit exceeded for streaming sessions")
                return
            self.filters = filters
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            self._streams.log.debug("Streaming logs")
        elif kind == "stop_streaming":
            self._streams.stop(self)
            self._queue.clear()
            self._wait_idle()
        elif not kind:
            self.end(UNSUPPORTED_DATA, "invalid message type was provided")
        else:
            self.end(UNSUPPORTED_DATA, f"invalid client message type was provided: {kind}")

    def _send(self, payload: bytes) -> None:
        self._port.write(encode_frame(TEXT, payload, compressed=self._deflate))

    def _wait_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = self._loop.call_later(IDLE_SECONDS, self.end, IDLE_EXCEEDED, "session was idle for too long")

    def _on_ping(self) -> None:
        self._ping = self._loop.call_later(PING_SECONDS, self._on_ping)
        if not self._paused:
            self._port.write(encode_frame(PING, b""))

    def end(self, code: int, reason: str) -> None:
        """Send what waits, then close with a code and a reason."""
        if self._ended:
            return
        self._flush()
        self._finish()
        self._port.write(encode_close(code, reason))
        self._port.write_eof()
        self._port.stop_reading()

    def _finish(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._queue.clear()
        self._ping.cancel()
        if self._idle is not None:
            self._idle.cancel()
        self._streams.stop(self)
        self._streams.sessions.discard(self)
