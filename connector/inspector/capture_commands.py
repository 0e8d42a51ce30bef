"""`connector capture show|filter|export`: what a capture file holds.

Owns: the flags and the listing. In: argv, a capture file. Out: text or a file; an exit status.
Never: opens a connection; writes over a file that is there, unless told.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from connector.errors import ConfigError, ConnectorError, UsageError
from connector.inspector.capture import CapturedStream, CaptureModel, CaptureReader, Item, read_capture, write_items
from connector.inspector.filters import parse_filter

FORMATS = ("jsonl", "har", "pcapng")


def main(argv: list[str]) -> int:
    """Run `connector capture`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="connector capture", description="Look into capture files.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="list streams, or one stream with its frames")
    show.add_argument("--stream", type=int, metavar="ID", help="everything of this stream")
    show.add_argument("--filter", default="", metavar="EXPR", help="only these streams, such as status>=500")
    show.add_argument("file", metavar="FILE")
    choose = commands.add_parser("filter", help="write a capture with some of the streams")
    choose.add_argument("--output", "-o", required=True, metavar="FILE")
    choose.add_argument("--force", action="store_true", help="write over a file")
    choose.add_argument("file", metavar="FILE")
    choose.add_argument("expression", metavar="EXPR")
    export = commands.add_parser("export", help="JSON lines, HAR (browsers), pcapng (Wireshark, secrets inside)")
    export.add_argument("--format", choices=FORMATS, help="default: by the name of the output")
    export.add_argument("--output", "-o", default="-", metavar="FILE", help="- is standard output")
    export.add_argument("--filter", default="", metavar="EXPR")
    export.add_argument("--force", action="store_true", help="write over a file")
    export.add_argument("file", metavar="FILE")
    commands.add_parser("dissector", help="print the dissector for Wireshark: > tunnel.lua")
    args = parser.parse_args(argv)
    if args.command == "dissector":
        print((Path(__file__).parent / "tunnel.lua").read_text(), end="")
        return 0
    try:
        reader, items = read_capture(args.file)
        if reader.cut:
            print(
                f"connector capture: {args.file} ends with {reader.cut} bytes that are no whole record", file=sys.stderr
            )
        if not reader.redacted:
            print(f"connector capture: {args.file} is NOT redacted: it holds secrets", file=sys.stderr)
        match args.command:
            case "show":
                return _show(items, args)
            case "filter":
                kept = select(items, args.expression)
                _write(args.output, write_items(kept, redacted=reader.redacted), args.force)
                return 0
            case _:
                return _export(reader, items, args)
    except ConnectorError as error:
        print(f"connector capture: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1


_OPENING = ("id", "kind", "method", "host", "target", "transport", "conn", "rule", "service")


def row_of(stream: CapturedStream) -> dict[str, Any]:
    """Return a captured stream as the row that filters look at."""
    fields = stream.open
    client = next((value for name, value in fields.get("headers", []) if name.lower() == "cf-connecting-ip"), "")
    ray = next((value for name, value in fields.get("headers", []) if name.lower() == "cf-ray"), "")
    first = next((item for item in stream.frames if item.fields.get("packets")), None)
    return {
        **{key: fields.get(key) for key in _OPENING},
        "url": stream.url, "status": stream.head.get("status"), "source": stream.head.get("source", ""),
        "ms": stream.end.get("ms"), "up": stream.end.get("up", 0), "down": stream.end.get("down", 0),
        "how": stream.end.get("how", "open"), "error": stream.end.get("error", ""), "client": client, "ray": ray,
        "mqtt": first.fields["packets"][0][1] if first is not None else None, "frames": len(stream.frames),
    }  # fmt: skip


def select(items: list[Item], expression: str) -> list[Item]:
    """Return the records that belong to streams which `expression` means, and everything of no stream."""
    predicate = parse_filter(expression)
    if not expression.strip():
        return items
    model = CaptureModel(items)
    kept = {key for key, stream in model.streams.items() if predicate(row_of(stream))}
    found: list[Item] = []
    session = 0
    for item in items:
        kind = item.fields.get("t")
        session += kind == "session"
        if kind in {"open", "head", "frame", "body", "end"} and (session, item.fields.get("id")) not in kept:
            continue
        found.append(item)
    return found


def export_bytes(items: list[Item], form: str) -> bytes:
    """Return the capture in another format."""
    from connector.inspector.export import to_har, to_jsonl  # noqa: PLC0415 - two of three are not needed

    if form == "jsonl":
        return "".join(line + "\n" for line in to_jsonl(items)).encode("utf-8", "surrogatepass")
    model = CaptureModel(items)
    if form == "har":
        return to_har(model).encode("utf-8", "surrogatepass")
    from connector.inspector.pcapng import to_pcapng  # noqa: PLC0415 - loads cryptography

    return to_pcapng(model)


def _export(reader: CaptureReader, items: list[Item], args: argparse.Namespace) -> int:
    form = args.format or Path(args.output).suffix.lstrip(".")
    if form == "json":
        form = "jsonl"
    if form not in FORMATS:
        raise UsageError("the format is not clear", advice=f"Say --format {', '.join(FORMATS)}.")
    _write(args.output, export_bytes(select(items, args.filter), form), args.force)
    return 0


def _write(name: str, data: bytes, force: bool) -> None:
    if name == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        with open(name, "wb" if force else "xb") as file:
            file.write(data)
    except FileExistsError:
        raise ConfigError(
            f"{name} is there already", advice="Name another file, or write over it with --force."
        ) from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be written: {error.strerror or error}") from None


def _show(items: list[Item], args: argparse.Namespace) -> int:
    model = CaptureModel(items)
    predicate = parse_filter(args.filter)
    if args.stream is not None:
        found = [stream for stream in model.streams.values() if stream.open.get("id") == args.stream]
        if not found:
            raise UsageError(f"the capture has no stream {args.stream}")
        for stream in found:
            _print_stream(model, stream)
        return 0
    for session in model.sessions:
        word = "redacted" if session.get("redacted") else "NOT redacted"
        print(f"# {session.get('role')} {session.get('program')}, {word}")
    for stream in model.streams.values():
        row = row_of(stream)
        if predicate(row):
            ms = "     open" if row["ms"] is None else f"{row['ms']:7.0f}ms"
            client = f" [{row['mqtt']}]" if row["mqtt"] else ""
            numbers = f"{row['status'] or '---':>3} {ms} {row['up']:>9} {row['down']:>9}"
            print(f"{row['id']:5} {row['transport'] or '':5} {numbers} {row['method']:6} {row['url']}{client}")
    print(f"# {len(model.streams)} streams, {len(model.control)} control messages, {len(model.events)} events")
    return 0


def _print_stream(model: CaptureModel, stream: CapturedStream) -> None:
    row = row_of(stream)
    print(f"{row['method']} {row['url']}  ({row['kind']} over {row['transport']}, rule {row['rule']} {row['service']})")
    for name, value in stream.open.get("headers", []):
        print(f"> {name}: {value}")
    print(f"< {row['status']} from {row['source']}")
    for name, value in stream.head.get("headers", []):
        print(f"< {name}: {value}")
    for way, mark in ((0, ">"), (1, "<")):
        if stream.bodies[way]:
            print(f"{mark} {stream.bodies[way][:2_000]!r}")
    start = stream.open.get("at", 0.0)
    for item in stream.frames:
        fields = item.fields
        packets = "; ".join(" ".join(packet) for packet in fields.get("packets", []))
        shown = packets or repr(item.payload[:80])
        at, arrow = fields.get("at", 0.0) - start, "<" if fields.get("way") else ">"
        print(f"{at:10.3f} {arrow} {fields.get('length')} B {shown}")
    for line in stream.end.get("diagnosis", []):
        print(f"! {line}")
    print(f"ended: {row['how']} {row['error']}".rstrip())
