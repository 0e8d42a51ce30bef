"""Cap'n Proto RPC to the edge: registration over the control stream.

Owns: the schemas as pycapnp modules, the RPC client of one control stream, what its answers mean as errors.
In: a SocketBridge (the link's control stream). Out: ConnectionDetails; a RegistrationError subclass for what the edge
answered; EdgeLostError when it did not answer.
Never: retries, logs, or shows a secret in an error.

pycapnp runs inside a KJ event loop that is tied to the asyncio loop. The program enters it once, around everything that
may touch RPC, and leaves it after the last client is closed:

    async with capnp.kj_loop():
        ...

What pycapnp wants, and this module does: values are copied out of a response at once (a response that lives on keeps
its question open); every promise is awaited or dropped, never left with a stored exception; the client goes first, then
its stream, then a loop turn for KJ to write what the closing caused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import platform
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import capnp

import connector
from connector.errors import (
    ConnectorError,
    DuplicateConnectionError,
    EdgeLostError,
    RegistrationError,
    UnauthorizedError,
)
from connector.protocol.counts import COUNTS
from connector.transport.bridge import SocketBridge
from connector.wire.capnp import NESTING, TRAVERSAL_WORDS
from connector.wire.token import Token

__all__ = ["ConnectionDetails", "ConnectionOptions", "RegistrationClient", "SocketBridge", "load_schema"]

T = TypeVar("T")

capnp.remove_import_hook()  # it looks for *.capnp on every import of anything

CLOSE_SECONDS = 2.0
"""How long `close` waits for the last messages to leave pycapnp. They leave within a loop turn or two."""

KJ_TURNS = 3
"""Loop turns after which a new pycapnp client surely reads its socket; one is enough in practice. Bytes of the edge may
arrive there only then: see SocketBridge."""

_REMOTE = "remote exception: "  # what pycapnp puts before the peer's own words

RESPONSE_TEXT_LIMIT = 300
"""Characters of an edge's error text that go into ours. Real ones have under 100."""

ABORT_SHUTDOWN = bytes.fromhex(
    "0000000008000000" "0000000001000100" "0100000000000000" "0000000001000200"
    "0000000000000000" "0500000072000000" "0000000000000000" "7270633a20736875" "74646f776e000000"
)  # fmt: skip
"""The last message of a client that closes: abort with reason `rpc: shutdown` (proto/README.md paragraph 3)."""

_METHODS = {
    "registration": "register_connection",
    "unregistration": "unregister_connection",
    "the local configuration": "update_local_configuration",
}
"""What the errors here call a method, and what the metrics call it."""

ALREADY_CONNECTED = "already connected to this server, trying another address"


@cache
def load_schema(name: str) -> Any:
    """Return the pycapnp module of `proto/<name>.capnp`, from a checkout as well as from an installed package."""
    file = name if name.endswith(".capnp") else f"{name}.capnp"
    package = os.path.dirname(connector.__file__)
    for path in (os.path.join(package, "_schemas", file), os.path.join(os.path.dirname(package), "proto", file)):
        if os.path.isfile(path):
            return capnp.load(path, imports=[])
    raise FileNotFoundError(f"no schema {file}: neither in the package nor in proto/ beside it")


class ConnectionDetails:
    """What the edge says of an accepted connection. `location` is the colo."""

    __slots__ = ("location", "remotely_managed", "uuid")

    def __init__(self, connection: uuid.UUID, location: str, remotely_managed: bool) -> None:
        self.uuid = connection
        self.location = location
        self.remotely_managed = remotely_managed

    def __repr__(self) -> str:
        return f"<ConnectionDetails {self.uuid} {self.location} remotely_managed={self.remotely_managed}>"


class ConnectionOptions:
    """What the connector says of itself at registration.

    `features` only names what this connector can do. `origin_local_ip` is the link's local address, None or unusable
    text when unknown. `version` is the program's own.
    """

    __slots__ = ("arch", "client_id", "features", "num_previous_attempts", "origin_local_ip", "version")

    def __init__(
        self,
        *,
        client_id: uuid.UUID,
        features: Sequence[str] = (),
        origin_local_ip: str | None = None,
        num_previous_attempts: int = 0,
        version: str = connector.__version__,
        arch: str | None = None,
    ) -> None:
        self.client_id = client_id
        self.features = tuple(dict.fromkeys(features))
        self.origin_local_ip = origin_local_ip
        self.num_previous_attempts = num_previous_attempts
        self.version = version
        self.arch = arch if arch is not None else go_arch()

    def as_fields(self) -> dict[str, Any]:
        """The value of `ConnectionOptions` as pycapnp takes it."""
        fields: dict[str, Any] = {
            "client": {
                "clientId": self.client_id.bytes,
                "features": list(self.features),
                "version": self.version,
                "arch": self.arch,
            },
            "replaceExisting": False,
            "compressionQuality": 0,
            "numPreviousAttempts": min(max(self.num_previous_attempts, 0), 255),
        }
        address = address_bytes(self.origin_local_ip)
        if address is not None:
            fields["originLocalIp"] = address
        return fields


