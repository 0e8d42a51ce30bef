from __future__ import annotations

import io
import os

from connector.app.logs import Logger, LogOutput
from connector.app.stdin_control import StdinControl
from tests.support.aio import run, until


def test_lines_become_commands() -> None:
    stream = io.StringIO()
    calls: list[float] = []

    async def main() -> None:
        reading, writing = os.pipe()
        control = StdinControl(Logger(LogOutput(stream=stream)), calls.append, descriptor=reading)
        control.start()
        os.write(writing, b"reconnect\n\nrec")
        os.write(writing, b"onnect 1m30s\r\nreconnect soon\nreconnect -3s\nhelp\nwhat is this\n" + b"x" * 20_000)
        os.write(writing, b"\nreconnect 2s\nno end of line")
        await until(lambda: len(calls) == 4, what="four commands")
        os.close(writing)

    run(main())
    assert calls == [0.0, 90.0, 0.0, 2.0]
    text = stream.getvalue()
    assert "Sending reconnect signal delay=0s" in text
    assert "Sending reconnect signal delay=1m30s" in text
    assert 'time: invalid duration "soon"' in text
    assert 'Unknown command command="what is this"' in text
    assert text.count("Supported command") == 3
    assert "no end of line" not in text
