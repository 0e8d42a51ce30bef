"""SocketStream over real sockets: reading, writing, both ends of a connection, every way to end."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from connector.transport.streams import GATHERED, JOINED, READ_SIZE, RESTS, SMALL, SocketStream
from tests.support.aio import until
from tests.support.stream_ends import (
    FarEnd,
    Loop,
    User,
    both_kinds,
    both_loops,
    connected,
    on,
    over,
    turns,
    unregistered,
)

TINY = 4_608  # the kernel's least for SO_SNDBUF


class Ends:
    """A stream, its user and the other end; `async with` leaves nothing behind."""

    def __init__(self, kind: str = "tcp", *, buffers: int = 0) -> None:
        near, far = connected(kind, buffers=buffers)
        self.user = User()
        self.stream = SocketStream(asyncio.get_running_loop(), near, self.user)
        self.far = FarEnd(far)
        self.descriptor = near.fileno()

    async def __aenter__(self) -> Ends:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.abort()
        await over(self.user)
        assert self.stream.get_extra_info("socket").fileno() == -1
        self.far.close()
        assert unregistered(self.descriptor)

    async def backlog(self, size: int) -> bytes:
        """Write so much that `size` bytes and more wait; return all that was written."""
        written = bytearray()
        while self.stream.get_write_buffer_size() < size:
            piece = random.randbytes(size)
            written += piece
            self.stream.write(piece)
        return bytes(written)


# --- reading -------------------------------------------------------------------------------------------------------


@both_loops
@both_kinds
def test_reads_of_every_size(loop: Loop, kind: str) -> None:
    async def main() -> None:
        for size in (1, SMALL - 1, SMALL, READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 3 * READ_SIZE):
            async with Ends(kind) as it:
                it.stream.pause_reading()
                data = random.randbytes(size)
                sending = asyncio.create_task(it.far.send(data))
                await turns()
                it.stream.resume_reading()
                await until(lambda it=it, size=size: len(it.user.data) == size)  # type: ignore[misc]
                await sending
                assert it.user.data == data
                assert max(it.user.sizes) <= READ_SIZE
                if size < SMALL:
                    assert it.user.kinds == {bytes}

    on(loop, main)


@both_loops
def test_a_large_read_is_borrowed(loop: Loop) -> None:
    """Whoever keeps the view sees it change with the next read, of any stream of the thread."""

    async def main() -> None:
        kept: list[memoryview] = []
        async with Ends() as it, Ends("unix") as other:
            it.user.on_data = kept.append
            await it.far.send(b"a" * SMALL)
            await until(lambda: len(it.user.data) == SMALL)
            assert kept[0] == b"a" * SMALL
            await other.far.send(b"b" * 64)
            await until(lambda: other.user.data)
            assert kept[0][:65] == b"b" * 64 + b"a"

    on(loop, main)


@both_loops
def test_pause_inside_data_received(loop: Loop) -> None:
    async def main() -> None:
        async with Ends() as it:
            it.user.on_data = lambda _: it.stream.pause_reading()
            await it.far.send(b"1")
            await until(lambda: it.user.data == b"1")
            await it.far.send(b"2")
            await turns(10)
            assert it.user.data == b"1"
            it.stream.pause_reading()
            it.stream.resume_reading()
            it.stream.resume_reading()
            await until(lambda: it.user.data == b"12")

    on(loop, main)


@both_loops
@pytest.mark.parametrize("how", ["pause_reading", "close", "abort"])
def test_another_callback_of_the_same_tick_pauses_or_ends(loop: Loop, how: str) -> None:
    """Two streams are readable at once: the first one's user stops the second, which must not be read any more."""

    async def main() -> None:
        async with Ends() as one, Ends() as two:
            heard: list[Ends] = []

            def stop(which: Ends, other: Ends) -> None:
                heard.append(which)
                if len(heard) == 1:
                    getattr(other.stream, how)()

            one.user.on_data = lambda _: stop(one, two)
            two.user.on_data = lambda _: stop(two, one)
            one.far.sock.send(b"1")
            two.far.sock.send(b"2")
            await until(lambda: heard)
            await turns(10)
            assert len(heard) == 1
            if how == "pause_reading":
                other = two if heard[0] is one else one
                other.stream.resume_reading()
                await until(lambda: len(heard) == 2)

    on(loop, main)


