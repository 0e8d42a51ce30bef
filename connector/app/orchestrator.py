"""Which configuration is in force: the version rules, and the answers to the edge's pushes.

Owns: the applied version; the swap of the ingress rules. In: push bodies (untrusted JSON). Out: JSON replies.
Never: touches requests in flight (they finish on the rules they started with); does I/O.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Iterable
from itertools import chain
from typing import Any, Protocol

from connector.app.config import RunConfig
from connector.app.logs import Logger
from connector.errors import ConnectorError, WireError
from connector.proxy.ingress import LOCAL_VERSION, USUAL, Ingress, OriginSettings, parse_remote_config
from connector.proxy.ingress_diff import describe_changes
from connector.proxy.ingress_report import local_report

_REPORTED = (
    "autoupdate-freq", "no-autoupdate", "retries", "protocol", "loglevel", "transport-loglevel", "origincert",
    "metrics", "metrics-update-freq", "edge-ip-version", "edge-bind-address", "max-active-flows",
)  # fmt: skip
"""Flags that the edge is told of."""

_INT32 = range(-(2**31), 2**31)


class IngressHolder(Protocol):
    """The part of the dispatcher that the orchestrator uses."""

    @property
    def ingress(self) -> Ingress:
        """The rules in force."""

    def set_ingress(self, ingress: Ingress) -> tuple[str, ...]:
        """Put new rules in force for new requests; return what of them may not work."""


class Orchestrator:
    """One per process, shared by all edge connections. Calls are synchronous, so updates are serialised."""

    __slots__ = ("_base", "_holder", "_log", "_shut", "fixed", "version")

    def __init__(self, holder: IngressHolder, log: Logger, base: OriginSettings = USUAL) -> None:
        self._base = base
        self._holder = holder
        self._log = log
        self._shut = False
        self.version = LOCAL_VERSION
        self.fixed = False
        """The rules are the program's own: the edge's are refused."""

    def on_configuration(self, body: bytes) -> bytes:
        """Answer one push: `{"version":7,"config":{...}}` to `{"lastAppliedVersion":7,"err":null}`.

        WireError when the body is no such object; the transport answers 502 then.
        """
        version, config = self.read_push(body)
        error_text = self.apply(version, config)
        return encode_answer(self.version, error_text)

    def on_rpc(self, version: int, config: bytes) -> tuple[int, str] | Awaitable[tuple[int, str]]:
        """Answer a push over an RPC stream: the version in force, and an error's text."""
        try:
            parsed = json.loads(config)
        except (ValueError, RecursionError) as error:
            return self.version, f"the configuration is not JSON: {error}"
        text = self.apply(version, parsed)
        return self.version, text or ""

    def read_push(self, body: bytes) -> tuple[int, Any]:
        """Give version and configuration of a push over HTTP/2. Errors: WireError."""
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            self._log.error("The edge pushed a configuration that is not JSON", error=str(error))
            raise WireError("configuration push is not JSON") from None
        folded = _folded(message)
        version = folded.get("version")
        if version is None:
            version = 0  # as Go reads a missing or null number
        if not isinstance(version, int) or isinstance(version, bool) or version not in _INT32:
            self._log.error("The edge pushed a configuration without a usable version", error=f"version {version!r}")
            raise WireError("configuration push has no usable version")
        return version, folded.get("config")

    def apply(self, version: int, config: Any) -> str | None:
        """Put `config` in force if `version` is news. Gives the error's text, or None; then see `version`."""
        if not self._is_news(version):
            return self._refusal()
        text = json.dumps(config, separators=(",", ":"), ensure_ascii=False)
        try:
            ingress = parse_remote_config(version, config, self._base)
            doubts = self._holder.set_ingress(ingress)
        except Exception as error:  # The edge can push anything; a bug in a parser must not end the process.
            return self._failed(error, version, text)
        self._updated(version, text)
        self.warn(ingress.warnings, doubts)
        return None

    def _is_news(self, version: int) -> bool:
        """Whether a push of this version is to be put in force."""
        if self._shut or self.fixed:
            return False
        if version <= self.version:
            self._log.debug("Configuration is not newer than ours", version=version, current=self.version)
            return False
        return True

    def _refusal(self) -> str | None:
        """Give what is said of a push that is no news."""
        if self._shut:
            return "connector already shut down"
        if self.fixed:
            return "this connector's rules are in its program, which takes none from elsewhere"
        return None

    def _failed(self, error: Exception, version: int, text: str) -> str:
        """Report a configuration that could not be put in force; give what the edge is told."""
        if not isinstance(error, ConnectorError):
            self._log.bug("Failed to update configuration; the old one stays", error)
            return f"internal error: {type(error).__name__}"
        advice = {"advice": error.advice} if error.advice else {}
        self._log.error(
            "Failed to update configuration; the old one stays",
            error=str(error),
            version=version,
            config=text,
            **advice,
        )
        return str(error) or "invalid configuration"

    def _updated(self, version: int, text: str) -> None:
        self.version = version
        self._log.info("Updated to new configuration", version=version, config=text)

    def apply_local(self, ingress: Ingress) -> list[str] | None:
        """Put the rules of a local file in force and give the changes; None while rules of the edge are in force.

        Errors: ConfigError when an origin cannot start; the old rules stay then.
        """
        if self.version > LOCAL_VERSION or self._shut:
            return None
        changes = describe_changes(self._holder.ingress, ingress)
        doubts = self._holder.set_ingress(ingress)  # also without changes: files that rules name may have changed
        self.warn(doubts)
        return changes

    def warn(self, *texts: Iterable[str]) -> None:
        """Say what is in force although it cannot work."""
        for text in chain(*texts):
            self._log.warn(f"Configuration: {text}")

    def local_configuration(self, config: RunConfig) -> bytes:
        """Give what updateLocalConfiguration reports for a tunnel that is not remotely managed."""
        flags = {name: config.settings[name] for name in _REPORTED if config.settings.get(name)}
        return json.dumps(local_report(self._holder.ingress, flags), separators=(",", ":")).encode()

    def shut(self) -> None:
        """Refuse everything from now on: the process ends."""
        self._shut = True


def encode_answer(version: int, error_text: str | None) -> bytes:
    """Give the answer to a push over HTTP/2."""
    return json.dumps({"lastAppliedVersion": version, "err": error_text}, separators=(",", ":")).encode()


def _folded(message: Any) -> dict[str, Any]:
    """Give the object with lower-case keys (Go matches names without case); empty for anything but an object."""
    if not isinstance(message, dict):
        raise WireError("configuration push is no JSON object")
    return {str(key).lower(): value for key, value in message.items()}
