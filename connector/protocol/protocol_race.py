"""How `auto` finds the transport that works here, quickly: a race at start, and what the process learns about QUIC.

Owns: the race between QUIC and HTTP/2 for one dial, the verdict whether QUIC works on this network, when to probe it,
when a connection returns to it, and the reason in words. In: what happened, `now`, `random` in [0, 1). Out: the next
state and commands. Never: dials, logs, reads a clock.

*Strategy*: two values. `Race` lives for one dial, `QuicPath` as long as the process. While QUIC is not known to be
blocked every dial of `auto` is a race, so an attempt never waits for QUIC longer than the head start. Once QUIC is
blocked, dials go straight to HTTP/2 and only the background probe touches QUIC.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from connector.protocol.protocol_choice import Selector, Transport

HEAD_START = 0.3
"""Seconds that QUIC has alone. A round trip around the world is shorter; RFC 8305 takes 250 ms between families."""

STALL_SECONDS = 3.0
"""Seconds after which an answered QUIC handshake that is not done gets company: its large packets may be lost."""

BLOCKED_AFTER = 2
"""Dials in a row that failed over QUIC while HTTP/2 came up. One may be a lost packet; two are hardly chance."""

LOSSES_LIMIT = 3
LOSSES_WINDOW = 600.0
"""This many lost paths within so many seconds, and QUIC counts as not working here: flaps cost more than TCP does."""

SAME_EVENT = 10.0
"""Paths lost within so many seconds of each other count once: all connections of a process share one network."""

PROBE_SECONDS = 30.0
MAX_PROBE_SECONDS = 600.0
"""Pauses between probes double from the first to the second, each drawn from its upper half."""

SETTLE_SECONDS = 60.0
MAX_SETTLE_SECONDS = 3600.0
"""How long probes must succeed before connections return, doubled for every time that QUIC broke again."""

RETURN_SECONDS = 30.0
"""Pause between two connections' return, so that the others carry the traffic and a relapse costs one."""


class Reason(Enum):
    """Why a connection ended or QUIC is not used. The value is the metric's label; `text` is for people."""

    UDP_BLOCKED = "udp_blocked"
    UDP_FORBIDDEN = "udp_forbidden"
    UNREACHABLE = "edge_unreachable"
    HANDSHAKE = "handshake_failed"
    PATH_LOST = "path_lost"
    EDGE_CLOSED = "edge_closed"

    def text(self, port: int = 7844) -> str:
        """Say it in words, for a log line and /ready."""
        return _TEXTS[self].format(port=port)


_TEXTS = {
    Reason.UDP_BLOCKED: "UDP {port} blocked",
    Reason.UDP_FORBIDDEN: "this system does not permit UDP {port}",
    Reason.UNREACHABLE: "edge unreachable on port {port}",
    Reason.HANDSHAKE: "the edge answered, but the handshake failed",
    Reason.PATH_LOST: "path lost",
    Reason.EDGE_CLOSED: "edge closed",
}


def explain(
    transport: Transport, *, up: bool, heard: bool, closed_by_edge: bool, forbidden: bool, other_up: bool
) -> Reason:
    """Name the reason of one ended connection or failed dial.

    `up`: the handshake was done; `heard`: any packet came back; `closed_by_edge`: the peer said goodbye, by a close
    frame, GOAWAY or FIN; `forbidden`: the system refused to send (EPERM); `other_up`: the other transport works towards
    the same edge, which is what tells a blocked UDP port from a dead network.
    """
    if up:
        return Reason.EDGE_CLOSED if closed_by_edge else Reason.PATH_LOST
    if forbidden and transport is Transport.QUIC:
        return Reason.UDP_FORBIDDEN
    if heard:
        return Reason.HANDSHAKE
    return Reason.UDP_BLOCKED if transport is Transport.QUIC and other_up else Reason.UNREACHABLE


# -- one dial ---------------------------------------------------------------------------------------------------------


class Leg(Enum):
    """Where one transport stands in a race."""

    WAITING = "waiting"
    DIALLING = "dialling"
    HEARD = "heard"
    """A packet came back; the handshake is not done."""
    UP = "up"
    FAILED = "failed"


class Order(Enum):
    """What the owner of a race must do."""

    DIAL = "dial"
    USE = "use"
    """The race is over: register over this transport."""
    CALL_OFF = "call off"
    """Abort this dial, or close this link: the other one won."""
    GIVE_UP = "give up"
    """The race is over and both failed. The transport is the one whose error to report: the one that got further."""


class Command(NamedTuple):
    """One order for one transport."""

    order: Order
    transport: Transport