@both_loops
def test_pause_and_resume_in_the_same_tick(loop: Loop) -> None:
    async def main() -> None:
        async with Ends() as it:
            it.far.sock.send(b"1")
            it.stream.pause_reading()
            it.stream.resume_reading()
            it.stream.pause_reading()
            await turns(10)
            assert not it.user.data
            it.stream.resume_reading()
            await until(lambda: it.user.data == b"1")

    on(loop, main)


@both_loops
def test_the_user_changes_inside_data_received(loop: Loop) -> None:
    async def main() -> None:
        async with Ends() as it:
            second = User()
            it.user.on_data = lambda _: it.stream.set_protocol(second)
            await it.far.send(b"1")
            await until(lambda: it.user.data == b"1")
            assert it.stream.get_protocol() is second
            await it.far.send(b"2")
            it.far.eof()
            assert await over(second) is None
            assert (it.user.data, second.data, it.user.eofs, second.eofs) == (b"1", b"2", 0, 1)
            assert it.user.lost == []
            it.user.lost.append(None)  # for __aexit__: the second one heard it

    on(loop, main)


# --- writing -------------------------------------------------------------------------------------------------------


@both_loops
@both_kinds
def test_writes_that_the_kernel_takes_partly(loop: Loop, kind: str) -> None:
    async def main() -> None:
        async with Ends(kind, buffers=TINY) as it:
            lent = bytearray(random.randbytes(200_000))
            sent = bytes(lent)
            it.stream.write(memoryview(lent))
            lent[:] = bytes(len(lent))  # borrowed: it was taken before the call returned
            assert 0 < it.stream.get_write_buffer_size() < len(sent)
            it.stream.write(b"")
            it.stream.write(bytearray(b"behind"))
            it.stream.write_all([b"and ", memoryview(b"more")])
            assert await it.far.read(len(sent) + 14) == sent + b"behindand more"
            await until(lambda: it.stream.get_write_buffer_size() == 0)
            it.stream.write(b"again")
            assert it.stream.get_write_buffer_size() == 0
            assert await it.far.read(5) == b"again"
            assert it.user.marks == ["pause", "resume"]

    on(loop, main)


@both_loops
def test_write_all(loop: Loop) -> None:
    async def main() -> None:
        for sizes in (
            [],
            [0],
            [JOINED],
            [1, JOINED],  # gathered
            [JOINED, 0, 3, JOINED],
            [64] * GATHERED,
            [64] * (GATHERED + 1),
            [100] * 1_100,  # more than a call may gather
        ):
            async with Ends() as it:
                chunks = [random.randbytes(size) for size in sizes]
                whole = b"".join(chunks)
                it.stream.write_all([memoryview(chunk) for chunk in chunks])
                assert await it.far.read(len(whole)) == whole

    on(loop, main)


@both_loops
@both_kinds
def test_write_all_taken_partly(loop: Loop, kind: str) -> None:
    async def main() -> None:
        async with Ends(kind, buffers=TINY) as it:
            lent = [bytearray(random.randbytes(30_000)) for _ in range(8)]
            whole = b"".join(lent)
            it.stream.write_all(lent)
            for chunk in lent:
                chunk[:] = bytes(len(chunk))
            assert 0 < it.stream.get_write_buffer_size() < len(whole)
            assert await it.far.read(len(whole)) == whole

    on(loop, main)


