"""The edge's side of HTTP/2, as lean as it gets: frames packed by hand, response heads not decoded.

Owns: H2LoadLink (one TLS connection of a connector) and H2LoadStream (one request on it).
In: received bytes; `open`, `send`, `pump`. Out: frames, each a write of its own; calls on a StreamUser.
Never: knows the rows, favours a connector: request blocks use the dynamic table as edges do, with a `cf-ray` of its
own in each, so that no two blocks are the same.
"""

# ruff: noqa: D102  (callbacks of one interface each, described there)
from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import cast

import hpack

from benchmarks.link import BULK, Fields, StreamUser
from connector.wire.h2_frames import (
    DATA,
    FLAG_END_HEADERS,
    FLAG_END_STREAM,
    FRAME_HEADER,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    Setting,
    decode_settings,
    encode_frame,
    encode_settings,
    encode_window_update,
)

STREAM_WINDOW = 1 << 20
LINK_WINDOW = 16 << 20
FRAME_SIZE = 16_384
"""What the connector may send at once; what it gets is as large as it allows, up to the 64 KiB of BULK."""

BULK_FRAMES = 16
"""Frames of uploads that are sent in one go."""

_pack = FRAME_HEADER.pack
_unpack = FRAME_HEADER.unpack_from


class H2LoadStream:
    """One stream."""

    __slots__ = ("link", "owed", "stream_id", "user", "waiting", "window")

    def __init__(self, link: H2LoadLink, stream_id: int, user: StreamUser) -> None:
        self.link = link
        self.stream_id = stream_id
        self.user = user
        self.window = link.initial_window
        self.owed = 0
        self.waiting = 0  # bytes of bulk still to send

    def send(self, data: bytes, *, end: bool = False) -> None:
        """Send one small message; windows are the connector's affair (it must give credit in time)."""
        size = len(data)
        self.window -= size
        link = self.link
        link.window -= size
        link.out.append(_pack(size << 8, end, self.stream_id) + data)
        link.wake()

    def send_bulk(self, size: int) -> None:
        """Send so many bytes and the end, as windows and socket allow."""
        self.waiting = size
        self.link.pump(self)

    def end(self) -> None:
        """Send END_STREAM."""
        self.link.out.append(_pack(DATA, FLAG_END_STREAM, self.stream_id))
        self.link.wake()

    # The RPC server's view of a stream.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.send(bytes(data))

    def write_eof(self, trailers: object = ()) -> None:
        if self.link.transport is not None:
            self.end()

    def consumed(self, size: int) -> None:
        """Given back already."""

    def reset(self) -> None:
        self.link.cancel(self)


