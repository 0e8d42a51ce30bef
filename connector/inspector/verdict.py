"""Why a stream ended, or soon may, in words that somebody who does not know the protocol can act on.

Owns: the judgement: which hop, one sentence, what speaks for it, what to do. In: a stream's record, the hub's other
records. Out: a Verdict. Never: guesses without saying so; keeps anything.

*Strategy*: from the connector a stream that the edge cancels looks the same whether the visitor's connection broke or
the edge cut it. What tells them apart is time: silence before the end, and whether it was as long every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from connector.inspector.mqtt_session import BROKER, CLIENT
from connector.inspector.redact import redact_text
from connector.protocol.ports import RequestKind

if TYPE_CHECKING:
    from connector.inspector.mqtt_session import MqttSession
    from connector.inspector.streams import StreamRecord

EDGE_IDLE_LIMIT = 100.0
"""Seconds without payload after which Cloudflare's edge cuts a WebSocket."""

TELLING_SILENCE = 5.0
"""Seconds of silence from which on they are worth a word."""

SAME_SILENCE = 0.05
"""Two silences are the same limit when they differ by less than this part (or half a second)."""

PING_PATIENCE = 2.0
"""Seconds from which on an open ping is worth a word: a broker answers within a round trip."""

NO_ANSWER = 5.0
"""Seconds without a response head from which on they are worth a word."""

SAFE_PING = 30
"""Seconds between pings that every hop known of lets live: home routers and mobile networks forget after 60."""


class Verdict(NamedTuple):
    """`hop`: who ended it (`visitor`, `edge`, `link`, `connector`, `origin`; empty: nobody did wrong).
    `short`: for a table's row, empty when there is nothing to say. `evidence` and `advice` are sentences."""

    hop: str
    short: str
    line: str
    evidence: list[str]
    advice: str

    @property
    def lines(self) -> list[str]:
        """All of it, the most telling first."""
        return [text for text in (self.line, *self.evidence, self.advice) if text]

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        return {"hop": self.hop, "line": self.line, "evidence": self.evidence, "advice": self.advice}


NOTHING = Verdict("", "", "", [], "")


def judge(record: StreamRecord, now: float) -> Verdict:
    """Return what is to be said about a stream; `now` as of `time.monotonic`."""
    if record.ended is not None:
        found = _http(record) if record.kind is RequestKind.HTTP else _conversation(record)
    else:
        found = _open(record, now) if record.hub.role != "capture" else NOTHING
    if found is NOTHING or record.hub.no_redact:
        return found
    return found._replace(
        line=redact_text(found.line),
        evidence=[redact_text(line) for line in found.evidence],
        advice=redact_text(found.advice),
    )


def silence(record: StreamRecord) -> float:
    """Return the seconds without payload before the end; the whole life of a stream that carried none."""
    assert record.ended is not None
    frames = record.frames
    last = frames.ring[-1].now - record.started if frames is not None and frames.ring else record.marks.get("head", 0.0)
    return max(0.0, record.ended - last)


def label(record: StreamRecord) -> str:
    """Return a few words for the table's row; cheap, for it is made for every row."""
    if record.source in {"connector", "edge"} and record.status >= 500 and record.how == "complete":
        return "no answer of the origin" if record.source == "connector" else "answered by the edge"
    if record.ended is None or record.how in {"complete", ""}:
        return ""
    session = record.frames.mqtt if record.frames is not None else None
    if _goodbye(session):
        return ""
    if _unanswered(record, session):
        return "no PINGRESP"
    idle = ""
    if record.kind is not RequestKind.HTTP and (quiet := silence(record)) >= TELLING_SILENCE:
        idle = f", idle {quiet:.0f} s"
    match record.how:
        case "link lost":
            return "link lost"
        case "reset by the edge":
            return f"cut by the edge{idle}"
        case "reset by the connector":
            return "given up by the connector"
        case "visitor":
            return "" if record.kind is not RequestKind.HTTP and not record.error else "visitor left"
        case "origin":
            return "closed by the origin"
    return ""


# -- one kind after the other


def _http(record: StreamRecord) -> Verdict:
    assert record.ended is not None
    seconds = f"{record.ended:.1f} s"
    match record.how:
        case "link lost":
            return _lost_link(record)
        case "reset by the edge":
            if record.error and record.role == "edge":
                return Verdict("edge", "", f"The edge ended the request: {record.error}", [], "")
            if record.status or record.ended < NO_ANSWER:
                return Verdict(
                    "visitor", "", f"The edge cancelled the request after {seconds}: its visitor left, or it gave up.",
                    _reason(record), "",
                )  # fmt: skip
            return Verdict(
                "origin", "", f"The edge cancelled the request after {seconds} without an answer of the origin.",
                ["The visitor had enough of waiting, or the edge: Cloudflare's waits 100 s (524)."],
                "The origin is too slow: look at the timing below, and at its log.",
            )  # fmt: skip
        case "visitor":
            return Verdict("visitor", "", f"The visitor left after {seconds}, before the answer was whole.", [], "")
        case "reset by the connector":
            what = "The answer was cut short" if record.status else "The request was given up"
            got = f" after {record.bytes[1]} bytes of the body" if record.status else f" after {seconds}"
            return Verdict(
                "origin", "", f"{what}{got}: the origin's connection ended in the middle, or the connector is closing.",
                _reason(record), record.advice or "Look at the log of the connector, and at the origin's.",
            )  # fmt: skip
    if record.source == "connector" and record.status >= 500:
        return Verdict(
            "origin", "", f"The connector answered {record.status} itself: it got no usable answer of the origin"
            f"{f' {record.service}' if record.service else ''}.",
            _reason(record), record.advice or "Check that the origin runs and listens at the rule's address.",
        )  # fmt: skip
    if record.source == "edge" and record.status >= 500:
        return Verdict("edge", "", f"The edge answered {record.status} itself.", _reason(record), "")
    faults = [name for name in record.marks if name.startswith("fault ")]
    if faults:
        return Verdict("edge", "", f"Under the {', the '.join(faults)} of this edge.", [], "")
    return NOTHING