@both_loops
def test_nothing_taken_at_all(loop: Loop) -> None:
    """A kernel whose buffer is full already, by what somebody else wrote: both ways of writing wait."""

    async def main() -> None:
        async with Ends("unix", buffers=TINY) as it:
            sock: socket.socket = it.stream.get_extra_info("socket")
            filled = 0
            try:
                while True:
                    filled += sock.send(b"." * 1_000)
            except BlockingIOError:
                pass
            it.stream.write_all([b"a" * JOINED, b"b"])
            assert it.stream.get_write_buffer_size() == JOINED + 1
            assert await it.far.read(filled + JOINED + 1) == b"." * filled + b"a" * JOINED + b"b"

    on(loop, main)


@both_loops
def test_water_marks_alternate(loop: Loop) -> None:
    async def main() -> None:
        async with Ends("unix", buffers=TINY) as it:
            it.stream.set_write_buffer_limits(high=20_000)
            left: list[int] = []
            it.user.on_mark = lambda _: left.append(it.stream.get_write_buffer_size())
            total = 0
            for _ in range(3):
                total += len(await it.backlog(20_001))
                assert it.user.marks[-1] == "pause"
                it.stream.write(b"more")
                total += 4
                while it.user.marks[-1] == "pause":
                    total -= len(await it.far.read(1))
                    total -= len(it.far.sock.recv(4_000))
                    await turns(1)
            assert it.user.marks == ["pause", "resume"] * 3
            assert all(size > 20_000 for size in left[::2])
            assert all(size <= 5_000 for size in left[1::2])
            it.stream.set_write_buffer_limits(high=0)
            assert len(await it.far.read(total)) == total

    on(loop, main)


@both_loops
def test_resume_writing_writes_again(loop: Loop) -> None:
    """The user fills the buffer anew from inside `resume_writing`, again and again."""

    async def main() -> None:
        async with Ends(buffers=TINY) as it:
            blocks = [random.randbytes(150_000) for _ in range(5)]
            due = list(blocks)

            def more(name: str) -> None:
                if name == "resume" and due:
                    it.stream.write(due.pop(0))

            it.user.on_mark = more
            it.stream.write(due.pop(0))
            whole = b"".join(blocks)
            assert await it.far.read(len(whole)) == whole

    on(loop, main)


# --- half-close ----------------------------------------------------------------------------------------------------


@both_loops
@both_kinds
def test_write_eof(loop: Loop, kind: str) -> None:
    async def main() -> None:
        async with Ends(kind) as it:
            assert it.stream.can_write_eof()
            it.stream.write(b"question")
            it.stream.write_eof()
            it.stream.write_eof()
            it.stream.write(b"no more")
            it.stream.write_all([b"no more" * JOINED, b"of this"])
            assert await it.far.rest() == b"question"
            await it.far.send(b"answer")
            await until(lambda: it.user.data == b"answer")
            assert not it.stream.is_closing()
            it.far.eof()
            assert await over(it.user) is None

    on(loop, main)


@both_loops
@both_kinds
def test_write_eof_behind_a_backlog(loop: Loop, kind: str) -> None:
    async def main() -> None:
        async with Ends(kind, buffers=TINY) as it:
            written = await it.backlog(100_000)
            it.stream.write_eof()
            it.stream.write(b"no more")
            assert await it.far.rest() == written
            assert it.user.marks == ["pause", "resume"]
            await it.far.send(b"answer")
            await until(lambda: it.user.data == b"answer")

    on(loop, main)


@both_loops
@both_kinds
@pytest.mark.parametrize("answer", [True, False, None])
def test_the_peer_ends_first(loop: Loop, kind: str, answer: bool | None) -> None:
    async def main() -> None:
        async with Ends(kind) as it:
            it.user.keep_open = answer
            await it.far.send(b"last words")
            it.far.eof()
            await until(lambda: it.user.eofs)
            assert it.user.data == b"last words"
            if answer:
                await turns(10)
                assert not it.stream.is_closing()
                it.stream.pause_reading()
                it.stream.resume_reading()  # the end does not come twice
                await turns(10)
                it.stream.write(b"x" * 300_000)
                it.stream.close()
                assert await it.far.rest() == b"x" * 300_000
            else:
                assert it.stream.is_closing()
                assert await it.far.rest() == b""
            assert await over(it.user) is None
            assert it.user.eofs == 1

    on(loop, main)


