"""TLS towards the edge: which names, whom to trust, which versions.

Owns: the client-side `ssl.SSLContext` for edge links, and what TLS failures mean in words.
In: an optional `--cacert` file. Out: a context; EdgeTlsError with advice.
Never: dials, or turns verification off.

Key-exchange groups: `ssl.SSLContext` has no call for a list of groups before Python 3.15 (and `set_ecdh_curve` allows a
single classical one), so the library's default list stands: OpenSSL 3.5 and newer offer X25519MLKEM768 first by
themselves, older ones offer X25519 and P-256. The edge accepts P-256, so either works; `has_post_quantum` tells which
it is.
"""

from __future__ import annotations

import asyncio
import os
import ssl

from connector.errors import ConfigError, EdgeTlsError

EDGE_NAMES = {"http2": "h2.cftunnel.com", "quic": "quic.cftunnel.com", "probe": "probe.cftunnel.com"}
"""The name sent as SNI and verified, per transport (all edge addresses answer to it)."""

MAX_CACERT = 16 * 1024 * 1024
"""Bytes read of a --cacert file. The largest system bundles have 300 KiB; more is the wrong file."""

TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2 only what HTTP/2 allows (RFC 9113 section 9.2.2); cloudflared ends a connection with any other. In TLS
1.3, which the edge speaks, none is forbidden."""

DIAGNOSIS_SECONDS = 3.0
"""Limit of the second look at a certificate that did not verify."""

_NAME_MISMATCH = {62, 63, 64}  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH, _EMAIL_, _IP_ADDRESS_
_NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "UNKNOWN_PROTOCOL",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "BAD_RECORD_TYPE",
    "UNEXPECTED_MESSAGE",
}
_OUT_OF_TIME = {9: "is not valid yet", 10: "has expired"}

_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"


def has_post_quantum() -> bool:
    """Whether the linked TLS library offers X25519MLKEM768 by default."""
    return ssl.OPENSSL_VERSION.startswith("OpenSSL ") and ssl.OPENSSL_VERSION_INFO[:2] >= (3, 5)


def edge_context(cacert: str | None = None, *, transport: str = "http2") -> ssl.SSLContext:
    """Return the client context for links to the edge.

    Trust: the system's roots and the edge's own authorities, or with `cacert` only that PEM file's certificates.
    HTTP/2 goes without ALPN: both sides know. Errors: ConfigError about the file.
    """
    if transport not in EDGE_NAMES:
        raise ValueError(f"no such transport: {transport}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS12_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION  # RFC 9113 section 9.2.1; no write ever waits for a read then
    # On by default since Python 3.13; some of the edge's authorities, and most private ones, lack the extensions it
    # asks for. Chain, signatures, validity and name are checked all the same.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # What is trusted ends the chain, self-signed or not, as in Go. Needed for the edge's authorities: an RSA one
    # with an ECDSA signature is not self-signed in OpenSSL's eyes. It serves a --cacert with an intermediate too.
    context.verify_flags |= ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    if cacert is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        from connector.transport.trust_anchors import anchor_certificates  # noqa: PLC0415  (not with --cacert)

        context.load_verify_locations(cadata=anchor_certificates())
    else:
        _load_cacert(context, cacert)
    keylog = os.environ.get("SSLKEYLOGFILE")
    if keylog:
        try:
            context.keylog_filename = keylog
        except OSError as error:
            raise ConfigError(
                f"SSLKEYLOGFILE names {keylog}, which cannot be written: {error.strerror or error}",
                advice="Unset SSLKEYLOGFILE, or name a file in a directory that exists and can be written.",
            ) from None
    return context


def _load_cacert(context: ssl.SSLContext, cacert: str) -> None:
    try:
        with open(cacert, "rb") as file:
            data = file.read(MAX_CACERT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot read the --cacert file {cacert}: {reason}",
            advice="--cacert (TUNNEL_CACERT) must name a readable PEM file with the edge's certificate authorities.",
        ) from None
    if len(data) > MAX_CACERT:
        raise ConfigError(f"the --cacert file {cacert} is too large to be a PEM file of certificates")
    if _PEM_BEGIN not in data:
        raise ConfigError(
            f"the --cacert file {cacert} holds no certificate",
            advice=f'It must hold PEM text with "{_PEM_BEGIN.decode()}"; DER files are converted by `openssl x509 '
            "-inform der -in FILE -out FILE.pem`.",
        )
    try:
        context.load_verify_locations(cadata=data.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"the --cacert file {cacert} does not load: {_reason(error)}",
            advice="A certificate in it is damaged: copy the file again.",
        ) from None


class PeerCertificate:
    """What an untrusted peer calls itself; read without verification, for an error text only."""

    __slots__ = ("issuer", "names", "subject")

    def __init__(self, subject: str, issuer: str, names: tuple[str, ...]) -> None:
        self.subject = subject
        self.issuer = issuer
        self.names = names


async def maybe_read_peer_certificate(address: tuple[str, int], server_name: str) -> PeerCertificate | None:
    """Connect once more, without verification, to learn what certificate the peer has; None when that fails too.

    Python does not give out a certificate that did not verify, and "unable to get local issuer certificate" helps
    nobody. Nothing but the TLS handshake is sent.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(DIAGNOSIS_SECONDS):
            _, writer = await asyncio.open_connection(*address, ssl=context, server_hostname=server_name)
        try:
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        finally:
            writer.transport.abort()
        return _read_certificate(der)
    except (OSError, ValueError, TimeoutError):
        return None


