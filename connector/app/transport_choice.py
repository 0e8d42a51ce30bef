"""Which transport the next dial takes, and what this process knows about QUIC on the present network.

Owns: the `Selector` and the `QuicPath` in force, the remote records, the lines that tell about changes, the counters of
reasons. In: outcomes of dials, ends of links, records. Out: plans, facts for /ready and metrics.
Never: dials; decides by itself (`protocol_race.py` and `protocol_choice.py` do).
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from connector.app.logs import Logger
from connector.errors import ConnectorError, EdgeDialError, EdgeLostError, ProtocolError
from connector.protocol.protocol_choice import (
    RECORD_RETRY_SECONDS,
    RECORD_SECONDS,
    RemoteFeatures,
    Selector,
    Share,
    Transport,
    datagram_version,
    select_protocol,
    threshold,
)
from connector.protocol.protocol_race import DialPlan, PathStatus, QuicPath, Reason, explain

_FALLBACK_ADVICE = (
    "Allow outgoing UDP on this port, or give --protocol http2. HTTP/2 serves meanwhile, without private-network UDP; "
    "QUIC is tried again in the background."
)


class PathFacts(NamedTuple):
    """What /ready and the metrics say about QUIC."""

    status: PathStatus
    reason: Reason | None
    text: str
    """The reason in words, or ""."""


class TransportChoice:
    """One per run. Ask `plan` before each dial and tell what became of it."""

    def __init__(
        self,
        flag: str,
        log: Logger,
        *,
        account_tag: str = "",
        token_given: bool = True,
        features: tuple[str, ...] = (),
        post_quantum: bool = False,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flag = "quic" if post_quantum and flag == "auto" else flag  # TLS over TCP has no such exchange here
        self._log = log
        self._place = threshold(account_tag)
        self._token_given = token_given
        self._features = features
        self._draw = draw
        self._clock = clock
        self._selector, warning = select_protocol(
            self._flag, token_given=token_given, shares=None, place=0, now=clock()
        )
        if flag == "h2mux":
            log.warn(warning, event=0)
        self._path = QuicPath()
        self._record = RemoteFeatures()
        self._records_at = 0.0
        self._last_return: float | None = None
        self._port = 7844
        self.link_ends: Counter[tuple[Transport, Reason]] = Counter()
        """Links and dials that ended, by transport and reason."""
        self.races_lost = 0
        """Dials of `auto` that QUIC lost."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when what `knowledge` gives has changed."""
        self.returns = 0
        """Connections that went back to QUIC."""

    # --- before a dial ---------------------------------------------------------------------------------------------

    @property
    def initial(self) -> Transport:
        """What the start line names: the transport that is dialled first."""
        return Transport.HTTP2 if self.plan() is DialPlan.HTTP2 else Transport.QUIC

    @property
    def needs_quic(self) -> bool:
        """Whether any dial may be over QUIC."""
        return self._selector.fallback is not None or self._selector.current is Transport.QUIC

    @property
    def needs_http2(self) -> bool:
        """Whether any dial may be over HTTP/2."""
        return self._selector.fallback is not None or self._selector.current is Transport.HTTP2

    def plan(self) -> DialPlan:
        """Tell how the next dial goes."""
        return self._path.plan(self._selector)

    @property
    def datagram_version(self) -> int:
        """2 or 3: what a registration of now should announce."""
        return datagram_version(self._features, self._record, self._place)

    @property
    def facts(self) -> PathFacts:
        """What is known about QUIC now."""
        reason = self._path.reason
        return PathFacts(self._path.status, reason, reason.text(self._port) if reason is not None else "")

    @property
    def knowledge(self) -> tuple[Selector, QuicPath, RemoteFeatures, int]:
        """Everything that plans depend on, for a worker's `adopt`."""
        return self._selector, self._path, self._record, self._port

    def adopt(self, selector: Selector, path: QuicPath, record: RemoteFeatures, port: int) -> None:
        """Take another process's knowledge over, in place of our own."""
        self._selector, self._path, self._record, self._port = selector, path, record, port

    # --- the edge's records ----------------------------------------------------------------------------------------

    @property
    def skip_prechecks(self) -> bool:
        """The edge's wish, by its feature record."""
        return self._record.skip_prechecks

    def records_due(self) -> bool:
        """Whether the TXT records should be looked up now."""
        return self._clock() >= self._records_at

    def records_tried(self) -> None:
        """Note that a look-up began."""
        self._records_at = self._clock() + RECORD_SECONDS

    def learn(self, shares: tuple[Share, ...] | None, record: RemoteFeatures | None) -> None:
        """Take what a look-up gave; None for a record that could not be had or read."""
        now = self._clock()
        if record is not None:
            self._record = record
        before = self._selector
        if before.guessed and shares is not None:
            self._selector, _ = select_protocol(
                self._flag, token_given=self._token_given, shares=shares, place=self._place, now=now
            )
        else:
            self._selector = before.refreshed(shares, self._place, now)
        if self._selector.current is not before.current:
            self._log.info(f"Changing protocol to {self._selector.current.value}", event=0)
        if shares is None or record is None:
            self._records_at = now + RECORD_RETRY_SECONDS
        self.on_change()

    # --- after a dial ----------------------------------------------------------------------------------------------

    def came_up(self, transport: Transport, *, raced: bool, quic_heard: bool, quic_error: BaseException | None) -> None:
        """Note a link that is established; with `raced`, what became of QUIC when HTTP/2 won."""
        if transport is Transport.QUIC:
            self._change(self._path.answered(self._clock()))
        elif raced:
            self.races_lost += 1
            forbidden = isinstance(quic_error, EdgeDialError) and quic_error.forbidden
            reason = explain(
                Transport.QUIC, up=False, heard=quic_heard, closed_by_edge=False, forbidden=forbidden, other_up=True
            )
            self.link_ends[Transport.QUIC, reason] += 1
            self._change(self._path.missed(reason, http2_up=True, now=self._clock(), random=self._draw()))
        else:
            self._change(self._path.http2_dialled(True))

    def dial_failed(self, plan: DialPlan, error: BaseException) -> Reason:
        """Note a dial without any link; give the reason."""
        transport = Transport.QUIC if plan is DialPlan.QUIC else Transport.HTTP2
        forbidden = isinstance(error, EdgeDialError) and error.forbidden
        if plan is DialPlan.HTTP2:
            self._change(self._path.http2_dialled(False))
        reason = explain(transport, up=False, heard=False, closed_by_edge=False, forbidden=forbidden, other_up=False)
        self.link_ends[transport, reason] += 1
        return reason

    def link_ended(self, transport: Transport, error: BaseException | None) -> Reason:
        """Note the end of an established link that nobody here asked for; give the reason."""
        # A broken protocol is the edge's doing, and no sign of a broken path.
        by_edge = error is None or isinstance(error, ProtocolError)
        by_edge = by_edge or (isinstance(error, EdgeLostError) and error.by_edge)
        reason = explain(transport, up=True, heard=True, closed_by_edge=by_edge, forbidden=False, other_up=False)
        self.link_ends[transport, reason] += 1
        if transport is Transport.QUIC and self._selector.fallback is not None:
            self._change(self._path.lost(reason, now=self._clock(), random=self._draw()))
        return reason

    def network_changed(self) -> None:
        """Note news of this machine's links, addresses or routes."""
        self._change(self._path.network_changed(now=self._clock(), random=self._draw()))

    # --- in the background -----------------------------------------------------------------------------------------

    def next_probe(self) -> float | None:
        """Tell when to probe QUIC, on this object's clock."""
        return self._path.probe_at

    def probe_due(self) -> bool:
        """Whether to probe QUIC now."""
        return self._path.probe_due(self._clock())

    def probing(self, port: int) -> None:
        """Note that a probe of this port began."""
        self._port = port
        self._path = self._path.probing()

    def probed(self, error: ConnectorError | None) -> None:
        """Take a probe's outcome: None when QUIC answered."""
        now = self._clock()
        self._log.debug("QUIC was probed", event=0, error=str(error) if error is not None else "")
        if error is None:
            self._change(self._path.answered(now))
        else:
            self._change(self._path.probe_failed(now=now, random=self._draw()))

    @property
    def may_return(self) -> bool:
        """Whether connections over HTTP/2 may go back to QUIC some time."""
        return self._selector.fallback is not None and self._path.status is PathStatus.WORKING

    def next_return(self, transports: Mapping[int, Transport]) -> int | None:
        """Give the conn_index that should move back to QUIC now, if one should; it counts as moved."""
        if not self.may_return or self.plan() is not DialPlan.RACE:
            return None
        now = self._clock()
        conn_index = self._path.next_return(transports, last_return=self._last_return, now=now)
        if conn_index is not None:
            self._last_return = now
            self.returns += 1
        return conn_index

    def use_port(self, port: int) -> None:
        """Name the edge's port in reasons; 7844 where nobody says otherwise."""
        self._port = port

    def _change(self, path: QuicPath) -> None:
        """Put the verdict in force, and say once what that means."""
        before, self._path = self._path, path
        if path != before:
            self.on_change()
        blocked = PathStatus.BLOCKED
        if path.status is blocked and before.status is not blocked and path.reason is not None:
            self._log.warn(
                "Switching to fallback protocol http2",
                event=0,
                reason=path.reason.text(self._port),
                advice=_FALLBACK_ADVICE,
            )
        elif path.status is PathStatus.WORKING and before.status is PathStatus.SETTLING:
            self._log.info("QUIC works again: connections return to it one by one", event=0)
        elif path.status is PathStatus.SETTLING and before.status is blocked:
            self._log.info("QUIC answers again; it is watched before connections return to it", event=0)
