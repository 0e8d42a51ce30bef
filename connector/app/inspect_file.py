"""`connector inspect [FILE]`: the page over a capture instead of a running process.

Owns: the flags, following a file that grows. In: argv. Out: an exit status. Never: changes the file.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from connector.app.config import split_address
from connector.errors import ConnectorError, UsageError
from connector.inspector.capture import Item, read_capture
from connector.inspector.hub import Inspector
from connector.inspector.page import Page
from connector.inspector.snapshot import load_items

FOLLOW_SECONDS = 1.0
"""Between two looks at a file that grows."""


def main(argv: list[str]) -> int:
    """Serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="connector inspect",
        description="Show a capture on a page. A file that is being written is followed. Without FILE the page has a\n"
        "button to open one. A running process shows itself: connector run --inspect.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="default 127.0.0.1, a free port")
    parser.add_argument("file", nargs="?", metavar="FILE")
    args = parser.parse_args(argv)
    try:
        host, port = split_address(args.listen, "--listen", any_host=True)
        return asyncio.run(_serve(args.file, host, port))
    except ConnectorError as error:
        print(f"connector inspect: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1


async def _serve(file: str | None, host: str, port: int) -> int:
    hub = Inspector("capture", title=file or "")
    items: list[Item] = []
    if file is not None:
        items = _read(hub, file)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Page(hub, host, port) as page:
        page.loaded = items
        print(f"Inspector: {page.url}", flush=True)
        seen = os.stat(file).st_size if file is not None else 0
        while not stop.is_set():
            try:
                async with asyncio.timeout(FOLLOW_SECONDS):
                    await stop.wait()
            except TimeoutError:
                pass
            if file is not None and (size := _size(file)) != seen:
                seen = size
                page.loaded = await loop.run_in_executor(None, _items, file)
                load_items(hub, page.loaded)
                await page.refresh()
    return 0


def _read(hub: Inspector, file: str) -> list[Item]:
    reader, items = read_capture(file)
    if not reader.redacted:
        hub.no_redact = True
        print(f"connector inspect: {file} is NOT redacted: the page shows secrets", file=sys.stderr)
    load_items(hub, items)
    return items


def _items(file: str) -> list[Item]:
    return read_capture(file)[1]


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1
