"""`connector tui`: the inspector's live table in the terminal, for machines reached over SSH.

Owns: the screen. In: the address of a running inspector's page, or a capture. Out: what a person sees.
Never: changes anything in the inspected process. Needs the extra `tui` (textual).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from connector.errors import ConfigError, ConnectorError, UsageError

REFRESH_SECONDS = 1.0
RETRY_SECONDS = 2.0
MAX_ROWS = 500
"""Rows of the table, the newest; a terminal shows fifty."""

COLUMNS = ("ID", "Status", "Took", "Method", "What", "Up", "Down", "Via", "Client")
"""The most telling first: 80 columns show them up to the middle of `What`."""


def main(argv: list[str]) -> int:
    """Show the table until q is pressed."""
    parser = argparse.ArgumentParser(
        prog="connector tui",
        description="The inspector's table in the terminal.",
        epilog="SOURCE is the address that `connector run --inspect` prints, token included, or a capture file.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE")
    args = parser.parse_args(argv)
    try:
        try:
            import textual  # noqa: F401, PLC0415 - an optional extra
        except ImportError:
            raise ConfigError(
                "the terminal table needs the package textual", advice="pip install 'tunnel-connector[tui]'"
            ) from None
        source: Source = LiveSource(args.source) if args.source.startswith("http") else FileSource(args.source)
        make_app(source).run()
    except ConnectorError as error:
        print(f"connector tui: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1
    return 0


class Source:
    """Where rows come from."""

    title = ""

    async def rows(self, expression: str) -> tuple[str, list[dict[str, Any]]]:
        """Return a status line and the rows that the filter means. Errors: ConnectorError."""
        raise NotImplementedError

    async def detail(self, identity: int) -> list[str]:
        """Return lines about one stream. Errors: ConnectorError."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go."""