_GO_SYSTEMS = {"win32": "windows", "cygwin": "windows"}
_GO_MACHINES = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "aarch64": "arm64",
    "arm64": "arm64",
    "i386": "386",
    "i586": "386",
    "i686": "386",
    "x86": "386",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}


def go_arch(system: str | None = None, machine: str | None = None) -> str:
    """Return `<os>_<arch>` in Go's names, such as `linux_amd64`."""
    system = sys.platform if system is None else system
    machine = (platform.machine() if machine is None else machine).lower()
    arch = "arm" if machine.startswith("armv") else _GO_MACHINES.get(machine, machine or "unknown")
    return f"{_GO_SYSTEMS.get(system, system)}_{arch}"


def address_bytes(text: str | None) -> bytes | None:
    """Return the 16-byte form of an IP address; None when it has none (unknown, a name, IPv6 with a zone)."""
    if not text or "%" in text:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


class RegistrationClient:
    """The RPC client of one control stream. Use as `async with`, inside `capnp.kj_loop()`; one call at a time."""

    def __init__(self, control_stream: SocketBridge) -> None:
        self._bridge = control_stream
        self._stream: Any = None
        self._client: Any = None
        self._server: Any = None

    async def __aenter__(self) -> RegistrationClient:
        bridge = self._bridge
        try:
            self._stream = await capnp.AsyncIoStream.create_connection(sock=bridge.take_socket())
            self._client = capnp.TwoPartyClient(
                self._stream, traversal_limit_in_words=TRAVERSAL_WORDS, nesting_limit=NESTING
            )
            # Not awaited: calls are pipelined on the promise of the bootstrap object.
            self._server = self._client.bootstrap().cast_as(load_schema("tunnelrpc").RegistrationServer)
            for _ in range(KJ_TURNS):
                await asyncio.sleep(0)
            bridge.release()
        except BaseException:
            self._let_go()
            bridge.close()
            raise
        bridge.farewell = ABORT_SHUTDOWN
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def register(
        self, auth: Token, conn_index: int, options: ConnectionOptions, timeout: float
    ) -> ConnectionDetails:
        """Register the connection. Errors: RegistrationError and its subclasses, after the edge's own words;
        EdgeLostError when there is no answer.
        """
        return await self._call(
            "registration",
            lambda server: server.registerConnection(
                auth={"accountTag": auth.account_tag, "tunnelSecret": auth.secret},
                tunnelId=auth.tunnel_id.bytes,
                connIndex=conn_index,
                options=options.as_fields(),
            ),
            timeout,
            _read_response,
        )

    async def unregister(self, timeout: float) -> None:
        """Ask the edge to send nothing new. Errors: as of `register`."""
        await self._call("unregistration", lambda server: server.unregisterConnection(), timeout, _nothing)

    async def update_local_configuration(self, config: bytes, timeout: float) -> None:
        """Tell the edge the configuration of a locally managed tunnel, as JSON. Errors: as of `register`."""
        await self._call(
            "the local configuration",
            lambda server: server.updateLocalConfiguration(config=config),
            timeout,
            _nothing,
        )

    async def close(self) -> None:
        """Release what the edge gave, say `rpc: shutdown`, end the stream. Idempotent; no error."""
        if self._client is None:
            return
        try:
            self._server = None  # the last reference: sends the release
            for _ in range(3):
                await asyncio.sleep(0)  # KJ writes in a turn of its own
            self._let_go()
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.shield(self._bridge.ended)
        except TimeoutError:
            pass
        finally:
            self._let_go()
            self._bridge.close()

    def _let_go(self) -> None:
        self._server = None
        client, self._client = self._client, None
        if client is not None:
            client.close()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    async def _call(
        self, what: str, send: Callable[[Any], Awaitable[Any]], timeout: float, read: Callable[[Any], T]
    ) -> T:
        if self._server is None:
            raise RegistrationError(f"{what}: the RPC client is closed")
        method = _METHODS[what]
        COUNTS.add("cloudflared_rpc_client_operations", "registration", method)
        began = asyncio.get_running_loop().time()
        try:
            result = await self._ask(what, send, timeout, read)
        except ConnectorError:
            COUNTS.add("cloudflared_rpc_client_failures", "registration", method)
            raise
        finally:
            seconds = asyncio.get_running_loop().time() - began
            COUNTS.observe("cloudflared_rpc_client_latency_secs", seconds, "registration", method)
        return result

    async def _ask(
        self, what: str, send: Callable[[Any], Awaitable[Any]], timeout: float, read: Callable[[Any], T]
    ) -> T:
        try:
            async with asyncio.timeout(timeout):
                return read(await send(self._server))
        except ConnectorError:
            raise
        except TimeoutError:
            raise EdgeLostError(
                f"{what}: the edge did not answer within {timeout:g} seconds",
                advice="The edge is overloaded or the way to it is bad; --rpc-timeout gives it longer.",
            ) from None
        except UnicodeDecodeError:
            raise RegistrationError(f"{what}: the edge's answer holds text that is not UTF-8") from None
        except Exception as error:  # KjException, or what pycapnp makes of one
            raise self._explain(what, error) from None

    def _explain(self, what: str, error: Exception) -> ConnectorError:
        given_up = self._bridge.error
        if given_up is not None:
            advice = getattr(given_up, "advice", "")
            return EdgeLostError(f"{what}: the control stream ended: {given_up}", advice=advice)
        raw = str(getattr(error, "description", None) or error or type(error).__name__)
        text = _clean(raw)
        if getattr(error, "type", None) == "DISCONNECTED":
            if raw.startswith(_REMOTE):
                return RegistrationError(f"{what}: rpc: aborted by remote: {text}")
            if raw != "Peer disconnected.":
                return EdgeLostError(f"{what}: the edge's bytes on the control stream are no RPC: {text}")
            return EdgeLostError(
                f"{what}: the edge closed the control stream without an answer",
                advice="The edge may be restarting; the connection is made again.",
            )
        return RegistrationError(f"{what}: rpc exception: {text.rstrip()}")


