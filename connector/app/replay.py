"""`connector replay FILE --to URL`: a capture's requests, sent again, their answers compared.

Owns: the client, the order and the verdicts. In: argv, a capture. Out: a table; exit status 1 when an answer differs.
Never: sends a masked header (it is left out, and said); does two things at a time.

*Strategy*: deterministic: requests, WebSocket openings, messages and ends in the order of the capture, one after the
other, each when what it waited for then is there now: a request's answer, as many messages as came before it.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys
from typing import Any
from urllib.parse import urlsplit

from connector.app.replay_websocket import SECONDS, Conversation, Step, differs
from connector.errors import ConfigError, ConnectorError, UsageError
from connector.inspector.capture import CapturedStream, CaptureModel, read_capture
from connector.inspector.capture_commands import row_of
from connector.inspector.filters import parse_filter

MASK = "[redacted]"
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
    parser.add_argument("--mqtt-user", metavar="NAME", help="user name of every MQTT session")
    parser.add_argument("--mqtt-password-file", metavar="FILE", help="file with their password: captures mask it")
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
        self.user: str | None = args.mqtt_user
        self.password = _password(args.mqtt_password_file)
        self.extra: dict[str, str] = {}
        for text in args.header:
            name, colon, value = text.partition(":")
            if not colon:
                raise UsageError(f"--header {text!r}: not NAME: VALUE")
            self.extra[name.strip()] = value.strip()

    async def run(self, streams: list[CapturedStream]) -> int:
        import aiohttp  # noqa: PLC0415 - slow to import

        verdicts: dict[int, list[str]] = {}
        talks: dict[int, Conversation] = {}
        failures = (aiohttp.ClientError, TimeoutError, OSError)
        async with aiohttp.ClientSession(auto_decompress=True) as session:
            for number, step in _schedule(streams):
                stream = streams[number]
                if number in verdicts:
                    continue
                try:
                    if isinstance(step, Step):
                        await talks[number].send(step)
                    elif step == "end":
                        await talks[number].finish()
                        verdicts[number] = talks[number].problems
                    elif stream.open.get("kind") == "http":
                        verdicts[number] = await self._http(session, stream)
                    else:
                        talk = talks[number] = Conversation(stream, self.user, self.password)
                        await self._open(session, stream, talk)
                except aiohttp.WSServerHandshakeError as error:
                    expected = int(stream.head.get("status", 0))
                    same = error.status == expected
                    verdicts[number] = [] if same else [f"status {error.status} instead of {expected}"]
                except failures as error:
                    verdicts[number] = [f"{type(error).__name__}: {error}"]
                    if number in talks:
                        await talks[number].finish()
                if number in verdicts:
                    self._tell(stream, verdicts[number], talks.get(number))
        different = sum(bool(problems) for problems in verdicts.values())
        for stream in streams:
            if stream.open.get("kind") not in {"http", "websocket"}:
                print(f"{_name(stream)}: left out, {stream.open.get('kind')} streams cannot be sent again")
        print(f"{len(verdicts)} streams, {different} with another answer")
        return 1 if different else 0

    def _tell(self, stream: CapturedStream, problems: list[str], talk: Conversation | None) -> None:
        counts = ""
        if talk is not None:
            words = "packets" if talk.is_mqtt else "messages"
            counts = f" ({talk.sent} of {len(talk.steps)} sent, {len(talk.expected)} {words} expected)"
            for note in dict.fromkeys(talk.notes):
                print(f"      {note}")
        print(f"{_name(stream)}: {'; '.join(problems) if problems else 'same answer'}{counts}", flush=True)

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
        import aiohttp  # noqa: PLC0415 - slow to import
        from yarl import URL  # noqa: PLC0415 - aiohttp's own

        async with session.request(
            stream.open.get("method"), URL(self.base + str(stream.open.get("target")), encoded=True),
            headers=self._headers(stream), data=body or None, ssl=self.tls, allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=SECONDS),
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

    async def _open(self, session: Any, stream: CapturedStream, talk: Conversation) -> None:
        protocols = next(
            (value for name, value in stream.open.get("headers", []) if name.lower() == "sec-websocket-protocol"), ""
        )
        async with asyncio.timeout(SECONDS):
            await talk.open(
                session, self.base + str(stream.open.get("target")), self._headers(stream), self.tls,
                [part.strip() for part in protocols.split(",") if part.strip()],
            )  # fmt: skip


def _name(stream: CapturedStream) -> str:
    return f"{stream.open.get('id'):>5} {stream.open.get('method'):6} {stream.open.get('target')}"


def _schedule(streams: list[CapturedStream]) -> list[tuple[int, Step | str]]:
    """Return what is to be done in the order of the capture: (stream, "open" | a message | "end")."""
    found: list[tuple[int, float, int, int, Step | str]] = []
    for number, stream in enumerate(streams):
        kind, start = stream.open.get("kind"), float(stream.open.get("at", 0.0))
        if kind not in {"http", "websocket"}:
            continue
        found.append((stream.session, start, len(found), number, "open"))
        if kind == "websocket":
            steps = Conversation(stream, None, None).steps
            found += [(stream.session, step.at, len(found) + at, number, step) for at, step in enumerate(steps)]
            last = max(float(stream.end.get("at", 0.0)), start, *(step.at for step in steps))
            found.append((stream.session, last if stream.end else float("inf"), len(found), number, "end"))
    return [(number, step) for _, _, _, number, step in sorted(found, key=lambda entry: entry[:3])]


def _password(name: str | None) -> bytes | None:
    if name is None:
        return None
    try:
        with open(name, "rb") as file:
            return file.read(65_535).rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"--mqtt-password-file {name}: {error.strerror or error}") from None


def _compare_bodies(stream: CapturedStream, answer: bytes) -> list[str]:
    kept = stream.bodies[1]
    truncated = stream.body_fields[1].get("truncated")
    compared = answer[: len(kept)] if truncated else answer
    return ["another body"] if differs(kept, compared) else []
