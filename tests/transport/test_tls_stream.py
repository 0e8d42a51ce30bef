"""TlsStream against OpenSSL on a blocking socket in a thread, and against peers that break the rules by hand."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from connector.transport.streams import READ_SIZE
from connector.transport.tls import edge_context
from connector.transport.tls_stream import CLOSE_SECONDS, FLUSH_SECONDS, RECORD, SENT_AT_ONCE, TlsStream
from tests.support.aio import until
from tests.support.certs import Authority
from tests.support.stream_ends import LaterLoop, Loop, User, both_loops, connected, on, over, turns, unregistered

NAME = "h2.cftunnel.com"
Serve = Callable[[ssl.SSLSocket], None]
versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


class Party:
    """One authority, a server's context, a client's context that trusts it."""

    def __init__(self, directory: Path) -> None:
        authority = Authority()
        self.cacert = directory / "ca.pem"
        self.cacert.write_text(authority.pem())
        self.directory = directory
        self.authority = authority
        self.server = authority.server_context(directory, NAME)
        self.client = edge_context(str(self.cacert))


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Party:
    return Party(tmp_path_factory.mktemp("tls"))


@pytest.fixture(autouse=True)
def any_version(party: Party) -> Iterator[None]:
    yield
    party.server.minimum_version = ssl.TLSVersion.TLSv1_2
    party.server.maximum_version = ssl.TLSVersion.TLSv1_3


class Peer:
    """The far end in a thread: `serve` gets the blocking socket. `async with` joins it; what it raised is raised."""

    def __init__(self, sock: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        self._sock = sock
        self._serve = serve
        self._problem: BaseException | None = None
        sock.settimeout(30)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._serve(self._sock)
        except BaseException as problem:
            self._problem = problem
        finally:
            self._sock.close()

    async def __aenter__(self) -> Peer:
        self._thread.start()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await until(lambda: not self._thread.is_alive(), what="the peer's end")
        if self._problem is not None and kind is None:
            raise self._problem


def speaking(party: Party, serve: Serve, *, close: bool = True) -> Callable[[socket.socket], None]:
    """Return what shakes hands, then lets `serve` talk; `close` says goodbye afterwards and waits for the answer."""

    def talk(sock: socket.socket) -> None:
        with party.server.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as secure:
            serve(secure)
            if close:
                secure.unwrap()

    return talk


def talk(
    loop: Loop,
    party: Party,
    serve: Callable[[socket.socket], None],
    body: Callable[[TlsStream, User], Any],
    *,
    buffers: int = 0,
    errors: int = 0,
    limit: float = 30,
) -> None:
    """Connect, shake hands, start, let `body` run; then abort. Everything is closed and unregistered afterwards."""

    async def main() -> None:
        near, far = connected(buffers=buffers)
        descriptor = near.fileno()
        async with Peer(far, serve):
            stream, user = TlsStream(asyncio.get_running_loop(), near, party.client, NAME), User()
            await stream.handshake()
            stream.start(user)
            await body(stream, user)
            stream.abort()
            await over(user)
            assert near.fileno() == -1
            assert unregistered(descriptor)

    on(loop, main, errors=errors, limit=limit)


def read(secure: ssl.SSLSocket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = secure.recv(size - len(data))
        if not part:  # older Pythons take an end without close_notify for one
            raise EOFError("the end came early")
        data += part
    return bytes(data)


def to_the_end(sock: socket.socket) -> bytes:
    data = bytearray()
    try:
        while part := sock.recv(65_536):
            data += part
    except ConnectionError:
        pass
    return bytes(data)


# --- bytes both ways -----------------------------------------------------------------------------------------------


@both_loops
@versions
def test_both_ways(party: Party, loop: Loop, version: ssl.TLSVersion) -> None:
    party.server.minimum_version = party.server.maximum_version = version
    sizes = [1, 2, 3, 4_095, 4_096, RECORD - 1, RECORD, RECORD + 1, SENT_AT_ONCE, SENT_AT_ONCE + 1, 1 << 20]
    data = [random.randbytes(size) for size in sizes]
    whole = b"".join(data)

    def serve(secure: ssl.SSLSocket) -> None:
        assert read(secure, len(whole)) == whole
        for part in data:
            secure.sendall(part)

    async def body(stream: TlsStream, user: User) -> None:
        assert stream.get_extra_info("ssl_object").version() == version.name.replace("_", ".").replace("v1.", "v1.")
        assert stream.get_extra_info("peername")
        assert stream.get_protocol() is user
        assert not stream.can_write_eof()
        with pytest.raises(NotImplementedError):
            stream.write_eof()
        stream.write(b"")
        for part in data:
            lent = bytearray(part)
            stream.write(memoryview(lent))
            lent[:] = bytes(len(lent))
        await until(lambda: len(user.data) == len(whole))
        assert user.data == whole
        assert await over(user) is None
        assert not user.eofs

    talk(loop, party, speaking(party, serve), body)


@both_loops
def test_records_of_every_size(party: Party, loop: Loop) -> None:
    """Ours of 1 to 16,384 bytes (a step, to be cheap), the peer's likewise, in one stream each."""
    sizes = [*range(1, 40), *range(40, RECORD, 331), RECORD - 1, RECORD]
    whole = random.randbytes(sum(sizes))

    def serve(secure: ssl.SSLSocket) -> None:
        at = 0
        for size in sizes:
            secure.sendall(whole[at : at + size])
            at += size
        assert read(secure, len(whole)) == whole

    async def body(stream: TlsStream, user: User) -> None:
        at = 0
        for size in sizes:
            stream.write(whole[at : at + size])
            at += size
        await until(lambda: len(user.data) == len(whole))
        assert user.data == whole
        await over(user)

    talk(loop, party, speaking(party, serve), body)


