"""Which transport to speak by the flag and the edge's TXT records, and what failures mean for the address.

Owns: edge-connection sections 7.1 to 7.3, and section 8.3's column about the address. In: flags, records, failures,
`now`. Out: values and log messages. Never: queries, logs, reads a clock. What `auto` does when the wish cannot be had
is `protocol_race.py`'s: it takes the place of section 7.4, which waits minutes.

*Strategy*: `Selector` is the process's wish, `AddressTrials` one connection's luck; both are values.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from enum import Enum
from typing import NamedTuple

from connector.errors import ConfigError, WireError
from connector.protocol.reconnect import ROTATES, Failure

PROTOCOL_RECORD = "protocol-v2.argotunnel.com"
FEATURE_RECORD = "cfd-features.argotunnel.com"
"""Names of the two TXT records."""

FEATURE_SECONDS = 10.0
"""Limit of the first look-up of the features."""

RECORD_SECONDS = 3600.0
"""Age at which either record is looked up again."""

RECORD_RETRY_SECONDS = 60.0
"""Pause after a failed look-up; cloudflared tries again at every attempt, which costs each one the resolver's time."""

ADDRESS_BUDGET = 8
"""Dials in a row that may reach nobody before the retry schedule begins anew. `--max-edge-addr-retries`."""

DATAGRAM_V2 = "support_datagram_v2"
DATAGRAM_V3 = "support_datagram_v3_2"


class Transport(Enum):
    """What an edge connection speaks."""

    QUIC = "quic"
    HTTP2 = "http2"


def fnv1a_32(data: bytes) -> int:
    """Hash `data`: FNV-1a, 32 bits."""
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def threshold(account_tag: str) -> int:
    """Give the account's place among 0..99: a percentage above it includes the account."""
    return fnv1a_32(account_tag.encode(errors="replace")) % 100


# -- the records ------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """One entry of the protocol record."""

    protocol: str
    percentage: int


def decode_protocol_record(record: bytes) -> tuple[Share, ...]:
    """Decode `[{"protocol":"quic","percentage":100}]`; names in lower case. Errors: WireError."""
    value = _json(record, PROTOCOL_RECORD)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _bad(PROTOCOL_RECORD, "it is not a list")
    shares = []
    for entry in value:
        members = _members(entry, PROTOCOL_RECORD)
        protocol = members.get("protocol")
        if protocol is not None and not isinstance(protocol, str):
            raise _bad(PROTOCOL_RECORD, "a protocol is not text")
        percentage = _integer(members.get("percentage"), -(2**31), 2**31 - 1, PROTOCOL_RECORD, "percentage")
        shares.append(Share((protocol or "").lower(), percentage))
    return tuple(shares)


def choose_by_share(shares: Iterable[Share], place: int) -> Transport:
    """Take the first of QUIC, HTTP/2 whose percentage is above the account's `place`; without one, QUIC."""
    first: dict[str, int] = {}
    for share in shares:
        first.setdefault(share.protocol, share.percentage)
    for transport in (Transport.QUIC, Transport.HTTP2):
        if first.get(transport.value, 0) > place:
            return transport
    return Transport.QUIC


class RemoteFeatures(NamedTuple):
    """The feature record. Its absence means the defaults."""

    datagram_v3_share: int = 0
    skip_prechecks: bool = False


def decode_feature_record(record: bytes) -> RemoteFeatures:
    """Decode `{"dv3_2":50,"skip_prechecks":false}`; missing keys are 0 and false. Errors: WireError."""
    members = _members(_json(record, FEATURE_RECORD), FEATURE_RECORD)
    skip = members.get("skip_prechecks")
    if skip is not None and not isinstance(skip, bool):
        raise _bad(FEATURE_RECORD, "skip_prechecks is not a boolean")
    return RemoteFeatures(_integer(members.get("dv3_2"), 0, 2**32 - 1, FEATURE_RECORD, "dv3_2"), bool(skip))


def datagram_version(features: Collection[str], record: RemoteFeatures, place: int) -> int:
    """Give 2 or 3: what `--features` says, else what the record says about the account at `place`."""
    if DATAGRAM_V3 in features:
        return 3
    if DATAGRAM_V2 in features:
        return 2
    return 3 if record.datagram_v3_share > place else 2