@both_loops
def test_the_peer_ends_while_something_waits(loop: Loop) -> None:
    async def main() -> None:
        async with Ends(buffers=TINY) as it:
            written = await it.backlog(100_000)
            it.far.eof()
            await until(lambda: it.user.eofs)
            assert it.stream.is_closing()
            assert await it.far.rest() == written
            assert await over(it.user) is None

    on(loop, main)


@both_loops
@pytest.mark.parametrize("how", ["close", "abort", "pause_reading", "write_eof"])
def test_calls_inside_eof_received(loop: Loop, how: str) -> None:
    async def main() -> None:
        async with Ends() as it:
            it.user.keep_open = how != "pause_reading"
            it.user.on_eof = getattr(it.stream, how)
            it.far.eof()
            await until(lambda: it.user.eofs)
            assert await it.far.rest() == b""
            if how == "write_eof":
                assert not it.user.lost
            else:
                assert await over(it.user) is None

    on(loop, main)


# --- ends ----------------------------------------------------------------------------------------------------------


@both_loops
@both_kinds
def test_close_and_abort(loop: Loop, kind: str) -> None:
    async def main() -> None:
        for calls in (["close"], ["abort"], ["close", "close"], ["close", "abort"], ["abort", "close", "abort"]):
            async with Ends(kind) as it:
                it.user.inside = True
                it.stream.write(b"bye")
                for call in calls:
                    getattr(it.stream, call)()
                assert it.stream.is_closing()
                assert "closing" in repr(it.stream)
                it.user.inside = False
                assert await over(it.user) is None
                assert await it.far.rest() == b"bye"

    on(loop, main)


@both_loops
@both_kinds
def test_close_with_a_backlog(loop: Loop, kind: str) -> None:
    async def main() -> None:
        async with Ends(kind, buffers=TINY) as it:
            written = await it.backlog(100_000)
            it.stream.close()
            it.stream.write(b"no more")
            if kind == "unix":  # over TCP the kernel resets a connection that is closed with something unread
                await it.far.send(b"unheard")
            await turns(10)
            assert not it.user.lost
            assert await it.far.read(len(written)) == written
            assert await over(it.user) is None
            assert not it.user.data
            assert it.user.marks == ["pause"]  # of a stream that is closing nobody waits for room

    on(loop, main)


@both_loops
@both_kinds
@pytest.mark.parametrize("closing", [False, True])
def test_abort_with_a_backlog(loop: Loop, kind: str, closing: bool) -> None:
    async def main() -> None:
        async with Ends(kind, buffers=TINY) as it:
            written = await it.backlog(100_000)
            if closing:
                it.stream.close()
            it.stream.abort()
            assert it.stream.get_write_buffer_size() == 0
            assert await over(it.user) is None
            assert written.startswith(await it.far.rest())

    on(loop, main)


@both_loops
def test_close_inside_data_received_and_pause_writing(loop: Loop) -> None:
    async def main() -> None:
        async with Ends() as it:
            it.user.on_data = lambda _: it.stream.close()
            await it.far.send(b"1")
            assert await over(it.user) is None
        async with Ends(buffers=TINY) as it:
            it.user.on_mark = lambda _: it.stream.abort()
            it.stream.write(b"x" * 200_000)
            assert await over(it.user) is None
            assert it.user.marks == ["pause"]

    on(loop, main)


@both_loops
@pytest.mark.parametrize("state", ["idle", "backlog", "closing", "half-closed"])
def test_reset_by_the_peer(loop: Loop, state: str) -> None:
    async def main() -> None:
        async with Ends(buffers=TINY) as it:
            if state in {"backlog", "closing"}:
                await it.backlog(100_000)
            if state == "closing":
                it.stream.close()
            if state == "half-closed":
                it.stream.write_eof()
            it.far.reset()
            error = await over(it.user)
            assert isinstance(error, ConnectionError)
            assert not it.user.eofs

    on(loop, main)