def _conversation(record: StreamRecord) -> Verdict:
    """A WebSocket or TCP flow that has ended."""
    session = record.frames.mqtt if record.frames is not None else None
    what = "MQTT connection" if session is not None else "WebSocket" if record.frames is not None else "connection"
    seconds = f"{record.ended:.1f} s"
    evidence = _evidence(record, session)
    pinged = _unanswered(record, session)
    if record.status and record.status not in {101, 200}:
        return _http(record)
    if _goodbye(session):
        return Verdict("", "", f"The client said DISCONNECT after {seconds}: an orderly end.", [], "")
    if pinged:
        return Verdict(
            "origin", "",
            f"The broker stopped answering: the client's PINGREQ of {pinged:.1f} s before the end got no PINGRESP.",
            [f"The ping came through the tunnel and was handed to {record.service or 'the origin'}.", *evidence],
            "Look at the broker and its machine: it hangs, is overloaded, or lost the connection without a word.",
        )  # fmt: skip
    match record.how:
        case "link lost":
            return _lost_link(record, evidence)
        case "reset by the edge":
            return _edge_cut(record, session, what, evidence)
        case "reset by the connector":
            return Verdict(
                "connector", "", f"The connector gave this {what} up after {seconds}"
                f"{f' ({record.error})' if record.error else ''}: the origin's connection broke, or it was closing.",
                evidence, record.advice or "Look at the log of the connector at that moment.",
            )  # fmt: skip
        case "origin":
            return _by_origin(record, session, what, evidence)
        case "visitor":
            words = f": {record.error}" if record.error else ""
            return Verdict("visitor", "", f"The visitor ended this {what} first, after {seconds}{words}.", evidence, "")
    if evidence:
        return Verdict("", "", f"Ended after {seconds}.", evidence, "")
    return NOTHING


def _edge_cut(record: StreamRecord, session: MqttSession | None, what: str, evidence: list[str]) -> Verdict:
    quiet = silence(record)
    seconds = f"{record.ended:.1f} s"
    known = record.error if record.role == "edge" else ""
    if quiet < TELLING_SILENCE:
        line = f"The edge ended this {what} after {seconds}"
        line += (
            f": {known}" if known else ", in the middle of traffic: the visitor's connection broke, or the edge cut it."
        )
        return Verdict("edge" if known else "visitor", "", line, evidence, "")
    line = f"The edge cut this {what}: nothing had passed for {quiet:.1f} s."
    if known:
        evidence.insert(0, f"The edge says: {known}.")
    same, all_of_them = record.hub.same_silence(record)
    who = f"{session.client_id!r}" if session is not None and session.client_id else "this client"
    if same > 1:
        evidence.insert(
            0, f"{same} of {all_of_them} ended connections of {who} were cut after {quiet:.0f} s of silence: "
            "an idle limit at work, not a bad network.",
        )  # fmt: skip
    if abs(quiet - EDGE_IDLE_LIMIT) <= 5:
        evidence.insert(0, "Cloudflare's edge cuts a WebSocket in which nothing passes for 100 s.")
    elif same <= 1 and not known:
        evidence.append("If it comes again after the same silence, it is an idle limit; if not, the visitor vanished.")
    return Verdict("edge", "", line, evidence, _ping_advice(session, quiet))


def _ping_advice(session: MqttSession | None, quiet: float) -> str:
    often = min(SAFE_PING, max(1, int(quiet / 2)))
    if session is None:
        return f"Let one side send something (a WebSocket ping is enough) every {often} s."
    if not session.keep_alive:
        return f"The client's keep-alive is off, so it never pings: set it to {often} s."
    if session.keep_alive > quiet:
        return (
            f"The client's keep-alive is {session.keep_alive} s, so it would have pinged too late: set it to {often} s."
        )
    return (
        f"The client should have pinged (keep-alive {session.keep_alive} s) and did not: it hung, or lost its network."
    )


