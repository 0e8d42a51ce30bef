"""Why a QUIC connection ended, in words: what the codes of its end mean to a user.

Owns: the texts and advice for failed handshakes and lost links over QUIC.
In: code and reason of CONNECTION_CLOSE, or of the engine's own end. Out: EdgeDialError, EdgeTlsError, EdgeLostError.
Never: does I/O.
"""

from __future__ import annotations

from connector.errors import EdgeDialError, EdgeTlsError, ProtocolError
from connector.transport.link import explain_loss, lost_by_edge
from connector.transport.udp import UDP_ADVICE

IDLE_REASON = "idle timeout"
_CRYPTO_ERROR = range(0x100, 0x200)
_CERTIFICATE_ALERTS = {42, 43, 44, 45, 46, 48}
_NO_ALPN = 120


def explain_handshake(code: int, reason: str, by_peer: bool, peer: str, server_name: str) -> EdgeDialError:
    """Return why a handshake with `peer` ended with transport error `code`."""
    if reason.lower() == IDLE_REASON:
        return EdgeDialError(f"no answer from {peer} by UDP", advice=UDP_ADVICE)
    said = f": {_clean(reason)}" if reason else ""
    if code not in _CRYPTO_ERROR:
        who = "closed the connection" if by_peer else "broke the QUIC protocol"
        return EdgeDialError(f"{peer} {who} during the handshake (code {code}){said}", advice=UDP_ADVICE)
    alert = code - 0x100
    if alert == _NO_ALPN:
        return EdgeTlsError(
            f"{peer} does not speak the tunnel protocol over QUIC{said}",
            advice="Check host and port of --edge: another kind of QUIC server listens there.",
        )
    if alert in _CERTIFICATE_ALERTS and not by_peer:
        return EdgeTlsError(
            f"the certificate of {peer} for {server_name} is not trusted{said}",
            advice="For a dev edge or another private edge, name its authority's PEM file with --cacert (`connector "
            "edge ca` prints the dev edge's); it must be made for that name. Otherwise check this machine's clock; "
            "towards Cloudflare it means that something between intercepts TLS.",
        )
    return EdgeTlsError(
        f"TLS handshake with {peer} over QUIC failed (alert {alert}){said}",
        advice="If this repeats, a firewall or proxy between here and the edge may intercept the connection.",
    )


def explain_end(code: int, reason: str, by_peer: bool, peer: str, busy: int) -> Exception | None:
    """Return why an established link ended; None for a clean end."""
    if reason.lower() == IDLE_REASON:
        return explain_loss(TimeoutError(), peer, busy)
    if by_peer and code == 0:
        return explain_loss(None, peer, busy)
    said = f": {_clean(reason)}" if reason else ""
    if by_peer:
        return lost_by_edge(f"the edge {peer} closed the connection with code {code}{said}")
    return ProtocolError(f"the edge {peer} broke the QUIC protocol (code {code}){said}")


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:300])