def _nothing(response: Any) -> None:
    """Take an empty result."""


def _read_response(response: Any) -> ConnectionDetails:
    """Turn a ConnectionResponse into details. Errors: RegistrationError and subclasses."""
    result = response.result.result
    try:
        which = str(result.which())
    except Exception:
        which = "unknown"
    if which == "connectionDetails":
        details = result.connectionDetails
        raw = bytes(details.uuid)
        if len(raw) != 16:
            raise RegistrationError(f"registration: the edge's connection ID has {len(raw)} bytes instead of 16")
        return ConnectionDetails(uuid.UUID(bytes=raw), str(details.locationName), bool(details.tunnelIsRemotelyManaged))
    if which != "error":
        raise RegistrationError(
            "registration: the edge answered in a form that this version does not know",
            advice="Update the connector.",
        )
    error = result.error
    raise _refusal(_clean(str(error.cause)), bool(error.shouldRetry), max(0, int(error.retryAfter)) / 1e9)


def _refusal(cause: str, should_retry: bool, retry_after: float) -> RegistrationError:
    if cause == "EDUPCONN":
        return DuplicateConnectionError(ALREADY_CONNECTED, should_retry=should_retry, retry_after=retry_after)
    if "Unauthorized" in cause:
        return UnauthorizedError(
            cause,
            should_retry=should_retry,
            retry_after=retry_after,
            advice="Check that the token is the tunnel's current one; a new tunnel may take a moment to be known.",
        )
    return RegistrationError(
        cause or "the edge refused the registration and gave no cause",
        should_retry=should_retry,
        retry_after=retry_after,
    )


def _clean(text: str) -> str:
    """Shorten and flatten a peer's text for one log line."""
    text = text.removeprefix(_REMOTE)
    text = "".join(char if char.isprintable() else " " for char in text)
    if len(text) <= RESPONSE_TEXT_LIMIT:
        return text
    half = RESPONSE_TEXT_LIMIT // 2  # of a traceback the end tells most
    return f"{text[:half]} ... {text[-half:]}"