def _by_origin(record: StreamRecord, session: MqttSession | None, what: str, evidence: list[str]) -> Verdict:
    seconds = f"{record.ended:.1f} s"
    if session is None:
        return Verdict("origin", "", f"The origin ended this {what} first, after {seconds}.", evidence, "")
    overdue = _overdue(record, session)
    if overdue:
        return Verdict(
            "visitor", "",
            f"The broker ended the session because the client was silent: {overdue:.1f} s, with a keep-alive of "
            f"{session.keep_alive} s (1.5 times that are allowed).",
            evidence, "The client hung, or its network did: nothing of it reached the edge any more.",
        )  # fmt: skip
    return Verdict(
        "origin", "", f"The broker ended this {what} first, after {seconds}.", evidence,
        "Look at the broker's log: it says why (a second client with the same ID, its limits, a restart).",
    )  # fmt: skip


def _open(record: StreamRecord, now: float) -> Verdict:
    """A stream that still runs: what looks wrong, or will be."""
    frames = record.frames
    if not record.status and (waited := now - record.started) >= NO_ANSWER:
        return Verdict(
            "origin", "", f"No answer of {record.service or 'the origin'} for {waited:.0f} s.",
            ["Cloudflare's edge gives up after 100 s (524)."], "",
        )  # fmt: skip
    if frames is None or record.kind is RequestKind.HTTP:
        return NOTHING
    session = frames.mqtt
    last = frames.ring[-1].now if frames.ring else record.started
    if session is not None and session.ping_sent > session.ping_answered and now - session.ping_sent >= PING_PATIENCE:
        return Verdict(
            "origin", "",
            f"The PINGREQ of {now - session.ping_sent:.0f} s ago has no PINGRESP: the broker does not answer.", [], "",
        )  # fmt: skip
    evidence = []
    same, all_of_them, quiet = record.hub.cut_before(record)
    if same > 1:
        evidence.append(
            f"{same} of {all_of_them} connections before this one were cut by the edge after {quiet:.0f} s of silence."
        )
    limit = quiet if same > 1 else EDGE_IDLE_LIMIT
    rare = session is not None and (not session.keep_alive or session.keep_alive >= limit)
    if rare and session is not None and session.state == "connected":
        word = f"{session.keep_alive} s" if session.keep_alive else "off"
        if same <= 1:
            evidence.append("Cloudflare's edge cuts a WebSocket in which nothing passes for 100 s.")
        return Verdict(
            "edge", "", f"This session may be cut when it is quiet: the client's keep-alive is {word}.", evidence,
            f"Set it to {min(SAFE_PING, max(1, int(limit / 2)))} s.",
        )  # fmt: skip
    if now - last > 0.6 * EDGE_IDLE_LIMIT:
        return Verdict(
            "edge", "",
            f"Nothing has passed for {now - last:.0f} s; Cloudflare's edge cuts at {EDGE_IDLE_LIMIT:.0f} s.",
            evidence, "",
        )  # fmt: skip
    return Verdict("edge", "", evidence[0], [], "") if evidence else NOTHING


# -- parts


def _evidence(record: StreamRecord, session: MqttSession | None) -> list[str]:
    found: list[str] = []
    frames = record.frames
    if frames is not None and record.kind is RequestKind.WEBSOCKET:
        for way, who in ((CLIENT, "visitor"), (BROKER, "origin")):
            if frames.closed[way]:
                found.append(f"The {who} sent a WebSocket close frame: {frames.closed[way]}.")
    if session is None:
        return found
    found += [f"{problem[0].upper()}{problem[1:]}." for problem in session.problems]
    if session.state == "connected" and record.how != "complete":
        will = f", so the broker publishes its will to {session.will['topic']}" if session.will else ""
        found.append(f"The session ended without DISCONNECT{will}.")
    if session.state == "connecting":
        found.append("The broker never answered CONNECT.")
    return found


def _reason(record: StreamRecord) -> list[str]:
    return [f"Reason: {record.error.rstrip('.')}."] if record.error else []


def _goodbye(session: MqttSession | None) -> bool:
    """Whether the client ended the session in order; how the connection went after that is nobody's worry."""
    return session is not None and session.state == "disconnected" and not session.problems


def _unanswered(record: StreamRecord, session: MqttSession | None) -> float:
    """Seconds from a ping without answer to the end, 0 if it was answered or too young to tell."""
    assert record.ended is not None
    if session is None or session.ping_sent <= session.ping_answered or session.state == "disconnected":
        return 0.0
    waited = record.started + record.ended - session.ping_sent
    return waited if waited >= PING_PATIENCE else 0.0


def _overdue(record: StreamRecord, session: MqttSession) -> float:
    """Seconds that the client was silent, if they are more than its keep-alive allows."""
    assert record.ended is not None
    quiet = record.started + record.ended - session.last[CLIENT]
    limit = session.keep_alive * 1.5
    return quiet if limit and session.last[CLIENT] and quiet >= limit else 0.0


def _lost_link(record: StreamRecord, evidence: list[str] | None = None) -> Verdict:
    return Verdict(
        "link", "", f"The link between edge and connector was lost after {record.ended:.1f} s, with all its streams.",
        [*_reason(record), *(evidence or [])],
        "The control plane's page shows when it came back. If it happens often, look at the connector's network.",
    )  # fmt: skip