@both_loops
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", [7, 2 * READ_SIZE])
def test_a_reset_behind_data(loop: Loop, kind: str, size: int) -> None:
    """The data is there and the error too when the loop first looks: both are heard (uvloop looks only once)."""

    async def main() -> None:
        async with Ends(kind) as it:
            if kind == "unix":
                it.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
                it.stream.write(b"unread")  # what makes a reset of a Unix peer's end
            data = random.randbytes(size)
            it.stream.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            it.stream.pause_reading()
            await it.far.send(data)
            await turns()
            if kind == "unix":
                it.far.close()
            else:
                it.far.reset()
            it.stream.resume_reading()
            assert isinstance(await over(it.user), ConnectionResetError)
            assert data.startswith(it.user.data)
            assert it.user.data

    on(loop, main)


@both_loops
def test_reset_while_nobody_reads_is_noticed_by_a_write(loop: Loop) -> None:
    async def main() -> None:
        for call in ("write", "write_all", "write_eof"):
            async with Ends() as it:
                it.stream.pause_reading()
                it.far.reset()
                await turns(10)
                assert not it.user.lost
                it.user.inside = True
                if call == "write_eof":
                    it.stream.write_eof()
                elif call == "write":
                    it.stream.write(b"x")
                else:
                    it.stream.write_all([b"x" * JOINED, b"y"])
                assert it.stream.is_closing()
                it.user.inside = False
                error = await over(it.user)
                assert isinstance(error, OSError)
                assert error.errno in {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}

    on(loop, main)


@both_loops
def test_broken_pipe(loop: Loop) -> None:
    """A Unix peer that is gone: EPIPE, once, and never from inside the call."""

    async def main() -> None:
        for call in ("write", "write_all"):
            async with Ends("unix") as it:
                it.stream.pause_reading()
                it.far.close()
                it.user.inside = True
                if call == "write":
                    it.stream.write(b"x")
                else:
                    it.stream.write_all([b"x" * JOINED, b"y"])
                it.stream.write(b"y")
                it.user.inside = False
                error = await over(it.user)
                assert isinstance(error, BrokenPipeError)

    on(loop, main)


@both_loops
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", [100, 1_000_000])
@pytest.mark.parametrize("open_for_writing", [True, False])
def test_what_came_before_a_write_fails_is_heard(loop: Loop, kind: str, size: int, open_for_writing: bool) -> None:
    """An origin answers early and closes with our bytes unread: the answer, its end, RST. A write meets that."""

    async def main() -> None:
        async with Ends(kind) as it:
            it.user.keep_open = open_for_writing
            it.stream.write(b"a long upload")
            if kind == "tcp":
                it.stream.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            else:
                it.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            answer = random.randbytes(size)
            it.stream.pause_reading()
            await it.far.send(answer)
            it.far.close()
            it.user.inside = True
            it.stream.resume_reading()
            for _ in range(50):  # the first may still be taken, then the reset is there
                it.stream.write(b"the rest of it" * 10)
            it.stream.write_all([b"x" * JOINED, b"y"])
            assert not it.stream.is_closing()
            it.user.inside = False
            await over(it.user)
            assert it.user.data == answer
            assert size < RESTS * READ_SIZE

    on(loop, main)


@both_loops
@pytest.mark.parametrize("how", ["close", "abort", "pause_reading"])
def test_calls_between_a_failed_write_and_its_end(loop: Loop, how: str) -> None:
    async def main() -> None:
        async with Ends("unix") as it:
            await it.far.send(b"unheard")
            it.far.close()
            it.stream.write(b"x")
            getattr(it.stream, how)()
            it.stream.write(b"y")
            it.stream.write_eof()
            error = await over(it.user)
            assert isinstance(error, BrokenPipeError) is (how == "pause_reading")
            assert not it.user.data

    on(loop, main)