class Race(NamedTuple):
    """One dial of `auto`: QUIC first, HTTP/2 after the head start. Make it with `start_race`."""

    started_at: float
    company_at: float | None
    """When HTTP/2 joins; None once it did or need not."""
    quic: Leg = Leg.DIALLING
    http2: Leg = Leg.WAITING
    winner: Transport | None = None
    over: bool = False
    quic_heard: bool = False
    """Whether any packet came back over QUIC; goes into `explain` when HTTP/2 won."""

    def next_timeout(self) -> float | None:
        """Tell when to call `timed_out`."""
        return None if self.over else self.company_at

    def timed_out(self, now: float) -> tuple[Race, tuple[Command, ...]]:
        """Let HTTP/2 join, if its time has come."""
        if self.over or self.company_at is None or now < self.company_at:
            return self, ()
        return self._company()

    def heard(self, transport: Transport, now: float) -> tuple[Race, tuple[Command, ...]]:
        """Note the first packet from the edge: QUIC gets the time that its handshake needs."""
        if self.over or self._leg(transport) is not Leg.DIALLING:
            return self, ()
        race = self._with(transport, Leg.HEARD)
        if transport is Transport.QUIC and race.http2 is Leg.WAITING:
            race = race._replace(company_at=max(now, race.started_at + STALL_SECONDS))
        return race._replace(quic_heard=race.quic_heard or transport is Transport.QUIC), ()

    def up(self, transport: Transport) -> tuple[Race, tuple[Command, ...]]:
        """Note a finished handshake: the first one wins. A late one is called off."""
        if self.over:
            return self, () if self.winner is transport else (Command(Order.CALL_OFF, transport),)
        if self._leg(transport) not in {Leg.DIALLING, Leg.HEARD}:
            return self, ()
        other = _OTHER[transport]
        race = self._with(transport, Leg.UP)._replace(winner=transport, over=True, company_at=None)
        if race._leg(other) in {Leg.DIALLING, Leg.HEARD}:
            return race, (Command(Order.USE, transport), Command(Order.CALL_OFF, other))
        return race, (Command(Order.USE, transport),)

    def failed(self, transport: Transport) -> tuple[Race, tuple[Command, ...]]:
        """Note a failed dial: HTTP/2 joins at once, or, when both failed, the race is lost."""
        if self.over or self._leg(transport) not in {Leg.DIALLING, Leg.HEARD}:
            return self, ()
        got_further = self._leg(transport) is Leg.HEARD
        race = self._with(transport, Leg.FAILED)
        if race.http2 is Leg.WAITING:
            return race._company()
        if race._leg(_OTHER[transport]) is not Leg.FAILED:
            return race, ()
        # HTTP/2's error says more than QUIC's silence does.
        told = transport if got_further else Transport.HTTP2
        return race._replace(over=True, company_at=None), (Command(Order.GIVE_UP, told),)

    def _company(self) -> tuple[Race, tuple[Command, ...]]:
        return self._replace(http2=Leg.DIALLING, company_at=None), (Command(Order.DIAL, Transport.HTTP2),)

    def _leg(self, transport: Transport) -> Leg:
        return self.quic if transport is Transport.QUIC else self.http2

    def _with(self, transport: Transport, leg: Leg) -> Race:
        return self._replace(quic=leg) if transport is Transport.QUIC else self._replace(http2=leg)


_OTHER = {Transport.QUIC: Transport.HTTP2, Transport.HTTP2: Transport.QUIC}


def start_race(now: float, head_start: float = HEAD_START) -> tuple[Race, tuple[Command, ...]]:
    """Begin: QUIC dials."""
    return Race(now, now + head_start), (Command(Order.DIAL, Transport.QUIC),)


# -- what the process knows about QUIC --------------------------------------------------------------------------------


class PathStatus(Enum):
    """What the process thinks of QUIC on the present network."""

    UNKNOWN = "unknown"
    WORKING = "working"
    BLOCKED = "blocked"
    SETTLING = "settling"
    """It works again, but has to prove it before connections return."""


class DialPlan(Enum):
    """How the next dial goes."""

    QUIC = "quic"
    HTTP2 = "http2"
    RACE = "race"