class LiveSource(Source):
    """A running inspector's page."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        token = parse_qs(parts.query).get("token", [""])[0]
        if parts.scheme != "http" or not parts.netloc or not token:
            raise UsageError(
                "that is no address of an inspector's page",
                advice="Copy it with its token: http://127.0.0.1:PORT/?token=…",
            )
        self.title = parts.netloc
        self._base = f"http://{parts.netloc}"
        self._headers = {"X-Inspector-Token": token}
        self._session: Any = None

    async def _get(self, path: str, **query: Any) -> Any:
        import aiohttp  # noqa: PLC0415

        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
        try:
            async with self._session.get(self._base + path, params=query, headers=self._headers) as response:
                value = await response.json()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ConfigError(f"{self.title} does not answer: {error or type(error).__name__}") from None
        if response.status != 200:
            raise UsageError(str(value.get("error", response.status)))
        return value

    async def rows(self, expression: str) -> tuple[str, list[dict[str, Any]]]:
        """Ask the page."""
        found = await self._get("/api/state", filter=expression)
        status = found["status"]
        word = "" if status["redacted"] else ", NOT REDACTED"
        return f"{status['role']} {status['title']}, {status['seen']} streams{word}", found["rows"]

    async def detail(self, identity: int) -> list[str]:
        """Ask the page."""
        stream = await self._get(f"/api/streams/{identity}")
        frames = await self._get(f"/api/streams/{identity}/frames", limit=200) if "frame_log" in stream else []
        return describe(stream, frames)

    async def close(self) -> None:
        """Close the connection."""
        if self._session is not None:
            await self._session.close()


class FileSource(Source):
    """A capture file, read once."""

    def __init__(self, path: str) -> None:
        from connector.inspector.capture import read_capture  # noqa: PLC0415
        from connector.inspector.hub import Inspector  # noqa: PLC0415
        from connector.inspector.snapshot import load_items  # noqa: PLC0415

        reader, items = read_capture(path)
        self.title = path
        self._hub = Inspector("capture", no_redact=not reader.redacted)
        load_items(self._hub, items)

    async def rows(self, expression: str) -> tuple[str, list[dict[str, Any]]]:
        """Filter."""
        from connector.inspector.filters import parse_filter  # noqa: PLC0415

        predicate = parse_filter(expression)
        return f"capture {self.title}", [row for row in self._hub.rows() if predicate(row)]

    async def detail(self, identity: int) -> list[str]:
        """Describe."""
        record = self._hub.streams.get(identity)
        if record is None:
            raise UsageError("this stream is not there any more")
        return describe(record.detail(self._hub.no_redact), self._hub.frames(record, 0, 200))


def describe(stream: dict[str, Any], frames: list[dict[str, Any]]) -> list[str]:
    """Return a stream as lines: the findings first, then headers, session, frames."""
    lines = [f"{stream['method']} {stream['url']}", ""]
    verdict = stream["verdict"]
    lines += [f"! {line}" for line in (verdict["line"], *verdict["evidence"], verdict["advice"]) if line]
    ended = "open" if stream["ms"] is None else f"{stream['how']} after {stream['ms']} ms {stream['error']}"
    lines.append(f"status {stream['status']} from {stream['source']}, {ended}")
    lines.append(f"{stream['transport']}, connection {stream['conn']}, rule {stream['rule']} {stream['service']}")
    lines.append("timing: " + ", ".join(f"{name} {at} ms" for name, at in stream["marks"].items()))
    for name in ("request", "response"):
        lines += ["", name]
        lines += [f"  {key}: {value}" for key, value in stream[name]["headers"]]
        body = stream[name]["body"]
        if body["size"]:
            text = body["data"] if isinstance(body["data"], str) else body["data"]["hex"]
            lines += [
                f"  ({body['size']} bytes{', truncated' if body['truncated'] else ''})",
                *text[:2_000].splitlines(),
            ]
    session = stream.get("session")
    if session:
        lines += ["", f"MQTT {session['client_id']} {session['state']}, keep alive {session['keep_alive']} s"]
        lines += [f"  subscribed to {item['topic']} qos {item['qos']}" for item in session["subscriptions"]]
    if frames:
        lines += ["", "frames"]
    for frame in reversed(frames):
        shown = "; ".join(f"{packet['type']} {packet['text']}" for packet in frame["packets"])
        payload = frame["payload"] if isinstance(frame["payload"], str) else frame["payload"]["hex"]
        arrow = "<" if frame["way"] else ">"
        shown = shown or f"{frame['opcode']} {payload[:80]}"
        lines.append(f"{frame['at']:10.3f} {arrow} {frame['length']:>7} B {shown}")
    return lines


def make_app(source: Source) -> Any:
    """Return the textual App; its classes can only be made when textual is there."""
    from rich.text import Text  # noqa: PLC0415
    from textual.app import App, ComposeResult  # noqa: PLC0415
    from textual.binding import Binding  # noqa: PLC0415
    from textual.containers import VerticalScroll  # noqa: PLC0415
    from textual.screen import ModalScreen  # noqa: PLC0415
    from textual.widgets import DataTable, Footer, Header, Input, Static  # noqa: PLC0415

    class Detail(ModalScreen[None]):
        """One stream."""

        BINDINGS: ClassVar = [Binding("escape,q", "dismiss", "Back")]
        CSS = """
        Detail { align: center middle; }
        VerticalScroll { width: 96%; height: 94%; border: round $accent; background: $surface; padding: 0 1; }
        """

        def __init__(self, lines: list[str]) -> None:
            super().__init__()
            self._lines = lines

        def compose(self) -> ComposeResult:
            """Show the lines as they are: what passes through a tunnel is no markup."""
            with VerticalScroll():
                yield Static(Text("\n".join(self._lines)), id="lines")

    class Table(App[None]):
        """The table, with a filter line."""

        TITLE = "Tunnel inspector"
        CSS = "Input { dock: bottom; } #status { height: 1; color: $text-muted; } DataTable { height: 1fr; }"
        BINDINGS: ClassVar = [
            Binding("q", "quit", "Quit"), Binding("slash", "filter", "Filter", key_display="/"),
            Binding("p", "pause", "Pause"), Binding("t", "theme", "Light, dark"),
            Binding("escape", "leave", "Table", show=False),
        ]  # fmt: skip

        def __init__(self) -> None:
            super().__init__()
            self.expression = ""
            self.paused = False
            self.shown: dict[int, tuple[Any, ...]] = {}

        def compose(self) -> ComposeResult:
            """Lay the screen out."""
            yield Header()
            yield Static("", id="status")
            yield DataTable(id="table", cursor_type="row")
            yield Input(placeholder="filter: status>=500 or kind=websocket", id="filter")
            yield Footer()

        async def on_mount(self) -> None:
            """Begin to ask."""
            self.query_one(DataTable).add_columns(*((name, name) for name in COLUMNS))
            self.query_one(DataTable).focus()
            await self.ask()
            self.set_interval(REFRESH_SECONDS, self.ask)

        async def ask(self) -> None:
            """Take the rows and show what changed."""
            if self.paused:
                return
            status = self.query_one("#status", Static)
            try:
                text, rows = await source.rows(self.expression)
            except ConnectorError as error:
                status.update(Text(f"{error} {error.advice}".strip(), style="bold red"))
                return
            status.update(Text(text))
            table = self.query_one(DataTable)
            wanted = {row["id"]: _cells(row) for row in sorted(rows, key=lambda row: -int(row["id"]))[:MAX_ROWS]}
            if list(wanted) == list(self.shown):
                for identity, cells in wanted.items():
                    for name, old, new in zip(COLUMNS, self.shown[identity], cells, strict=True):
                        if old != new:
                            table.update_cell(str(identity), name, new)
            else:
                row = table.cursor_row
                table.clear()
                for identity, cells in wanted.items():
                    table.add_row(*cells, key=str(identity))
                table.move_cursor(row=min(row, max(0, len(wanted) - 1)))
            self.shown = wanted

        async def on_data_table_row_selected(self, event: Any) -> None:
            """Open a stream."""
            with contextlib.suppress(ConnectorError):
                await self.push_screen(Detail(await source.detail(int(event.row_key.value))))

        async def on_input_submitted(self, event: Any) -> None:
            """Filter."""
            self.expression = event.value
            self.query_one(DataTable).focus()
            await self.ask()

        def action_filter(self) -> None:
            """Go to the filter line."""
            self.query_one(Input).focus()

        def action_leave(self) -> None:
            """Go back to the table."""
            self.query_one(DataTable).focus()

        def action_theme(self) -> None:
            """Change between light and dark."""
            self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

        def action_pause(self) -> None:
            """Hold the table still."""
            self.paused = not self.paused
            self.sub_title = "paused" if self.paused else source.title

        async def on_unmount(self) -> None:
            """Let go of the source."""
            await source.close()

    app = Table()
    app.sub_title = source.title
    return app


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return a row's cells; what went wrong stands in front of the URL, for that is cut off first."""
    from rich.text import Text  # noqa: PLC0415 - textual's own

    what = Text()
    if row["why"]:
        what.append(f"{row['why']} ", style="bold red")
    what.append(f"{row['host']}{row['target']}")
    if row["mqtt"]:
        what.append(f" MQTT {row['mqtt']}", style="bold")
    status = row["status"] or 0
    colour = "green" if 0 < status < 400 else "yellow" if 400 <= status < 500 else "red" if status else ""
    took = "open" if row["ms"] is None else f"{row['ms']:.0f} ms" if row["ms"] < 10_000 else f"{row['ms'] / 1000:.1f} s"
    return (
        Text(str(row["id"])), Text(str(status or "…"), style=colour), Text(took, justify="right"), Text(row["method"]),
        what, Text(str(row["up"]), justify="right"), Text(str(row["down"]), justify="right"), Text(row["transport"]),
        Text(row["client"]),
    )  # fmt: skip


__all__ = ["FileSource", "LiveSource", "Source", "asyncio", "describe", "main", "make_app"]