# --- users that raise ----------------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize("where", ["data", "eof"])
def test_a_user_that_raises_ends_its_stream(loop: Loop, where: str) -> None:
    async def main() -> None:
        async with Ends() as it:

            def fail(*_: Any) -> None:
                raise ValueError("a bug")

            if where == "data":
                it.user.on_data = fail
                it.far.sock.send(b"1")
            else:
                it.user.on_eof = fail
                it.far.eof()
            assert isinstance(await over(it.user), ValueError)

    [report] = on(loop, main, errors=1)
    assert isinstance(report["exception"], ValueError)


@both_loops
def test_a_user_that_raises_in_connection_lost(loop: Loop) -> None:
    """The socket is closed all the same."""

    async def main() -> None:
        async with Ends() as it:

            def fail() -> None:
                raise ValueError("a bug")

            it.user.on_lost = fail
            it.stream.close()
            await over(it.user)

    on(loop, main, errors=1)


@both_loops
def test_a_user_that_raises_about_water_marks(loop: Loop) -> None:
    """`pause_writing` raises into the writer's call, `resume_writing` into the loop; the stream goes on."""

    async def main() -> None:
        async with Ends(buffers=TINY) as it:

            def fail(_: str) -> None:
                raise ValueError("a bug")

            it.user.on_mark = fail
            with pytest.raises(ValueError, match="a bug"):
                it.stream.write(b"x" * 200_000)
            it.stream.write_eof()
            assert await it.far.rest() == b"x" * 200_000
            assert it.user.marks == ["pause", "resume"]

    on(loop, main, errors=1)


# --- after the end -------------------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize("how", ["close", "abort", "reset", "eof"])
def test_a_stream_that_is_over_leaves_its_number_alone(loop: Loop, how: str) -> None:
    """Another socket gets the descriptor's number: calls of the old stream do nothing to it."""

    async def main() -> None:
        it = Ends()
        old, number = it.stream, it.descriptor
        if how == "reset":
            it.far.reset()
        elif how == "eof":
            it.far.close()
        else:
            getattr(old, how)()
        await over(it.user)
        assert unregistered(number)
        near, far = connected()
        if near.fileno() != number:
            os.dup2(near.fileno(), number)
            near.close()
            near = socket.socket(fileno=number)
        user = User()
        stream = SocketStream(asyncio.get_running_loop(), near, user)
        new = FarEnd(far)
        for _ in range(2):
            old.pause_reading()
            old.resume_reading()
            old.write(b"stray")
            old.write_all([b"stray" * JOINED, b"stray"])
            old.write_eof()
            old.set_protocol(it.user)
            old.close()
            old.abort()
            await turns()
        assert old.get_write_buffer_size() == 0
        assert old.get_extra_info("peername") is None
        assert old.get_extra_info("nonsense", 5) == 5
        await new.send(b"question")
        await until(lambda: user.data == b"question")
        stream.write(b"answer")
        stream.write_eof()
        assert await new.rest() == b"answer"
        stream.close()
        await over(user)
        assert len(it.user.lost) == 1
        assert not it.user.data
        it.far.close()
        new.close()

    on(loop, main)


@both_loops
def test_calls_between_the_end_and_connection_lost(loop: Loop) -> None:
    async def main() -> None:
        async with Ends() as it:
            second = User()
            it.stream.abort()
            it.stream.resume_reading()
            it.stream.pause_reading()
            it.stream.write(b"stray")
            it.stream.write_eof()
            it.stream.set_protocol(second)
            await over(second)
            assert await it.far.rest() == b""
            it.user.lost.append(None)

    on(loop, main)


@both_loops
def test_addresses(loop: Loop, tmp_path: Path) -> None:
    async def main() -> None:
        async with Ends() as it:
            assert it.stream.get_extra_info("peername") == it.far.sock.getsockname()
            assert it.stream.get_extra_info("sockname") == it.far.sock.getpeername()
            assert it.stream.get_extra_info("ssl_object") is None
            assert it.stream.get_protocol() is it.user
        async with Ends("unix") as it:
            assert not it.stream.get_extra_info("peername")

    on(loop, main)