class QuicPath(NamedTuple):
    """The process's verdict on QUIC. Only `auto` needs one."""

    status: PathStatus = PathStatus.UNKNOWN
    reason: Reason | None = None
    """Why it is BLOCKED, or was until it began SETTLING."""
    misses: int = 0
    """Dials in a row that failed over QUIC and succeeded over HTTP/2."""
    losses: tuple[float, ...] = ()
    """When paths were lost lately; at most LOSSES_LIMIT entries."""
    probes: int = 0
    """Failed probes in a row."""
    probe_at: float | None = None
    setbacks: int = 0
    """How often QUIC broke after it had worked."""
    settled_at: float = 0.0
    http2_misses: int = 0
    """Dials in a row that failed over HTTP/2 while QUIC was BLOCKED."""

    def plan(self, selector: Selector) -> DialPlan:
        """Tell how to dial: a wish without fall-back is followed, `auto` races unless QUIC is blocked.

        The edge's protocol record may wish for HTTP/2; a record that could not be had wishes for nothing.
        """
        if selector.fallback is None or (selector.current is Transport.HTTP2 and not selector.guessed):
            return DialPlan(selector.current.value)
        alone = self.status is PathStatus.BLOCKED and self.http2_misses < BLOCKED_AFTER
        return DialPlan.HTTP2 if alone else DialPlan.RACE

    def http2_dialled(self, up: bool) -> QuicPath:
        """Note the outcome of a dial over HTTP/2 alone: while it fails too, dials are races again."""
        if self.status is not PathStatus.BLOCKED:
            return self
        return self._replace(http2_misses=0 if up else self.http2_misses + 1)

    def answered(self, now: float) -> QuicPath:
        """Note a QUIC handshake that was done, by a connection or a probe."""
        match self.status:
            case PathStatus.BLOCKED:
                pause = min(SETTLE_SECONDS * 2 ** min(self.setbacks, 10), MAX_SETTLE_SECONDS)
                return self._replace(
                    status=PathStatus.SETTLING,
                    misses=0,
                    http2_misses=0,
                    probes=0,
                    settled_at=now + pause,
                    probe_at=now + pause / 2,
                )
            case PathStatus.SETTLING if now >= self.settled_at:
                return self._replace(status=PathStatus.WORKING, reason=None, misses=0, probe_at=None, losses=())
            case PathStatus.SETTLING:
                probe_at = min(now + PROBE_SECONDS, self.settled_at)
                return self._replace(misses=0, probe_at=probe_at)
            case _:
                return self._replace(status=PathStatus.WORKING, misses=0, reason=None)

    def missed(self, reason: Reason, *, http2_up: bool, now: float, random: float) -> QuicPath:
        """Note a QUIC dial that failed or lost its race; `reason` comes from `explain`.

        Without HTTP/2 working at the same time it says nothing about QUIC: the network may be gone.
        """
        if reason is not Reason.UDP_FORBIDDEN:
            if not http2_up:
                return self
            if self.misses + 1 < BLOCKED_AFTER and self.status is not PathStatus.SETTLING:
                return self._replace(misses=self.misses + 1)
        return self._block(reason, now, random)

    def lost(self, reason: Reason, *, now: float, random: float) -> QuicPath:
        """Note a QUIC connection that ended; only lost paths count, an edge that closes is no fault of QUIC's."""
        if reason is not Reason.PATH_LOST or self.status is PathStatus.BLOCKED:
            return self
        if self.losses and now - self.losses[-1] < SAME_EVENT:
            return self
        losses = (*(at for at in self.losses if now - at < LOSSES_WINDOW), now)
        if len(losses) >= LOSSES_LIMIT:
            return self._block(Reason.PATH_LOST, now, random)
        return self._replace(losses=losses)

    def probe_due(self, now: float) -> bool:
        """Tell whether to dial QUIC in the background now."""
        return self.probe_at is not None and now >= self.probe_at

    def probing(self) -> QuicPath:
        """Note that a probe began; its result is `answered` or `probe_failed`."""
        return self._replace(probe_at=None)

    def probe_failed(self, *, now: float, random: float) -> QuicPath:
        """Note a probe without success: longer pauses, and a path that was settling is blocked again."""
        if self.status is PathStatus.SETTLING:
            return self._block(self.reason or Reason.UDP_BLOCKED, now, random)
        if self.status is not PathStatus.BLOCKED:
            return self._replace(probe_at=None)
        probes = self.probes + 1
        return self._replace(probes=probes, probe_at=now + _probe_pause(probes, random))

    def network_changed(self, *, now: float, random: float) -> QuicPath:
        """Note a new link or address: what was learnt holds no longer. A blocked path is probed within a second."""
        if self.status in {PathStatus.BLOCKED, PathStatus.SETTLING}:
            settled_at = min(self.settled_at, now + SETTLE_SECONDS)
            return self._replace(
                misses=0, losses=(), probes=0, setbacks=0, probe_at=now + random, settled_at=settled_at
            )
        return QuicPath()

    def next_return(self, transports: Mapping[int, Transport], *, last_return: float | None, now: float) -> int | None:
        """Give the conn_index that should drain its HTTP/2 link and dial again, if one should.

        `transports` holds the connected ones. A connection that is alone stays: nobody could carry its traffic.
        """
        if self.status is not PathStatus.WORKING or len(transports) < 2:
            return None
        if last_return is not None and now < last_return + RETURN_SECONDS:
            return None
        return min((index for index, each in transports.items() if each is Transport.HTTP2), default=None)

    def _block(self, reason: Reason, now: float, random: float) -> QuicPath:
        if self.status is PathStatus.BLOCKED:
            return self._replace(reason=reason)
        broke = self.status in {PathStatus.WORKING, PathStatus.SETTLING}
        return QuicPath(
            status=PathStatus.BLOCKED,
            reason=reason,
            setbacks=self.setbacks + broke,
            probe_at=now + _probe_pause(0, random),
        )


def _probe_pause(failed: int, random: float) -> float:
    longest: float = min(PROBE_SECONDS * 2 ** min(failed, 10), MAX_PROBE_SECONDS)
    return longest * (1 + random) / 2