def _json(record: bytes, name: str) -> object:
    try:
        return json.loads(record.decode(errors="replace"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _bad(name, "it is not JSON") from None


def _no_constant(name: str) -> object:
    raise ValueError(name)


def _members(value: object, name: str) -> dict[str, object]:
    """Give an object's members by lower-case key; the last one counts, null counts as empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad(name, "an object was expected")
    return {str(key).lower(): member for key, member in value.items()}


def _integer(value: object, low: int, high: int, name: str, key: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(name, f"{key} is not an integer between {low} and {high}")
    return value


def _bad(name: str, what: str) -> WireError:
    return WireError(f"the TXT record {name} cannot be used: {what}")


# -- the process's wish -----------------------------------------------------------------------------------------------


class Selector(NamedTuple):
    """What connections should speak, and what they may fall back to."""

    current: Transport
    fallback: Transport | None = None
    refresh_at: float | None = None
    """When the protocol record should be looked up again; None when it does not matter."""
    guessed: bool = False
    """The record matters, but could not be had."""

    def refresh_due(self, now: float) -> bool:
        """Tell whether a look-up should precede the next use of `current`."""
        return self.refresh_at is not None and now >= self.refresh_at

    def refreshed(self, shares: Iterable[Share] | None, place: int, now: float) -> Selector:
        """Take a new record; None (the look-up failed) keeps the old choice and tries again soon."""
        if self.refresh_at is None:
            return self
        if shares is None:
            return self._replace(refresh_at=now + RECORD_RETRY_SECONDS)
        return self._replace(current=choose_by_share(shares, place), refresh_at=now + RECORD_SECONDS, guessed=False)


def select_protocol(
    flag: str, *, token_given: bool, shares: Iterable[Share] | None, place: int, now: float
) -> tuple[Selector, str]:
    """Give the selector for `--protocol flag`, and a warning to log ("" for none). Errors: ConfigError.

    `token_given`: the flag `token` is set, on the command line, by environment or in the file (a token *file* does not
    count). `shares` is the protocol record, None when it could not be had or decoded.
    """
    warning = "Unable to lookup protocol percentage." if shares is None else ""
    match flag:
        case "quic":
            return Selector(Transport.QUIC), warning
        case "http2":
            return Selector(Transport.HTTP2), warning
        case "h2mux":
            return Selector(Transport.HTTP2), "The protocol h2mux is gone; http2 is used in its place."
        case "auto" if token_given:
            return Selector(Transport.QUIC, Transport.HTTP2), warning
        case "auto":
            # cloudflared starts on HTTP/2 when the record cannot be had; its refresh then finds the way to QUIC.
            current = Transport.HTTP2 if shares is None else choose_by_share(shares, place)
            pause = RECORD_RETRY_SECONDS if shares is None else RECORD_SECONDS
            return Selector(current, Transport.HTTP2, now + pause, guessed=shares is None), warning
        case _:
            raise ConfigError(
                f"unknown protocol {flag}, --protocol cannot be that", advice="Allowed: auto, quic, http2."
            )


# -- one connection's addresses ---------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """What a failed attempt means for the address (edge-connection section 8.3)."""

    rotate: bool
    unreachable: bool
    """The address did not answer: give it back as such."""
    start_over: bool = False
    """The address budget is used up: the retry schedule begins anew."""


class AddressTrials(NamedTuple):
    """What one connection remembers of the addresses that it tried."""

    failures: int = 0
    """Dials in a row that reached nobody, since the last registration or since the budget was used up."""

    def registered(self) -> AddressTrials:
        """Give the state after a successful registration."""
        return AddressTrials()

    def failed(self, failure: Failure, *, budget: int = ADDRESS_BUDGET) -> tuple[AddressTrials, Effect]:
        """Answer a failure, before the wait: which address next?"""
        if failure is Failure.DIAL:
            used_up = self.failures >= max(budget, 0)
            return AddressTrials(0 if used_up else self.failures + 1), Effect(True, True, used_up)
        return self, Effect(rotate=failure in ROTATES, unreachable=False)
