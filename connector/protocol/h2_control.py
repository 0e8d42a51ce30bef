"""The HTTP/2 frames that carry neither payload nor headers, and what every frame's header must satisfy.

Owns: RFC 9113 section 6 for PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, unknown types.
In: the connection, flags, stream id and payload of one whole frame. Out: changes to the connection; H2Error.
Never: keeps state of its own; is called by anything but H2Connection, of which it is a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from connector.errors import ProtocolError
from connector.protocol.h2_guard import H2Error
from connector.wire.h2_frames import (
    CONTINUATION,
    DATA,
    DEFAULT_MAX_FRAME_SIZE,
    FLAG_ACK,
    GOAWAY,
    HEADERS,
    LARGEST_MAX_FRAME_SIZE,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    STREAM_ID_MASK,
    WINDOW_LIMIT,
    WINDOW_UPDATE,
    ErrorCode,
    Setting,
    decode_goaway,
    decode_settings,
    decode_word,
    encode_ping_ack,
    error_name,
)

if TYPE_CHECKING:
    from connector.protocol.h2_connection import H2Connection

_NAMES = {
    DATA: "DATA",
    HEADERS: "HEADERS",
    PRIORITY: "PRIORITY",
    RST_STREAM: "RST_STREAM",
    SETTINGS: "SETTINGS",
    PUSH_PROMISE: "PUSH_PROMISE",
    PING: "PING",
    GOAWAY: "GOAWAY",
    WINDOW_UPDATE: "WINDOW_UPDATE",
    CONTINUATION: "CONTINUATION",
}
_FIXED_LENGTHS = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_LARGEST_CONTROL_FRAME = 16_384  # SETTINGS and GOAWAY: 2,730 settings, or as much debug text


def check_header(connection: H2Connection, kind: int, length: int, stream_id: int) -> None:
    """Refuse by its header a frame that must not come, before its payload is waited for. Errors: H2Error."""
    if length > connection.limits.max_frame_size:
        raise H2Error(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
    if not connection.settings_seen and kind != SETTINGS:
        raise H2Error(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
    if connection.blocks.stream_id:
        if kind != CONTINUATION or stream_id != connection.blocks.stream_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted by another frame")
    elif kind == CONTINUATION:
        raise H2Error(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
    if kind > CONTINUATION:
        return
    if kind in (SETTINGS, PING, GOAWAY):
        if stream_id:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, f"{_NAMES[kind]} on stream {stream_id}")
        if length > _LARGEST_CONTROL_FRAME:
            raise H2Error(ErrorCode.ENHANCE_YOUR_CALM, f"{_NAMES[kind]} of {length} bytes")
        if (kind == SETTINGS and length % 6) or (kind == GOAWAY and length < 8):
            raise H2Error(ErrorCode.FRAME_SIZE_ERROR, f"{_NAMES[kind]} of {length} bytes")
    elif not stream_id and kind != WINDOW_UPDATE:
        raise H2Error(ErrorCode.PROTOCOL_ERROR, f"{_NAMES[kind]} on stream 0")
    expected = _FIXED_LENGTHS.get(kind, length)
    if length != expected:
        raise H2Error(ErrorCode.FRAME_SIZE_ERROR, f"{_NAMES[kind]} of {length} bytes where {expected} are due")


def receive_control_frame(connection: H2Connection, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
    """Handle one whole frame whose header passed `check_header`. Errors: H2Error, WireError."""
    receive = _RECEIVERS.get(kind)
    if receive is None:
        connection.guard.count_ignored()
    else:
        receive(connection, flags, stream_id, payload)


def check_not_idle(connection: H2Connection, stream_id: int, kind: int) -> None:
    """Refuse a frame for a stream that was never opened (RFC 9113 section 5.1). Errors: H2Error."""
    if stream_id > connection.last_stream_id or not stream_id & 1:
        raise H2Error(ErrorCode.PROTOCOL_ERROR, f"{_NAMES[kind]} on idle stream {stream_id}")


def _receive_priority(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    """Ignore priorities (we sent NO_RFC7540_PRIORITIES), but for a dependency on itself."""
    connection.guard.count_ignored()
    stream = connection.streams.get(stream_id)
    if stream is not None and decode_word(payload[:4]) & STREAM_ID_MASK == stream_id:
        connection.peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")


def _receive_rst_stream(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    code = decode_word(payload)
    stream = connection.streams.get(stream_id)
    if stream is None:
        check_not_idle(connection, stream_id, RST_STREAM)
        connection.guard.count_ignored()
        return
    unanswered = not stream.send_ended
    connection.forget(stream)
    stream.abort(ProtocolError(f"the edge reset the stream: {error_name(code)}"))
    if unanswered:
        connection.guard.count_reset()


def _receive_settings(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    if flags & FLAG_ACK:
        if payload:
            raise H2Error(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS ACK with a payload")
        if not connection.settings_seen:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        return
    connection.settings_seen = True
    connection.guard.count("SETTINGS", connection.limits.max_settings)
    for key, value in decode_settings(payload):
        if key == Setting.INITIAL_WINDOW_SIZE:
            _change_peer_window(connection, value)
        elif key == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_MAX_FRAME_SIZE <= value <= LARGEST_MAX_FRAME_SIZE:
                raise H2Error(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
            connection.peer_frame_size = value
            connection.send_frame_size = min(value, connection.limits.send_frame_size)
        elif key == Setting.ENABLE_PUSH and value > 1:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        # HEADER_TABLE_SIZE bounds our encoder, which uses no table; MAX_HEADER_LIST_SIZE is advice (section 6.5.2),
        # and a response that exceeds it is better sent than lost; MAX_CONCURRENT_STREAMS is about push.
    connection.append(SETTINGS_ACK)


def _change_peer_window(connection: H2Connection, value: int) -> None:
    """Apply INITIAL_WINDOW_SIZE, and its difference to every open stream: their windows may become negative by it."""
    if value > WINDOW_LIMIT:
        raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {value}")
    change = value - connection.peer_window
    connection.peer_window = value
    for stream in connection.streams.values():
        if stream.send_window + change > WINDOW_LIMIT:
            raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE past the largest window")
        stream.send_window += change
        stream.granted += change
        if stream.pending is not None and stream.send_window > 0:
            connection.wait_turn(stream)


def _receive_push_promise(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    raise H2Error(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")


def _receive_ping(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    connection.guard.count("PING", connection.limits.max_pings)
    if not flags & FLAG_ACK:
        connection.append(encode_ping_ack(payload))


def _receive_goaway(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    """Note that no new streams will come; the open ones finish."""
    decode_goaway(payload)
    connection.guard.count_ignored()
    connection.goaway_received = True


def _receive_window_update(connection: H2Connection, flags: int, stream_id: int, payload: bytes) -> None:
    increment = decode_word(payload) & WINDOW_LIMIT
    if not stream_id:
        if not increment:
            raise H2Error(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0 on the connection")
        if connection.send_window + increment > WINDOW_LIMIT:
            raise H2Error(ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE past the largest connection window")
        connection.send_window += increment
        connection.wake_waiting()
        return
    stream = connection.streams.get(stream_id)
    if stream is None:
        check_not_idle(connection, stream_id, WINDOW_UPDATE)
    elif not increment:
        connection.peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
    elif stream.send_window + increment > WINDOW_LIMIT:
        connection.peer_fault(stream, ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE past the largest window")
    else:
        stream.send_window += increment
        stream.granted += increment
        if stream.pending is not None and stream.send_window > 0:
            connection.wait_turn(stream)


_RECEIVERS: dict[int, Callable[[H2Connection, int, int, bytes], None]] = {
    PRIORITY: _receive_priority,
    RST_STREAM: _receive_rst_stream,
    SETTINGS: _receive_settings,
    PUSH_PROMISE: _receive_push_promise,
    PING: _receive_ping,
    GOAWAY: _receive_goaway,
    WINDOW_UPDATE: _receive_window_update,
}
