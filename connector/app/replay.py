"""`connector replay FILE --to URL`: a capture's requests, sent again, their answers compared.

Owns: the client, the order and the verdicts. In: argv, a capture. Out: a table; exit status 1 when an answer differs.
Never: sends what was masked (a masked header is left out, and said); sends two requests at a time.

*Strategy*: deterministic: the streams in the order in which they were opened, one after the other; of a WebSocket the
visitor's frames, each after as many frames of the origin as preceded it in the capture.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys
from typing import Any
from urllib.parse import urlsplit

from connector.errors import ConfigError, ConnectorError, UsageError
from connector.inspector.capture import CapturedStream, CaptureModel, read_capture
from connector.inspector.capture_commands import row_of
from connector.inspector.filters import parse_filter

MASK = "[redacted]"
SECONDS = 30.0
"""Limit of one request, and of the wait for one frame."""

LARGEST_ANSWER = 16 * 1024 * 1024

_LEFT_OUT = frozenset((
    "host", "content-length", "connection", "transfer-encoding", "upgrade", "cf-ray", "cf-connecting-ip", "cf-visitor",
    "cf-ipcountry", "cdn-loop", "x-forwarded-for", "x-forwarded-proto", "sec-websocket-key", "sec-websocket-version",
    "sec-websocket-extensions", "sec-websocket-protocol", "accept-encoding", "keep-alive", "te",
))  # fmt: skip
_VARY = ("date", "cf-ray", "age", "set-cookie", "server")


def main(argv: list[str]) -> int:
    """Run `connector replay`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="connector replay", description="Send a capture's requests again and compare the answers.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="URL", help="an origin, or the dev edge: https://127.0.0.1:8443")
    parser.add_argument("--cacert", metavar="FILE", help="trust these certificates: $(connector edge ca)")
    parser.add_argument("--filter", default="", metavar="EXPR", help="only these streams")
    parser.add_argument("--header", action="append", default=[], metavar="NAME: VALUE", help="set on every request")
    parser.add_argument("--host", metavar="NAME", help="the Host of every request (default: as captured)")
    parser.add_argument("file", metavar="FILE")
    args = parser.parse_args(argv)
    try:
        reader, items = read_capture(args.file)
        del reader
        predicate = parse_filter(args.filter)
        model = CaptureModel(items)
        streams = [stream for stream in model.streams.values() if predicate(row_of(stream))]
        if not streams:
            raise UsageError("no stream of the capture is meant", advice="See: connector capture show FILE.")
        return asyncio.run(_Replay(args).run(streams))
    except ConnectorError as error:
        print(f"connector replay: {error}", file=sys.stderr)
        if error.advice:
            print(error.advice, file=sys.stderr)
        return 255 if isinstance(error, UsageError) else 1


