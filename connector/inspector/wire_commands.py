"""`connector decode` and `connector encode`: bytes of the edge protocol on the command line.

Owns: the flags of both and how input is read. In: argv. Out: a dump, JSON or bytes on stdout; an exit status.
Never: shows a secret unless `--no-redact` is given.
"""

from __future__ import annotations

import argparse
import binascii
import json
import os
import re
import sys

from connector.errors import ConnectorError, UsageError
from connector.inspector.decode import FORMS, Decoded, decode
from connector.inspector.encode import ENCODERS, encode
from connector.inspector.redact import redact_values
from connector.inspector.render import annotate
from connector.inspector.values import jsonable

LARGEST_INPUT = 64 * 1024 * 1024
"""Bytes read from a file or stdin; the largest legal message has as many."""


def decode_main(argv: list[str]) -> int:
    """Run `connector decode`; returns the exit status. Errors: ConnectorError."""
    parser = argparse.ArgumentParser(
        prog="connector decode",
        description="Print what bytes of the tunnel protocol mean: offsets, bytes, fields.",
        epilog="INPUT is hex (spaces, colons and 0x allowed), base64, a file's name, or - for stdin.",
        allow_abbrev=False,
    )
    parser.add_argument("--as", dest="form", default="auto", choices=["auto", *FORMS], help="what the bytes are")
    parser.add_argument("--json", action="store_true", help="print the values as JSON, which `encode` takes back")
    parser.add_argument("--no-redact", action="store_true", help="show passwords and tunnel secrets")
    parser.add_argument("input", metavar="INPUT", help="HEX, BASE64, FILE or -")
    args = parser.parse_args(argv)
    data = read_input(args.input, args.form)
    found = decode(data, args.form)
    if args.no_redact:
        print("connector decode: --no-redact: secrets are shown", file=sys.stderr)
    print(as_json(found, args.no_redact) if args.json else as_dump(found, args.no_redact))
    return 0


def encode_main(argv: list[str]) -> int:
    """Run `connector encode`; returns the exit status. Errors: ConnectorError."""
    parser = argparse.ArgumentParser(
        prog="connector encode",
        description="Make bytes of the tunnel protocol from JSON, as `connector decode --json` prints it.",
        allow_abbrev=False,
    )
    parser.add_argument("--as", dest="form", required=True, choices=list(ENCODERS), help="what to make")
    parser.add_argument("--output", default="hex", choices=("hex", "base64", "raw"), help="form of the output")
    parser.add_argument("input", metavar="JSON", help="JSON text, a file's name, or - for stdin")
    args = parser.parse_args(argv)
    text = args.input
    if text == "-":
        text = _within(sys.stdin.buffer.read(LARGEST_INPUT + 1), "standard input").decode("utf-8", "replace")
    elif not text.strip():
        raise UsageError("the input is empty", advice="Give JSON, a file's name, or - for standard input.")
    elif not text.lstrip().startswith(("{", "[")):
        text = _read_file(text).decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the input is not JSON: {error}", advice="See `connector decode --json` for its form."
        ) from None
    if value == []:
        raise UsageError("the JSON is an empty list: there is nothing to encode")
    data = encode(args.form, value)
    if args.output == "raw":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    elif args.form in {"token", "headers"}:
        print(data.decode("ascii", "replace"))
    else:
        print(data.hex() if args.output == "hex" else binascii.b2a_base64(data, newline=False).decode())
    return 0


def as_json(found: Decoded, no_redact: bool) -> str:
    """Return the value as JSON text."""
    value = jsonable(found.value if no_redact else redact_values(found.value))
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_dump(found: Decoded, no_redact: bool) -> str:
    """Return the annotated dump."""
    data, notes = (found.data, found.notes) if no_redact else found.masked()
    if no_redact and found.form == "token":
        notes = [*notes[:-1], (0, 0, "s, tunnel secret", found.value["secret"].hex())]
    lines = [f"{found.form}, {len(found.data)} bytes", annotate(data, notes, colour=sys.stdout.isatty())]
    return "\n".join(lines)


def read_input(text: str, form: str) -> bytes:
    """Return the bytes that the argument stands for. Errors: UsageError."""
    if text == "-":
        return _maybe_text(_within(sys.stdin.buffer.read(LARGEST_INPUT + 1), "standard input"), form)
    if _is_there(text):
        return _maybe_text(_read_file(text), form)
    if not text.strip():
        raise UsageError("the input is empty", advice="Give hex, base64, a file's name, or - for standard input.")
    if form in {"token", "headers"}:
        return text.encode("utf-8", "surrogateescape")
    found = None if text.startswith(("/", "./", "../", "~")) else _from_text(text)
    if found is not None:
        return text.encode() if form == "auto" and text.startswith("eyJ") else found
    if form == "auto" and ":" in text:  # a serialised header list
        return text.encode("utf-8", "surrogateescape")
    raise UsageError(
        f"{text[:40]!r} is neither hex nor base64, and there is no such file", advice="Use - to read standard input."
    )


def _is_there(name: str) -> bool:
    """Whether a file, or a pipe of the shell's, has this name."""
    try:
        return len(name) < 4096 and "\0" not in name and os.path.exists(name)
    except OSError:
        return False


def _within(data: bytes, name: str) -> bytes:
    if len(data) > LARGEST_INPUT:
        raise UsageError(f"{name} has more than {LARGEST_INPUT} bytes", advice="Give the part that matters.")
    if not data:
        raise UsageError(f"{name} is empty")
    return data


def bytes_of_text(text: str, form: str) -> bytes:
    """Return the bytes that pasted text stands for; files are not looked for. Errors: UsageError."""
    if form in {"token", "headers"} or (form == "auto" and text.startswith("eyJ")):
        return text.encode()
    found = _from_text(text)
    if found is not None:
        return found
    if form == "auto" and ":" in text:
        return text.encode()
    raise UsageError("that is neither hex nor base64", advice="Spaces and line breaks do not matter.")


def _maybe_text(raw: bytes, form: str) -> bytes:
    """Bytes of a file may be hex or base64 themselves."""
    try:
        text = raw.decode("ascii").strip()
    except UnicodeDecodeError:
        return raw
    if form in {"token", "headers"} or (form == "auto" and text.startswith("eyJ")):
        return raw
    found = _from_text(text)
    return raw if found is None else found


def _from_text(text: str) -> bytes | None:
    compact = re.sub(r"\s|:|0x|,", "", text)
    if compact and len(compact) % 2 == 0 and re.fullmatch(r"[0-9a-fA-F]+", compact):
        return bytes.fromhex(compact)
    try:
        compact = re.sub(r"\s", "", text).replace("-", "+").replace("_", "/")
        return binascii.a2b_base64(compact + "=" * (-len(compact) % 4), strict_mode=True) if compact else None
    except (binascii.Error, ValueError):
        return None


def _read_file(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            return _within(file.read(LARGEST_INPUT + 1), name)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}") from None


def decode_command(argv: list[str]) -> int:
    """Run `connector decode`."""
    return run("decode", argv)


def encode_command(argv: list[str]) -> int:
    """Run `connector encode`."""
    return run("encode", argv)


def run(command: str, argv: list[str]) -> int:
    """Run one of the two; errors become lines on stderr and statuses."""
    try:
        return decode_main(argv) if command == "decode" else encode_main(argv)
    except ConnectorError as error:
        print(f"connector {command}: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1