@both_loops
def test_more_than_one_buffer_at_once(party: Party, loop: Loop) -> None:
    """What waits in the kernel and in a torn record is more plain text than one buffer holds: it comes in pieces."""
    whole = random.randbytes(4 * READ_SIZE)

    def serve(secure: ssl.SSLSocket) -> None:
        secure.sendall(whole)

    async def body(stream: TlsStream, user: User) -> None:
        stream.pause_reading()
        await turns(20)
        stream.resume_reading()
        await until(lambda: len(user.data) == len(whole))
        assert user.data == whole
        assert max(user.sizes) <= READ_SIZE
        await over(user)

    talk(loop, party, speaking(party, serve), body)


class Pipe:
    """A server's TLS without a socket, so that a test decides what travels together."""

    def __init__(self, party: Party) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = party.server.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def shake(self, sock: socket.socket, *, last: Callable[[], None] | None = None) -> None:
        """Shake hands; what `last` writes travels with the last flight."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self.outgoing.read())
                self.incoming.write(sock.recv(65_536))
        if last is not None:
            last()
        sock.sendall(self.outgoing.read())


@both_loops
@versions
@pytest.mark.parametrize("size", [5, 100_000])
def test_data_that_comes_with_the_last_flight(party: Party, loop: Loop, version: ssl.TLSVersion, size: int) -> None:
    party.server.minimum_version = party.server.maximum_version = version
    whole = random.randbytes(size)

    def serve(sock: socket.socket) -> None:
        pipe = Pipe(party)

        def last() -> None:
            for at in range(0, size, RECORD):
                pipe.tls.write(whole[at : at + RECORD])

        pipe.shake(sock, last=last)
        to_the_end(sock)

    async def main() -> None:
        near, far = connected()
        async with Peer(far, serve):
            stream, user = TlsStream(asyncio.get_running_loop(), near, party.client, NAME), User()
            await stream.handshake()
            await turns(20)  # it has come by now, and nobody may lose it
            user.inside = True
            stream.start(user)
            user.inside = False
            await until(lambda: len(user.data) == size)
            assert user.data == whole
            stream.abort()
            await over(user)

    on(loop, main)


@both_loops
def test_many_records_in_one_read_come_as_one(party: Party, loop: Loop) -> None:
    def serve(sock: socket.socket) -> None:
        pipe = Pipe(party)
        pipe.shake(sock)
        for number in range(100):
            pipe.tls.write(b"%02d" % number)
        sock.sendall(pipe.outgoing.read())
        to_the_end(sock)

    async def body(stream: TlsStream, user: User) -> None:
        await until(lambda: len(user.data) == 200)
        assert user.data == b"".join(b"%02d" % number for number in range(100))
        assert len(user.sizes) <= 2

    talk(loop, party, serve, body)


@both_loops
def test_records_torn_at_every_byte(party: Party, loop: Loop) -> None:
    def serve(sock: socket.socket) -> None:
        pipe = Pipe(party)
        pipe.shake(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (b"one", b"two", b"three"):
            pipe.tls.write(part)
        for byte in pipe.outgoing.read():
            sock.sendall(bytes((byte,)))
        to_the_end(sock)

    async def body(stream: TlsStream, user: User) -> None:
        await until(lambda: user.data == b"onetwothree")

    talk(loop, party, serve, body)


@both_loops
def test_water_marks(party: Party, loop: Loop) -> None:
    whole = random.randbytes(600_000)
    go = threading.Event()

    def serve(secure: ssl.SSLSocket) -> None:
        go.wait(30)
        assert read(secure, len(whole)) == whole

    async def body(stream: TlsStream, user: User) -> None:
        stream.set_write_buffer_limits(high=100_000, low=10_000)
        stream.write(whole)
        assert user.marks == ["pause"]
        assert stream.get_write_buffer_size() > 100_000
        go.set()
        await over(user)
        assert user.marks == ["pause", "resume"]

    talk(loop, party, speaking(party, serve), body, buffers=8_192)


@both_loops
def test_another_user_and_pauses(party: Party, loop: Loop) -> None:
    def serve(secure: ssl.SSLSocket) -> None:
        for _ in range(3):
            read(secure, 1)
            secure.sendall(b"pong")

    async def body(stream: TlsStream, user: User) -> None:
        second = User()
        user.on_data = lambda _: stream.set_protocol(second)
        stream.write(b".")
        await until(lambda: user.data == b"pong")
        second.on_data = lambda _: stream.pause_reading()
        stream.write(b".")
        await until(lambda: second.data == b"pong")
        stream.write(b".")
        await turns(20)
        assert second.data == b"pong"
        stream.resume_reading()
        await until(lambda: second.data == b"pongpong")
        stream.abort()
        await over(second)
        user.lost.append(None)

    talk(loop, party, speaking(party, serve, close=False), body)


@both_loops
def test_a_key_update_of_the_peer(party: Party, loop: Loop) -> None:
    """OpenSSL's own server asks for new keys both ways (`K`), then both sides still understand each other."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program")
    certificate = next(iter(party.directory.glob("server-*.pem")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = subprocess.Popen(
        [openssl, "s_server", "-accept", f"127.0.0.1:{port}", "-cert", certificate, "-key", certificate, "-naccept",
         "1", "-tls1_3"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    feed, lines = child.stdin, child.stdout

    async def said(text: bytes) -> None:
        while line := await asyncio.get_running_loop().run_in_executor(None, lines.readline):
            if line.strip() == text:
                return
        raise AssertionError(f"s_server ended before it said {text!r}")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        near = socket.socket()
        near.setblocking(False)
        while True:
            try:
                await loop.sock_connect(near, ("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                near.close()
                near = socket.socket()
                near.setblocking(False)
                await asyncio.sleep(0.02)
        stream, user = TlsStream(loop, near, party.client, NAME), User()
        await stream.handshake()
        stream.start(user)
        feed.write(b"first\n")
        await until(lambda: user.data == b"first\n")
        feed.write(b"K\n")  # what one read of it brings behind a command is dropped
        while user.data == b"first\n":
            feed.write(b"second\n")
            await asyncio.sleep(0.02)
        assert user.data.startswith(b"first\nsecond\n")  # `K` was a command
        stream.write(b"answer\n")
        await said(b"answer")
        stream.abort()
        await over(user)

    try:
        on(loop, main)
    finally:
        child.kill()
        child.communicate()


# --- handshakes that fail ------------------------------------------------------------------------------------------


def failing(
    loop: Loop,
    context: ssl.SSLContext,
    serve: Callable[[socket.socket], None],
    error: type[BaseException],
    *,
    name: str = NAME,
    seconds: float = 30,
) -> BaseException:
    """Shake hands in vain: the socket is closed and nothing is left. Return the error."""
    caught: list[BaseException] = []

    async def main() -> None:
        near, far = connected()
        descriptor = near.fileno()
        async with Peer(far, serve):
            stream = TlsStream(asyncio.get_running_loop(), near, context, name)
            with pytest.raises(error) as info:
                async with asyncio.timeout(seconds):
                    await stream.handshake()
            caught.append(info.value)
            await until(lambda: near.fileno() == -1)
            assert unregistered(descriptor)
            assert stream.is_closing()
            stream.write(b"stray")
            stream.close()
            stream.abort()

    on(loop, main)
    return caught[0]


def refused(party: Party) -> Callable[[socket.socket], None]:
    def serve(sock: socket.socket) -> None:
        try:
            with party.server.wrap_socket(sock, server_side=True) as secure:
                secure.recv(1)
        except (ssl.SSLError, ConnectionError):
            return
        pytest.fail("the client took this peer")

    return serve


@both_loops
def test_an_untrusted_peer(party: Party, loop: Loop, tmp_path: Path) -> None:
    stranger = Party(tmp_path)
    failing(loop, stranger.client, refused(party), ssl.SSLCertVerificationError)


@both_loops
def test_a_peer_of_another_name(party: Party, loop: Loop) -> None:
    failing(loop, party.client, refused(party), ssl.SSLCertVerificationError, name="other.example.com")


@both_loops
def test_a_name_that_cannot_be_one(party: Party, loop: Loop) -> None:
    async def main() -> None:
        near, far = connected()
        with pytest.raises(ValueError, match="server_hostname"):
            TlsStream(asyncio.get_running_loop(), near, party.client, "")
        assert near.fileno() == -1
        far.close()

    on(loop, main)


@both_loops
def test_a_peer_that_does_not_speak_tls(party: Party, loop: Loop) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert to_the_end(sock).startswith(b"\x16\x03")

    error = failing(loop, party.client, serve, ssl.SSLError)
    assert isinstance(error, ssl.SSLError)
    assert error.reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}


@both_loops
def test_no_version_in_common(party: Party, loop: Loop) -> None:
    """The peer's alert arrives as the reason."""
    client = edge_context(str(party.cacert))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    party.server.minimum_version = ssl.TLSVersion.TLSv1_3
    error = failing(loop, client, refused(party), ssl.SSLError)
    assert isinstance(error, ssl.SSLError)
    assert error.reason == "TLSV1_ALERT_PROTOCOL_VERSION"


@both_loops
@pytest.mark.parametrize("flight", [0, 1])
def test_the_end_in_the_middle_of_a_handshake(party: Party, loop: Loop, flight: int) -> None:
    def serve(sock: socket.socket) -> None:
        if flight:
            pipe = Pipe(party)
            pipe.incoming.write(sock.recv(65_536))
            with pytest.raises(ssl.SSLWantReadError):
                pipe.tls.do_handshake()
            sock.sendall(pipe.outgoing.read()[:100])
        else:
            sock.recv(65_536)

    failing(loop, party.client, serve, ConnectionResetError)


@both_loops
def test_a_reset_in_the_middle_of_a_handshake(party: Party, loop: Loop) -> None:
    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    failing(loop, party.client, serve, ConnectionError)


@both_loops
def test_a_peer_that_is_silent(party: Party, loop: Loop) -> None:
    """A time limit is a cancellation: the socket is closed, which the peer sees."""
    seen: list[bytes] = []
    failing(loop, party.client, lambda sock: seen.append(to_the_end(sock)), TimeoutError, seconds=0.02)
    assert seen[0].startswith(b"\x16\x03")


# --- ends ----------------------------------------------------------------------------------------------------------


@both_loops
@versions
def test_the_peer_says_goodbye(party: Party, loop: Loop, version: ssl.TLSVersion) -> None:
    """close_notify behind the last words, in one read; ours answers it, and the user hears one thing."""
    party.server.minimum_version = party.server.maximum_version = version

    def serve(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"last words")

    async def body(stream: TlsStream, user: User) -> None:
        assert await over(user) is None
        assert user.data == b"last words"
        assert not user.eofs
        assert stream.is_closing()
        stream.write(b"stray")
        stream.close()
        stream.pause_reading()
        stream.resume_reading()
        assert stream.get_write_buffer_size() == 0

    talk(loop, party, speaking(party, serve), body)


@both_loops
@versions
def test_goodbye_from_here(party: Party, loop: Loop, version: ssl.TLSVersion) -> None:
    """Everything written before arrives, then close_notify; what still comes is dropped."""
    party.server.minimum_version = party.server.maximum_version = version
    whole = random.randbytes(300_000)

    def serve(secure: ssl.SSLSocket) -> None:
        secure.sendall(b"unheard")
        assert read(secure, len(whole)) == whole
        assert secure.recv(1) == b""  # close_notify, not the bare end

    async def body(stream: TlsStream, user: User) -> None:
        stream.pause_reading()
        stream.write(whole)
        stream.close()
        stream.write(b"no more")
        stream.close()
        assert stream.is_closing()
        assert await over(user) is None
        assert not user.data

    talk(loop, party, speaking(party, serve), body, buffers=8_192)


@both_loops
@pytest.mark.parametrize("how", ["close", "abort"])
def test_ends_inside_data_received(party: Party, loop: Loop, how: str) -> None:
    def serve(secure: ssl.SSLSocket) -> None:
        secure.sendall(random.randbytes(3 * READ_SIZE))

    def served(sock: socket.socket) -> None:
        try:
            speaking(party, serve)(sock)
        except (ConnectionError, ssl.SSLError):
            pass  # it may be cut off in the middle

    async def body(stream: TlsStream, user: User) -> None:
        user.on_data = lambda _: getattr(stream, how)()
        assert await over(user) is None
        assert len(user.sizes) == 1

    talk(loop, party, served, body)


@both_loops
def test_the_end_without_goodbye(party: Party, loop: Loop) -> None:
    """A bare FIN behind data: the data is handed on, the end is an end."""

    def bare(sock: socket.socket) -> None:
        pipe = Pipe(party)
        pipe.shake(sock)
        pipe.tls.write(b"cut o")
        pipe.tls.write(b"ff")
        sock.sendall(pipe.outgoing.read()[:-3])  # in the middle of a record

    async def body(stream: TlsStream, user: User) -> None:
        assert await over(user) is None
        assert user.data == b"cut o"

    talk(loop, party, bare, body)


@both_loops
def test_a_reset(party: Party, loop: Loop) -> None:
    def serve(sock: socket.socket) -> None:
        Pipe(party).shake(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    async def body(stream: TlsStream, user: User) -> None:
        assert isinstance(await over(user), ConnectionError)

    talk(loop, party, serve, body)


@both_loops
@pytest.mark.parametrize("how", ["garbage", "alert"])
def test_the_peer_breaks_tls(party: Party, loop: Loop, how: str) -> None:
    """It is the connection that ends, with the reason; nobody's bug is reported. What came before is handed on."""
    seen: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        pipe = Pipe(party)
        pipe.shake(sock)
        pipe.tls.write(b"before")
        if how == "garbage":
            pipe.tls.write(b"after")
            data = bytearray(pipe.outgoing.read())
            data[-1] ^= 1
        else:
            data = bytearray(pipe.outgoing.read())
            data += b"\x15\x03\x03\0\x02\x02\x28"  # not encrypted: no alert at all in TLS 1.3
        sock.sendall(data)
        seen.append(to_the_end(sock))

    async def body(stream: TlsStream, user: User) -> None:
        error = await over(user)
        assert isinstance(error, ssl.SSLError)
        assert user.data == b"before"
        stream.write(b"stray")
        stream.close()

    talk(loop, party, serve, body)
    assert seen[0][-19:] != b""  # the client's last flight, and our alert


@both_loops
def test_a_peer_that_breaks_tls_with_the_last_flight(party: Party, loop: Loop) -> None:
    def serve(sock: socket.socket) -> None:
        pipe = Pipe(party)

        def last() -> None:
            pipe.tls.write(b"before")
            pipe.outgoing.write(b"\x17\x03\x03\0\x20" + b"?" * 32)

        pipe.shake(sock, last=last)
        to_the_end(sock)

    async def body(stream: TlsStream, user: User) -> None:
        assert isinstance(await over(user), ssl.SSLError)
        assert user.data == b"before"

    party.server.maximum_version = ssl.TLSVersion.TLSv1_2
    talk(loop, party, serve, body)


@both_loops
@pytest.mark.parametrize("early", [True, False])
def test_a_user_that_raises(party: Party, loop: Loop, early: bool) -> None:
    def serve(sock: socket.socket) -> None:
        pipe = Pipe(party)
        if early:
            pipe.shake(sock, last=lambda: pipe.tls.write(b"x") and None)
        else:
            pipe.shake(sock)
            pipe.tls.write(b"x")
            sock.sendall(pipe.outgoing.read())
        to_the_end(sock)

    async def main() -> None:
        near, far = connected()

        def fail(_: object) -> None:
            raise ValueError("a bug")

        async with Peer(far, serve):
            stream, user = TlsStream(asyncio.get_running_loop(), near, party.client, NAME), User()
            user.on_data = fail
            await stream.handshake()
            await turns(20)
            stream.start(user)
            assert isinstance(await over(user), ValueError)

    on(loop, main, errors=1)


@both_loops
def test_lost_between_handshake_and_start(party: Party, loop: Loop) -> None:
    """The user hears of it all the same, once it is there."""

    async def main() -> None:
        near, far = connected()
        async with Peer(far, lambda sock: Pipe(party).shake(sock)):
            stream, user = TlsStream(asyncio.get_running_loop(), near, party.client, NAME), User()
            await stream.handshake()
            stream.abort()
            await until(lambda: near.fileno() == -1)
            user.inside = True
            stream.start(user)
            user.inside = False
            assert await over(user) is None

    on(loop, main)


def silent(party: Party, until_told: threading.Event) -> Callable[[socket.socket], None]:
    """Return a peer that shakes hands, and then neither reads nor writes."""

    def serve(sock: socket.socket) -> None:
        Pipe(party).shake(sock)
        until_told.wait(30)

    return serve


def later(seconds: float) -> None:
    """Put the clock of the running loop forward."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, LaterLoop)
    loop.ahead += seconds


@pytest.mark.parametrize("size", [0, 2_000_000])
def test_a_peer_that_never_answers_a_close(party: Party, size: int) -> None:
    """Neither close_notify nor FIN comes back, and what waits is not taken: CLOSE_SECONDS, and it is over."""
    told = threading.Event()

    async def body(stream: TlsStream, user: User) -> None:
        stream.write(b"x" * size)
        stream.close()
        await turns(20)
        assert not user.lost
        later(CLOSE_SECONDS)
        assert await over(user) is None
        told.set()

    talk(LaterLoop, party, silent(party, told), body, buffers=8_192)


def test_the_peer_ends_and_takes_nothing_more(party: Party) -> None:
    """FIN, while much waits that nobody reads: that must not last for ever."""
    told = threading.Event()

    def serve(sock: socket.socket) -> None:
        Pipe(party).shake(sock)
        sock.shutdown(socket.SHUT_WR)
        told.wait(30)

    async def body(stream: TlsStream, user: User) -> None:
        stream.write(b"x" * 2_000_000)
        await until(stream.is_closing)
        await turns(20)
        assert not user.lost
        later(CLOSE_SECONDS)
        assert await over(user) is None
        told.set()

    talk(LaterLoop, party, serve, body, buffers=8_192)


@pytest.mark.parametrize("patient", [True, False])
def test_a_slow_peer(party: Party, patient: bool) -> None:
    """It takes what waits bit by bit: the close goes on for as long as that moves, but not beyond FLUSH_SECONDS."""
    whole = random.randbytes(400_000 if patient else 3_000_000)
    go = threading.Semaphore(0)

    def serve(sock: socket.socket) -> None:
        with party.server.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as secure:
            data = bytearray()
            try:
                while len(data) < len(whole):
                    assert go.acquire(timeout=30)
                    data += read(secure, min(40_000, len(whole) - len(data)))
            except (OSError, EOFError):
                assert not patient
            if patient:
                assert data == whole
                assert secure.recv(1) == b""
            else:
                assert len(data) < len(whole)

    async def body(stream: TlsStream, user: User) -> None:
        stream.write(whole)
        stream.close()
        began = asyncio.get_running_loop().time()
        while (left := stream.get_write_buffer_size()) and not user.lost:
            go.release()
            await until(lambda left=left: stream.get_write_buffer_size() < left)  # type: ignore[misc]
            later(CLOSE_SECONDS)
            await turns()
        for _ in range(100):
            go.release()
        assert await over(user) is None
        took = asyncio.get_running_loop().time() - began
        assert took > FLUSH_SECONDS if not patient else took > 2 * CLOSE_SECONDS

    talk(LaterLoop, party, serve, body, buffers=8_192, limit=300)
