"""Answers that need no origin: fixed statuses, refusals, configuration pushes.

Owns: the sinks that ignore or collect a body. In: a StreamPort. Out: an answered stream.
Never: looks at rules or opens connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from connector.errors import ConnectorError
from connector.protocol.ports import Buffer, ResponseSource, StreamPort
from connector.proxy import limits


class IgnoringSink:
    """The sink of a stream that was answered at once. Stateless: one instance serves all."""

    __slots__ = ()

    def on_data(self, data: Buffer) -> None:
        """Ignore."""

    def on_eof(self) -> None:
        """Ignore."""

    def on_reset(self, error: BaseException | None) -> None:
        """Ignore."""

    def pause_writing(self) -> None:
        """Ignore."""

    def resume_writing(self) -> None:
        """Ignore."""


IGNORE: Final = IgnoringSink()


def answer_status(port: StreamPort, status: int) -> None:
    """Answer a bare status as if an origin had (`http_status:NNN`, and 503 of the default rule)."""
    port.respond(status, (), ResponseSource.ORIGIN)
    port.write_eof()
    port.stop_reading()


class ConfigurationSink(IgnoringSink):
    """One configuration push: collects the body, asks the handler, sends its JSON (now, or when the future has it).

    `done(error)` is called once, after the answer (None) or instead of one (the caller refuses the stream).
    """

    __slots__ = ("_body", "_done", "_handler", "_port")

    def __init__(
        self,
        port: StreamPort,
        handler: Callable[[bytes], bytes | asyncio.Future[bytes]],
        done: Callable[[BaseException | None], None],
    ) -> None:
        self._port = port
        self._handler = handler
        self._done: Callable[[BaseException | None], None] | None = done
        self._body = bytearray()

    def on_data(self, data: Buffer) -> None:
        """Collect."""
        if self._done is None:
            return
        self._body += data
        if len(self._body) > limits.MAX_CONFIGURATION:
            self._end(ConnectorError(f"the configuration is larger than {limits.MAX_CONFIGURATION // 1024} KiB"))
            return
        self._port.consumed(len(data))

    def on_eof(self) -> None:
        """Apply and answer."""
        if self._done is None:
            return
        try:
            reply = self._handler(bytes(self._body))
        except Exception as error:  # a stream must be answered whatever the handler does
            self._end(error)
            return
        if isinstance(reply, bytes):
            self._answer(reply)
        else:
            reply.add_done_callback(self._answer_later)

    def _answer_later(self, reply: asyncio.Future[bytes]) -> None:
        """Answer what took its time; the stream may be gone meanwhile."""
        if reply.cancelled():
            self._end(ConnectorError("the connector is closing"))
        elif (error := reply.exception()) is not None:
            self._end(error)
        elif self._done is not None:
            self._answer(reply.result())

    def _answer(self, reply: bytes) -> None:
        self._port.respond(200, (), ResponseSource.ORIGIN)
        self._port.write(reply)
        self._port.write_eof()
        self._end(None)

    def on_reset(self, error: BaseException | None) -> None:
        """Forget it: the edge will push again."""
        done, self._done = self._done, None
        if done is not None:
            done(None)

    def _end(self, error: BaseException | None) -> None:
        done, self._done = self._done, None
        self._body = bytearray()
        if done is not None:
            done(error)