class _Replay:
    def __init__(self, args: argparse.Namespace) -> None:
        parts = urlsplit(args.to)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"--to {args.to}: not a URL with http or https")
        self.base = f"{parts.scheme}://{parts.netloc}"
        self.host = args.host
        self.tls: ssl.SSLContext | bool = True
        if args.cacert:
            try:
                self.tls = ssl.create_default_context(cafile=args.cacert)
            except OSError as error:
                raise ConfigError(f"--cacert {args.cacert}: {error.strerror or error}") from None
            self.tls.check_hostname = False  # the Host is the capture's, the address is --to
        self.extra: dict[str, str] = {}
        for text in args.header:
            name, colon, value = text.partition(":")
            if not colon:
                raise UsageError(f"--header {text!r}: not NAME: VALUE")
            self.extra[name.strip()] = value.strip()

    async def run(self, streams: list[CapturedStream]) -> int:
        import aiohttp  # noqa: PLC0415 - slow to import

        different = 0
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=True) as session:
            for stream in streams:
                kind = stream.open.get("kind")
                label = f"{stream.open.get('id'):>5} {stream.open.get('method'):6} {stream.open.get('target')}"
                try:
                    if kind == "http":
                        problems = await self._http(session, stream)
                    elif kind == "websocket":
                        problems = await self._websocket(session, stream)
                    else:
                        print(f"{label}: left out, {kind} streams cannot be sent again")
                        continue
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    problems = [f"{type(error).__name__}: {error}"]
                different += bool(problems)
                print(f"{label}: {'; '.join(problems) if problems else 'same answer'}", flush=True)
        print(f"{len(streams)} streams, {different} with another answer")
        return 1 if different else 0

    def _headers(self, stream: CapturedStream) -> dict[str, str]:
        headers: dict[str, str] = {}
        masked = []
        for name, value in stream.open.get("headers", []):
            if name.lower() in _LEFT_OUT:
                continue
            if MASK in value:
                masked.append(name)
            else:
                headers[name] = value
        headers["Host"] = self.host or str(stream.open.get("host", ""))
        headers.update(self.extra)
        left = [name for name in masked if name.lower() not in {key.lower() for key in self.extra}]
        if left:
            print(f"      masked in the capture and so left out: {', '.join(left)} (give them with --header)")
        return headers

    async def _http(self, session: Any, stream: CapturedStream) -> list[str]:
        body = stream.bodies[0]
        if stream.body_fields[0].get("truncated"):
            return [f"its body was not kept whole ({len(body)} bytes of {stream.body_fields[0].get('size')})"]
        from yarl import URL  # noqa: PLC0415 - aiohttp's own

        async with session.request(
            stream.open.get("method"), URL(self.base + str(stream.open.get("target")), encoded=True),
            headers=self._headers(stream), data=body or None, ssl=self.tls, allow_redirects=False,
        ) as response:  # fmt: skip
            answer = await response.content.read(LARGEST_ANSWER)
        problems = []
        expected = int(stream.head.get("status", 0))
        if response.status != expected:
            problems.append(f"status {response.status} instead of {expected}")
        problems += _compare_bodies(stream, answer)
        for name in ("content-type", "location"):
            wanted = next((value for key, value in stream.head.get("headers", []) if key.lower() == name), "")
            if wanted and MASK not in wanted and response.headers.get(name, "") != wanted:
                problems.append(f"{name} {response.headers.get(name, 'missing')!r} instead of {wanted!r}")
        return problems

    async def _websocket(self, session: Any, stream: CapturedStream) -> list[str]:
        protocols = next(
            (value for name, value in stream.open.get("headers", []) if name.lower() == "sec-websocket-protocol"), ""
        )
        url = self.base + str(stream.open.get("target"))
        problems: list[str] = []
        async with session.ws_connect(
            url, headers=self._headers(stream), ssl=self.tls, autoping=False, autoclose=False,
            protocols=[part.strip() for part in protocols.split(",") if part.strip()],
        ) as socket:  # fmt: skip
            count = 0
            for item in stream.frames:
                opcode, way = item.fields.get("opcode"), item.fields.get("way")
                if opcode == 8:
                    break
                if not way:
                    if not item.fields.get("fin", True) or item.fields.get("length") != len(item.payload):
                        return [*problems, "a frame of the capture is in pieces or cut, the rest is not sent"]
                    send = socket.send_str if opcode == 1 else socket.ping if opcode == 9 else socket.send_bytes
                    if opcode in {1, 2, 9}:
                        await send(item.payload.decode("utf-8", "replace") if opcode == 1 else item.payload)
                    continue
                async with asyncio.timeout(SECONDS):
                    message = await socket.receive()
                count += 1
                data = message.data.encode() if isinstance(message.data, str) else message.data
                if not isinstance(data, bytes | bytearray):
                    return [*problems, f"it ended at frame {count} of the origin"]
                if _differs(item.payload, bytes(data)):
                    problems.append(f"frame {count} of the origin differs")
        return problems


def _compare_bodies(stream: CapturedStream, answer: bytes) -> list[str]:
    kept = stream.bodies[1]
    truncated = stream.body_fields[1].get("truncated")
    compared = answer[: len(kept)] if truncated else answer
    return ["another body"] if _differs(kept, compared) else []


def _differs(captured: bytes, found: bytes) -> bool:
    """Compare, passing over what is masked in the capture."""
    if captured == found:
        return False
    if b"*" not in captured or len(captured) != len(found):
        return True
    return any(mine not in (theirs, 42) for mine, theirs in zip(captured, found, strict=True))
