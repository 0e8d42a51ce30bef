"""What a whole header block does: it opens a stream towards the proxy, or it ends one's payload as trailers.

Owns: the order of checks on a new stream, and the answers that the proxy never sees (refusals, 400, 431).
In: the connection and a decoded block. Out: a stream and a call to the acceptor; resets; H2Error.
Never: decodes a block, keeps state; is called by anything but H2Connection, of which it is a part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from connector.protocol.h2_blocks import Block, Fields
from connector.protocol.h2_guard import H2Error
from connector.protocol.h2_request import MalformedRequestError, decode_request
from connector.protocol.h2_stream import H2Stream
from connector.protocol.ports import Request, RequestKind, ResponseSource
from connector.wire.h2_frames import ErrorCode

if TYPE_CHECKING:
    from connector.protocol.h2_connection import H2Connection

_NO_REQUEST = Request(RequestKind.HTTP, b"GET", b"/", b"", ())


def receive_block(connection: H2Connection, block: Block | None) -> None:
    """Open a stream, or end its payload, by a block that is whole; None: it is not yet. Errors: H2Error."""
    if block is None:
        return
    stream_id, fields, ended = block
    stream = connection.streams.get(stream_id)
    if stream is not None:
        _receive_trailers(connection, stream, fields, ended)
    elif stream_id > connection.last_stream_id:
        connection.last_stream_id = stream_id
        _open_stream(connection, stream_id, fields, ended)
    elif stream_id in connection.resets_sent:
        connection.guard.count_ignored()
    else:
        raise H2Error(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id}, which is closed")


def _receive_trailers(connection: H2Connection, stream: H2Stream, fields: Fields, ended: bool) -> None:
    """Take a second header block as trailers: they mean the end, what they say is dropped."""
    if stream.receive_ended:
        connection.peer_fault(stream, ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
    elif not ended or any(name[:1] == b":" for name, _ in fields):
        connection.peer_fault(stream, ErrorCode.PROTOCOL_ERROR, "a second header block that is not trailers")
    else:
        connection.end_payload(stream)


def _open_stream(connection: H2Connection, stream_id: int, fields: Fields, ended: bool) -> None:
    if connection.refusing or len(connection.streams) >= connection.limits.max_concurrent_streams:
        connection.send_reset(stream_id, ErrorCode.REFUSED_STREAM)
        connection.guard.count_reset()
        return
    try:
        if connection.blocks.is_too_large(fields):
            raise MalformedRequestError("the header list is too large", status=431)
        request, expects_continue = decode_request(fields, ended)
    except MalformedRequestError as malformed:
        _refuse(connection, stream_id, malformed, ended)
        return
    stream = H2Stream(connection, stream_id, request, connection.peer_window)
    connection.streams[stream_id] = stream
    try:
        stream.sink = connection.accept(request, stream)
    except Exception as error:
        connection.sink_failed(stream, error)
        return
    if connection.lost:
        stream.abort(None)  # the link was closed meanwhile
    elif ended:
        if not stream.closed:
            stream.end_receiving()
    elif expects_continue:
        stream.send_informational(100)


def _refuse(connection: H2Connection, stream_id: int, error: MalformedRequestError, ended: bool) -> None:
    """Answer a malformed request without the proxy: by RST_STREAM, or by a status without body."""
    if connection.on_malformed is not None:
        connection.on_malformed(str(error))
    if error.status:
        stream = H2Stream(connection, stream_id, _NO_REQUEST, connection.peer_window)
        connection.streams[stream_id] = stream
        stream.receive_ended = ended
        stream.stop_reading()
        stream.respond(error.status, ((b"content-length", b"0"),), ResponseSource.CONNECTOR)
        stream.write_eof()
    else:
        connection.send_reset(stream_id, ErrorCode.PROTOCOL_ERROR)
    connection.guard.count_reset()
