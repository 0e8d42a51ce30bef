"""HTTP/1.1 as a client speaks it to an origin: request heads out, responses in.

Owns: the bytes of a request head, chunked framing, and where a response's head, body and trailers begin and end.
In: header fields and origin bytes, cut anywhere. Out: bytes, and calls on a ResponseHandler; OriginProtocolError.
Never: decides which headers a proxy adds, retries, or touches a socket.

*Strategy*: the end of a head is found here, so it is known to the byte what lies behind it (an upgraded stream, a
second answer, garbage). llhttp then parses exactly one head, and goes on only for chunked bodies; bodies with a length
or until close are counted and handed on without a copy. llhttp is strict about what nobody should send; what real
origins send and Go's client accepts (folded lines, bare LF, a repeated Content-Length) is straightened and tried again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import itemgetter
from typing import Final, Protocol

import httptools

from connector.errors import OriginProtocolError
from connector.protocol.ports import Buffer, Headers
from connector.wire.h2_headers import TOKEN_BYTES, canonical_name

MAX_HEAD: Final = 256 * 1024
"""Bytes of one answer's heads, interim ones included. Cloudflare passes 128 KiB of response headers on, curl allows
300 KiB, Node 16 KiB, nginx 4-8 KiB a proxied head; cloudflared's 10 MiB would let one origin cost that much per
request while the edge drops the answer anyway."""

MAX_TRAILERS: Final = 64 * 1024
"""Bytes of chunked framing (extensions, trailers) without a byte of body. Node and hyper allow 16 KiB and 64 KiB."""

NAME_CACHE_LIMIT: Final = 1_024
"""Request header names remembered as checked; eyeballs choose names, so the memory must have an end."""

_SHOWN: Final = 60
_HEAD_END = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"(?<![ \t])[ \t]*\r?\n[ \t]+")  # looked for once per run of spaces, however long
_FOLDED_FIRST = re.compile(rb"[^\n]*\n[ \t]")
_NAME_SPACE = re.compile(rb"(\r\n[^\r\n:]*[^\r\n: \t])[ \t]+:")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_REPEATED_LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]+)[ \t]*(?=\r\n)", re.IGNORECASE)
_CONTROL_BYTES = bytes([*range(9), *range(10, 32), 127])
_UNSAFE_QUERY = re.compile(rb"[^!\"$-~]")
_UNSAFE_PATH = re.compile(rb"[^!$-;=@-Z\[\]_a-z~]")
_UNSAFE_TARGET = re.compile(rb"[^!\"$-~]|^[^?]*?[\"<>\\^`{|}]")
_by_name = itemgetter(0)

# Names that the encoder writes itself, or that mean something to this hop only.
_FRAMING_NAMES = frozenset((b"Host", b"Content-Length", b"Transfer-Encoding", b"Trailer"))
_NOT_IN_TRAILERS = frozenset((b"content-length", b"transfer-encoding", b"trailer", b"host", b"connection"))

_names: dict[bytes, bytes] = {}


def show(data: bytes) -> str:
    """Return the first bytes of `data` for an error text: escaped, shortened, in quotes."""
    text = bytes(data[:_SHOWN]).decode("latin-1").encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{text}"' + ("..." if len(data) > _SHOWN else "")


def _checked_name(name: bytes) -> bytes:
    if not name or name.translate(None, TOKEN_BYTES):
        raise OriginProtocolError(f"the request has an invalid header name {show(name)}")
    spelled = canonical_name(name)
    if len(_names) < NAME_CACHE_LIMIT:
        _names[name] = spelled
    return spelled


def encode_target(target: bytes) -> bytes:
    """Return `target` as it may stand in a request line; bytes that may not are percent-encoded.

    Browsers leave `|` and `^` in paths, and some servers (Tomcat) answer 400 to them; with queries all are less strict.
    Errors: OriginProtocolError for an empty one or one with control characters.
    """
    if not _UNSAFE_TARGET.search(target) and target:
        return target
    if not target or target.translate(None, _CONTROL_BYTES + b"\t") != target:
        raise OriginProtocolError(f"the request has an invalid path {show(target)}")
    path, mark, query = target.partition(b"?")
    return _UNSAFE_PATH.sub(_percent, path) + mark + _UNSAFE_QUERY.sub(_percent, query)


def _percent(found: re.Match[bytes]) -> bytes:
    return b"%%%02X" % found[0][0]


class OwnFields:
    """Header fields that the sender sets itself: they stand for fields of the same name in a request.

    Make one per use and keep it. Names are spelled canonically here.
    """

    __slots__ = ("dropped", "pairs")

    def __init__(self, fields: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.pairs = tuple((_checked_name(name), value) for name, value in fields)
        self.dropped = _FRAMING_NAMES.union(map(_by_name, self.pairs))

    def plus(self, *fields: tuple[bytes, bytes]) -> OwnFields:
        """Return these fields and more."""
        return OwnFields((*self.pairs, *fields))


NO_FIELDS: Final = OwnFields()


def encode_request_head(
    method: bytes, target: bytes, host: bytes, headers: Headers, *, framing: bytes = b"", own: OwnFields = NO_FIELDS
) -> bytes:
    """Return a request head: Host and User-Agent first, `framing`, then the other fields sorted by canonical name.

    `framing` is empty or whole lines with CRLF (`content_length_line`, CHUNKED_LINE). Values of one name keep their
    order. Errors: OriginProtocolError for what would not survive on the wire (names that are no tokens, control
    characters in values).
    """
    agent = b""
    dropped = own.dropped
    pairs = list(own.pairs)
    names = _names
    for name, value in headers:
        spelled = names.get(name) or _checked_name(name)
        if spelled in dropped:
            continue
        if spelled == b"User-Agent":
            agent = agent or value
        else:
            pairs.append((spelled, value))
    values = b"".join([value for _, value in pairs]) + host + agent
    if len(values.translate(None, _CONTROL_BYTES)) != len(values):
        bad = next((n for n, v in [*pairs, (b"User-Agent", agent)] if v.translate(None, _CONTROL_BYTES) != v), b"Host")
        raise OriginProtocolError(f"the request has control characters in its header {show(bad)}")
    if b" " in host or method.translate(None, TOKEN_BYTES) or not method:
        raise OriginProtocolError(f"the request has an invalid host or method ({show(host)}, {show(method)})")
    pairs.sort(key=_by_name)
    lines = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    agent_line = b"User-Agent: %b\r\n" % agent if agent else b""
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\n" % (
        method,
        encode_target(target),
        host,
        agent_line,
        framing,
        lines,
    )


CHUNKED_LINE: Final = b"Transfer-Encoding: chunked\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"


def content_length_line(length: int) -> bytes:
    """Return the framing line of a body of `length` bytes."""
    return b"Content-Length: %d\r\n" % length


CHUNK_END: Final = b"\r\n"


def chunk_head(size: int) -> bytes:
    """Return the line before a chunk of `size` bytes, more than none."""
    return b"%x\r\n" % size


def encode_chunk(data: Buffer) -> bytes:
    """Return `data` (not empty) as one chunk."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