def _read_certificate(der: bytes) -> PeerCertificate:
    from cryptography import x509  # noqa: PLC0415  (slow to import, only for diagnosis)

    certificate = x509.load_der_x509_certificate(der)
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = tuple(str(name.value) for name in alternatives)
    except (x509.ExtensionNotFound, ValueError):
        names = ()
    return PeerCertificate(certificate.subject.rfc4514_string(), certificate.issuer.rfc4514_string(), names)


def explain_tls_error(
    error: BaseException, server_name: str, peer: str, certificate: PeerCertificate | None
) -> EdgeTlsError:
    """Return the EdgeTlsError for a handshake with `peer` that failed with `error`."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_verification(error, server_name, peer, certificate)
    if isinstance(error, ssl.SSLEOFError | ConnectionError) and not isinstance(error, ssl.SSLCertVerificationError):
        return EdgeTlsError(
            f"{peer} closed the connection during the TLS handshake",
            advice="Check host and port of --edge: what listens there may not speak TLS, or a firewall cuts it.",
        )
    reason = getattr(error, "reason", "") or ""
    if reason in _NOT_TLS:
        return EdgeTlsError(
            f"{peer} does not speak TLS",
            advice="Check host and port of --edge: edge links go to port 7844, a dev edge prints its own address.",
        )
    if reason in {"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"}:
        return EdgeTlsError(
            f"{peer} and this connector have no TLS version in common",
            advice="TLS 1.2 or 1.3 is needed; something between here and the edge may intercept the connection.",
        )
    if reason in {"SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV1_ALERT_INSUFFICIENT_SECURITY"}:
        return EdgeTlsError(
            f"{peer} refuses the TLS parameters of this connector",
            advice="TLS 1.3, or TLS 1.2 with ECDHE and AES-GCM or ChaCha20, is needed on the other side.",
        )
    return EdgeTlsError(
        f"TLS handshake with {peer} failed: {_reason(error)}",
        advice="If this repeats, a firewall or proxy between here and the edge may intercept TLS.",
    )


def _explain_verification(
    error: ssl.SSLCertVerificationError, server_name: str, peer: str, certificate: PeerCertificate | None
) -> EdgeTlsError:
    if error.verify_code in _NAME_MISMATCH:
        names = ", ".join(certificate.names[:5]) if certificate is not None else ""
        return EdgeTlsError(
            f"{peer} has a certificate for another name than {server_name}" + (f": {names}" if names else ""),
            advice="The address is not a tunnel edge server, or the dev edge's certificate was made for other names.",
        )
    if error.verify_code in _OUT_OF_TIME:
        return EdgeTlsError(
            f"the certificate of {peer} for {server_name} {_OUT_OF_TIME[error.verify_code]}",
            advice="Check the clock of this machine (`date -u`), then the certificate of the edge.",
        )
    issuer = f", issued by {certificate.issuer}," if certificate is not None else ""
    return EdgeTlsError(
        f"the certificate of {peer} for {server_name}{issuer} is not trusted: {error.verify_message or error}",
        advice="For a dev edge or another private edge, name its authority's PEM file with --cacert (`connector edge "
        "ca` prints the dev edge's). Towards Cloudflare it means that something between intercepts TLS.",
    )


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else (str(error) or type(error).__name__)
