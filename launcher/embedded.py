"""The stand-in broker where Mosquitto cannot be had: amqtt, with the same users and rules.

Owns: one amqtt broker with two listeners on 127.0.0.1, its log lines in Mosquitto's words.
In: `python -m launcher.embedded DIRECTORY MQTT_PORT WS_PORT`; `passwords` and `acl` in DIRECTORY, as Mosquitto reads
    them. Out: log lines on standard output; exit status 1 with a reason on standard error.
Never: allows anonymous clients; sees a password other than the one a client sends; speaks MQTT 5.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.credentials import topic_matches, verify_password

try:
    from amqtt.broker import Broker
    from amqtt.plugins.base import BaseAuthPlugin, BasePlugin, BaseTopicPlugin
except ImportError:  # told by main()
    Broker = None
    BaseAuthPlugin = BasePlugin = BaseTopicPlugin = object

MAX_CONNECTIONS = 100


def available() -> bool:
    """Whether amqtt is installed."""
    return Broker is not None


def read_passwords(directory: Path) -> dict[str, str]:
    """User name to `$7$` field."""
    lines = (directory / "passwords").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def read_acl(directory: Path) -> dict[str, list[str]]:
    """User name to the filters it may read and write."""
    rules: dict[str, list[str]] = {}
    user = ""
    for line in (directory / "acl").read_text(encoding="utf-8").splitlines():
        if line.startswith("user "):
            user = line.removeprefix("user ")
        elif line.startswith("topic readwrite "):
            rules.setdefault(user, []).append(line.removeprefix("topic readwrite "))
    return rules


def say(line: str) -> None:
    """One log line, at once."""
    print(line, flush=True)


class Users(BaseAuthPlugin):  # type: ignore[misc]
    """Authentication against the password file."""

    @dataclass
    class Config:
        """Where the files are."""

        directory: str = "."

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._passwords = read_passwords(Path(self.config.directory))

    async def authenticate(self, *, session: Any) -> bool:
        """Whether name and password belong together; False without a name."""
        hashed = self._passwords.get(session.username or "")
        good = hashed is not None and session.password is not None and verify_password(session.password, hashed)
        if not good:
            say(f"Client {session.client_id} refused: bad user name or password (u{session.username!r})")
        return good


class Rules(BaseTopicPlugin):  # type: ignore[misc]
    """Topic rules from the ACL file."""

    @dataclass
    class Config:
        """Where the files are."""

        directory: str = "."

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._rules = read_acl(Path(self.config.directory))

    async def topic_filtering(self, *, session: Any = None, topic: str | None = None, action: Any = None) -> bool:
        """Whether the session's user may use `topic`."""
        allowed = self._rules.get(session.username or "", []) if session is not None else []
        return topic is not None and any(topic_matches(pattern, topic) for pattern in allowed)


class Narrator(BasePlugin):  # type: ignore[misc]
    """Tells what happens in the words of Mosquitto's log, which the live view reads."""

    async def on_broker_client_connected(self, *, client_id: str, client_session: Any = None) -> None:
        """Say who came."""
        where, user = "?", "?"
        if client_session is not None:
            where = f"{client_session.remote_address}:{client_session.remote_port}"
            user = client_session.username
        say(f"New client connected from {where} as {client_id} (p2, c1, k60, u'{user}').")

    async def on_broker_client_disconnected(self, *, client_id: str, client_session: Any = None) -> None:
        """Say who went."""
        say(f"Client {client_id} disconnected.")

    async def on_broker_client_subscribed(self, *, client_id: str, topic: str, qos: int) -> None:
        """Say who listens to what."""
        say(f"{client_id} {qos} {topic}")

    async def on_broker_message_received(self, *, client_id: str, message: Any) -> None:
        """Say which message came; never its payload."""
        size = len(message.data)
        say(f"Received PUBLISH from {client_id} (d0, q{message.qos}, r0, m0, '{message.topic}', ... ({size} bytes))")


def configuration(directory: Path, mqtt_port: int, ws_port: int) -> dict[str, Any]:
    """What amqtt is started with."""
    files = {"directory": str(directory)}
    return {
        "listeners": {
            "default": {"type": "tcp", "bind": f"127.0.0.1:{mqtt_port}", "max_connections": MAX_CONNECTIONS},
            "ws": {"type": "ws", "bind": f"127.0.0.1:{ws_port}", "max_connections": MAX_CONNECTIONS},
        },
        "plugins": {
            "launcher.embedded.Users": files,
            "launcher.embedded.Rules": files,
            "launcher.embedded.Narrator": {},
        },
    }


async def serve(directory: Path, mqtt_port: int, ws_port: int) -> None:
    """Run the broker until SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    broker = Broker(configuration(directory, mqtt_port, ws_port))
    await broker.start()
    say("amqtt running")
    await stop.wait()
    await broker.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m launcher.embedded`."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 3:
        print("usage: python -m launcher.embedded DIRECTORY MQTT_PORT WS_PORT", file=sys.stderr)
        return 2
    if not available():
        print("amqtt is not installed: pip install 'amqtt>=0.11,<0.13'", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    logging.getLogger("transitions").setLevel(logging.CRITICAL)
    try:
        asyncio.run(serve(Path(arguments[0]), int(arguments[1]), int(arguments[2])))
    except Exception as error:  # whatever amqtt raises ends here as one line
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