class ResponseHandler(Protocol):
    """Who wants a response: each call happens inside `ResponseParser.receive_*`, in this order."""

    def on_head(self, status: int, headers: Headers) -> None:
        """Take the final response head (never an interim one; 101 only when an upgrade was asked for)."""

    def on_body(self, data: Buffer) -> None:
        """Take body bytes without framing; borrowed."""

    def on_complete(self, trailers: Headers) -> None:
        """Take the end of the response. Not called after a 101: what follows is no longer HTTP."""


_HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE, _DONE, _UPGRADED, _FAILED = range(7)


class ResponseParser:
    """One response of one origin connection. Feed it, then ask what the connection is good for.

    `method` decides about HEAD; `upgrade` says whether a 101 is welcome. After an error the parser is dead.
    """

    __slots__ = ("_buffer", "_found", "_framing", "_handler", "_headers", "_heads", "_left", "_method", "_parser",
                 "_pieces", "_state", "_upgrade", "_used", "keep_alive", "leftover", "started")  # fmt: skip

    def __init__(self, handler: ResponseHandler, method: bytes, *, upgrade: bool = False) -> None:
        self._handler = handler
        self._method = method
        self._upgrade = upgrade
        self._state = _HEAD
        self._buffer = b""
        self._heads = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._parser: httptools.HttpResponseParser | None = None
        self._pieces: list[bytes] = []
        self._found = False
        self._used = False
        self._framing = 0
        self._left = 0
        self.started = False
        """Whether any byte of an answer came: from then on a request is never repeated."""
        self.keep_alive = False
        """Whether the connection may carry another request: a whole response and nothing behind it."""
        self.leftover: bytes = b""
        """Bytes behind a 101 head."""

    @property
    def upgraded(self) -> bool:
        """Whether the origin answered 101."""
        return self._state == _UPGRADED

    @property
    def complete(self) -> bool:
        """Whether the response ended."""
        return self._state == _DONE

    def receive_data(self, data: Buffer) -> None:
        """Take what the origin sent. Errors: OriginProtocolError."""
        state = self._state
        if state == _LENGTH:
            size = len(data)
            if size < self._left:
                self._left -= size
                self._handler.on_body(data)
            else:
                self._end_length(data)
        elif state == _UNTIL_CLOSE:
            self._handler.on_body(data)
        elif state == _CHUNKED:
            self._receive_chunked(data)
        elif state == _HEAD:
            self.started = True
            self._receive_head(data if type(data) is bytes else bytes(data))
        else:
            self.keep_alive = False

    def receive_eof(self) -> None:
        """Take the end of the connection. Errors: OriginProtocolError when a response was due or unfinished."""
        state = self._state
        self.keep_alive = False
        if state == _UNTIL_CLOSE:
            self._complete(())
        elif state == _HEAD:
            self._state = _FAILED
            if not self.started:
                raise OriginProtocolError(
                    "the origin closed the connection without an answer",
                    advice="is this the port of an HTTP server? (an MQTT broker's plain port does this: "
                    "use its websockets listener)",
                )
            raise OriginProtocolError(f"the origin closed in the middle of its response head: {show(self._buffer)}")
        elif state == _LENGTH:
            self._state = _FAILED
            raise OriginProtocolError(f"the origin closed {self._left} bytes before the end of the response body")
        elif state == _CHUNKED:
            self._state = _FAILED
            raise OriginProtocolError("the origin closed before the last chunk of the response body")

    # -- heads

    def _receive_head(self, data: bytes) -> None:
        buffer = self._buffer
        search_from = max(0, len(buffer) - 3)
        buffer = buffer + data if buffer else data
        while True:
            if not buffer.startswith(b"HTTP/1.") and not b"HTTP/1.".startswith(buffer[:7]):
                raise self._not_http(buffer)
            found = _HEAD_END.search(buffer, search_from)
            end = found.end() if found else len(buffer)
            if self._heads + end > MAX_HEAD:
                self._state = _FAILED
                raise OriginProtocolError(f"the origin's response head is larger than {MAX_HEAD // 1024} KiB")
            if not found:
                self._buffer = buffer
                return
            self._heads += end
            head, buffer = buffer[:end], buffer[end:]
            status = self._parse_head(head)
            if status == 101 or status >= 200:
                break
            search_from = 0
            if not buffer:
                self._buffer = b""
                return
        self._buffer = b""
        self._begin(status, buffer, old=head.startswith(b"HTTP/1.0"))

    def _not_http(self, buffer: bytes) -> OriginProtocolError:
        self._state = _FAILED
        if buffer[:2] == b"\x15\x03":
            return OriginProtocolError(
                "the origin answered with a TLS alert instead of HTTP", advice="use https:// (or wss://) in the service"
            )
        return OriginProtocolError(
            f"the origin's answer is not HTTP/1.x: it starts with {show(buffer)}",
            advice="check the port of the service: something else listens there",
        )

    def _parse_head(self, head: bytes) -> int:
        """Parse one whole head into `_headers`; return the status."""
        try:
            parser = self._feed_head(head)
        except httptools.HttpParserError as error:
            straight = _straighten(head)
            try:
                if straight == head:
                    raise
                parser = self._feed_head(straight)
            except httptools.HttpParserError:
                self._state = _FAILED
                raise OriginProtocolError(f"the origin's response head is malformed ({error}): {show(head)}") from None
            if b"\r\n" not in head:
                parser.set_dangerous_leniencies(
                    lenient_optional_cr_before_lf=True, lenient_optional_crlf_after_chunk=False
                )
        status: int = parser.get_status_code()
        if status < 100:
            self._state = _FAILED
            raise OriginProtocolError(f"the origin answered with the impossible status {status:03}")
        self._parser = parser
        return status

    def _feed_head(self, head: bytes) -> httptools.HttpResponseParser:
        self._headers = []
        self._found = False
        parser = httptools.HttpResponseParser(self)
        try:
            parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            # llhttp wants an upgrade at once after any 101; whether this is one is checked in _begin.
            if not self._found or parser.get_status_code() != 101:
                raise
        if not self._found:
            raise httptools.HttpParserError("no end of the header section")
        return parser

    def _begin(self, status: int, rest: bytes, *, old: bool) -> None:
        """Find out how the body is framed, announce the head, and take what came behind it."""
        length = -1
        chunked = close = alive = upgrade = False
        headers = self._headers
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-length":
                length = int(value)
            elif lower == b"transfer-encoding":
                if chunked or value.strip().lower() != b"chunked":
                    self._state = _FAILED
                    raise OriginProtocolError(f"the origin uses an unsupported Transfer-Encoding {show(value)}")
                chunked = True
            elif lower == b"connection":
                tokens = value.lower()
                close = close or b"close" in tokens
                alive = alive or b"keep-alive" in tokens
                upgrade = upgrade or b"upgrade" in tokens
        # HTTP/1.0 keeps a connection only when it says so.
        self.keep_alive = not close and (alive or not old)
        if status == 101:
            self._switch(headers, rest, agreed=upgrade)
            return
        if chunked:
            headers = [pair for pair in headers if pair[0].lower() not in {b"transfer-encoding", b"trailer"}]
        if self._method == b"HEAD" or status in {204, 304}:
            self._state = _DONE
        elif chunked:
            self._state = _CHUNKED
            self._headers = []
        elif length >= 0:
            self._left = length
            self._state = _LENGTH if length else _DONE
        else:
            self._state = _UNTIL_CLOSE
            self.keep_alive = False
        self._handler.on_head(status, headers)
        if self._state == _DONE:
            if rest:
                self.keep_alive = False
            self._complete(())
        elif rest:
            self.receive_data(rest)

    def _switch(self, headers: Headers, rest: bytes, *, agreed: bool) -> None:
        self.keep_alive = False
        if not self._upgrade:
            self._state = _FAILED
            raise OriginProtocolError("the origin switched protocols (101) without being asked to")
        if not agreed:
            self._state = _FAILED
            raise OriginProtocolError("the origin answered 101 without `Connection: Upgrade`")
        self._state = _UPGRADED
        self._parser = None
        self.leftover = rest
        self._handler.on_head(101, headers)

    # -- bodies

    def _end_length(self, data: Buffer) -> None:
        left = self._left
        if len(data) > left:
            self.keep_alive = False
            data = data[:left]
        self._left = 0
        self._state = _DONE
        self._handler.on_body(data)
        self._complete(())

    def _receive_chunked(self, data: Buffer) -> None:
        parser = self._parser
        assert parser is not None
        self._used = False
        self._found = False
        problem: Exception | None = None
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            problem = error
        except httptools.HttpParserUpgrade:
            # `Upgrade` in an ordinary answer: the message is over all the same.
            self.keep_alive = False
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._handler.on_body(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._state == _DONE:
            if problem is not None or self._used:
                self.keep_alive = False
            self._complete([pair for pair in self._headers if pair[0].lower() not in _NOT_IN_TRAILERS])
            return
        if problem is not None:
            self._state = _FAILED
            raise OriginProtocolError(f"the origin's chunked body is malformed: {problem}")
        self._framing = 0 if self._found else self._framing + len(data)
        if self._framing > MAX_TRAILERS:
            self._state = _FAILED
            raise OriginProtocolError(f"the origin's chunk extensions or trailers exceed {MAX_TRAILERS // 1024} KiB")

    def _complete(self, trailers: Headers) -> None:
        self._state = _DONE
        self._parser = None
        self._handler.on_complete(trailers)

    # -- calls from llhttp

    def on_message_begin(self) -> None:
        """Note that bytes follow a complete chunked message."""
        self._used = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header or trailer field."""
        if self._state != _DONE:
            self._headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Note that llhttp saw the end of the head where this module found it."""
        self._found = True

    def on_body(self, data: bytes) -> None:
        """Collect chunked payload: what one read brought is handed on as one piece."""
        if self._state == _CHUNKED:
            self._found = True
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end of a chunked message (the end of a head without a body is not asked here)."""
        if self._state == _CHUNKED:
            self._state = _DONE


def _straighten(head: bytes) -> bytes:
    """Return `head` with CRLF line ends, unfolded, no space before colons, equal Content-Lengths reduced to one.

    A first field line that begins with a space folds nothing (RFC 9112 section 2.2): such a head stays as it is, wrong.
    """
    if _FOLDED_FIRST.match(head):
        return head
    head = _BARE_LF.sub(b"\r\n", head)
    head = _FOLD.sub(b" ", head[:-4]) + head[-4:]
    head = _NAME_SPACE.sub(rb"\1:", head)  # RFC 9112 section 5.1: what a proxy must do
    lengths = _REPEATED_LENGTH.findall(head)
    if len(lengths) > 1 and len(set(lengths)) == 1:
        head = _REPEATED_LENGTH.sub(b"", head, count=len(lengths) - 1)
    return head