class H2LoadLink(asyncio.Protocol):
    """One connection; `on_open` opens the control stream, `on_lost` hears of the end."""

    protocol = "http2"

    def __init__(self, on_open: Callable[[H2LoadLink], None], on_lost: Callable[[H2LoadLink], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.streams: dict[int, H2LoadStream] = {}
        self.out: list[bytes] = []
        self.window = 65_535
        self.initial_window = 65_535
        self.frame_size = FRAME_SIZE
        self.now = 0.0
        self.features: list[str] = []
        self.room = 1 << 30
        self._on_open = on_open
        self._on_lost = on_lost
        self._ids = itertools.count(1, 2)
        self._rays = itertools.count(0x8F3A_0000_0000_0000)
        self._rest = b""
        self._owed = 0
        self._due = False
        self._receiving = False
        self._paused = False
        self._blocked: dict[H2LoadStream, None] = {}
        self._encoder = hpack.Encoder()
        self._fields: Fields = ()
        self._block = b""

    # --- for the rows ----------------------------------------------------------------------------------------------

    def open(self, fields: Fields, user: StreamUser, *, end: bool = False) -> H2LoadStream:
        """Open a stream; `fields` is one object for all requests of a kind, so that it is encoded once."""
        if fields is self._fields:
            payload = self._block
        else:
            # Twice: the first one fills the dynamic table, later ones refer to it. One kind is remembered at a time,
            # so nothing that the table has dropped is ever referred to.
            payload = self._encoder.encode(list(fields))
            self._fields = fields
            self._block = self._encoder.encode(list(fields))
        # Literal without indexing, new name: every request has another value.
        payload += b"\0\x06cf-ray\x14%x-LIS" % next(self._rays)
        stream_id = next(self._ids)
        stream = self.streams[stream_id] = H2LoadStream(self, stream_id, user)
        self.out.append(_pack(len(payload) << 8 | HEADERS, FLAG_END_HEADERS | end, stream_id) + payload)
        self.wake()
        return stream

    def cancel(self, stream: H2LoadStream) -> None:
        """Give a stream up."""
        if self.streams.pop(stream.stream_id, None) is not None:
            self._blocked.pop(stream, None)
            self.out.append(encode_frame(RST_STREAM, 0, stream.stream_id, b"\0\0\0\x08"))
            self.wake()

    def pump(self, stream: H2LoadStream) -> None:
        """Send of a stream's bulk what may be sent now."""
        out = self.out
        while stream.waiting:
            size = min(stream.waiting, self.frame_size, stream.window, self.window)
            if size <= 0 or self._paused or len(out) > BULK_FRAMES:
                self._blocked[stream] = None
                break
            stream.waiting -= size
            stream.window -= size
            self.window -= size
            out.append(_pack(size << 8, not stream.waiting, stream.stream_id) + BULK[:size])
        self.wake()

    def close(self) -> None:
        """End the connection in order."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """End it at once."""
        if self.transport is not None:
            self.transport.abort()

    def wake(self) -> None:
        """Flush in this loop turn, once."""
        if not self._due and not self._receiving:
            self._due = True
            self.loop.call_soon(self._flush)

    # --- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.out += [
            PREFACE,
            encode_settings([(Setting.ENABLE_PUSH, 0), (Setting.INITIAL_WINDOW_SIZE, STREAM_WINDOW)]),
            encode_window_update(0, LINK_WINDOW - 65_535),
        ]
        self._on_open(self)
        self.wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        for stream in list(self.streams.values()):
            stream.user.on_reset()
        self.streams.clear()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump_blocked()

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        self._receiving = True
        if self._rest:
            data = self._rest + data
        streams = self.streams
        end = len(data)
        pos = 0
        while end - pos >= 9:
            word, flags, stream_id = _unpack(data, pos)
            length = word >> 8
            start = pos + 9
            stop = start + length
            if stop > end:
                break
            pos = stop
            kind = word & 0xFF
            stream = streams.get(stream_id)
            if not kind:
                self._owed += length
                if stream is not None:
                    stream.owed += length
                    if stream.owed >= STREAM_WINDOW // 2 and not flags & FLAG_END_STREAM:
                        self.out.append(encode_window_update(stream_id, stream.owed))
                        stream.owed = 0
                    if length:
                        stream.user.on_data(data, start, stop)
            elif kind == HEADERS:
                if stream is not None:
                    while data[start] & 0xE0 == 0x20:
                        start += 1  # a new size of the dynamic table
                    stream.user.on_head(data[start] == 0x88)  # the static table's `:status: 200`
            else:
                self._control(kind, flags, stream_id, data[start:stop])
                continue
            if flags & FLAG_END_STREAM and stream is not None:
                streams.pop(stream_id, None)
                stream.user.on_end()
        self._rest = data[pos:] if pos < end else b""
        if self._owed >= LINK_WINDOW // 4:
            self.out.append(encode_window_update(0, self._owed))
            self._owed = 0
        if self._blocked:
            self._pump_blocked()
        self._receiving = False
        if self.out:
            self._flush()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            size = int.from_bytes(payload)
            stream = self.streams.get(stream_id)
            if not stream_id:
                self.window += size
            elif stream is not None:
                stream.window += size
        elif kind == SETTINGS and not flags:
            for key, value in decode_settings(payload):
                if key == Setting.INITIAL_WINDOW_SIZE:
                    for stream in self.streams.values():
                        stream.window += value - self.initial_window
                    self.initial_window = value
                elif key == Setting.MAX_CONCURRENT_STREAMS:
                    self.room = value - 1  # the control stream is one of them
                elif key == Setting.MAX_FRAME_SIZE:
                    self.frame_size = min(value, len(BULK))
            self.out.append(SETTINGS_ACK)
        elif kind == PING and not flags:
            self.out.append(encode_frame(PING, 1, 0, payload))
        elif kind == RST_STREAM:
            stream = self.streams.pop(stream_id, None)
            if stream is not None:
                self._blocked.pop(stream, None)
                stream.user.on_reset()
        elif kind == GOAWAY and self.transport is not None:
            self.transport.close()

    def _pump_blocked(self) -> None:
        for stream in list(self._blocked):
            del self._blocked[stream]
            self.pump(stream)

    def _flush(self) -> None:
        self._due = False
        out = self.out
        if out and self.transport is not None:
            self.out = []
            write = self.transport.write
            for frame in out:
                write(frame)
            if self._blocked and not self._paused:
                self.loop.call_soon(self._pump_blocked)
