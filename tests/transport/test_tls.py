"""The edge context: whom it trusts, whom it refuses, and what it says then."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from connector.errors import ConfigError
from connector.transport.tls import EDGE_NAMES, edge_context, explain_tls_error, has_post_quantum
from connector.transport.trust_anchors import ANCHORS, Anchor, anchor_certificates, make_anchor
from tests.support.certs import DAY, Authority

NAME = EDGE_NAMES["http2"]


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str = NAME) -> ssl.SSLObject:
    """Run a handshake in memory; raise what the client raises."""
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(a, b, server_hostname=name)
    theirs = server.wrap_bio(b, a, server_side=True)
    for _ in range(10):
        done = True
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                done = False
        if done:
            return ours
    raise AssertionError("no end of the handshake")


def trusting(tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    path = tmp_path / "ca.pem"
    path.write_text(authority.pem())
    return edge_context(str(path))


def test_private_authority_without_key_identifiers(tmp_path: Path) -> None:
    authority = Authority()
    tls = handshake(trusting(tmp_path, authority), authority.server_context(tmp_path, NAME))
    assert tls.version() == "TLSv1.3"
    assert tls.selected_alpn_protocol() is None


def test_no_alpn_is_offered_even_if_the_server_asks(tmp_path: Path) -> None:
    authority = Authority()
    server = authority.server_context(tmp_path, NAME)
    server.set_alpn_protocols(["h2"])
    assert handshake(trusting(tmp_path, authority), server).selected_alpn_protocol() is None


def test_versions(tmp_path: Path) -> None:
    authority = Authority()
    context = trusting(tmp_path, authority)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.check_hostname
    server = authority.server_context(tmp_path, NAME)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(context, server).version() == "TLSv1.2"


def test_no_cipher_that_http2_forbids(tmp_path: Path) -> None:
    authority = Authority()
    server = authority.server_context(tmp_path, NAME)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    server.set_ciphers("ECDHE-ECDSA-AES128-SHA256")
    context = trusting(tmp_path, authority)
    assert not [cipher["name"] for cipher in context.get_ciphers() if "SHA1" in cipher["description"]]
    with pytest.raises(ssl.SSLError):
        handshake(context, server)
    alert = ssl.SSLError(1, "[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] x")
    alert.reason = "SSLV3_ALERT_HANDSHAKE_FAILURE"
    assert "refuses the TLS parameters" in str(explain_tls_error(alert, NAME, "e", None))


def test_wrong_name_is_refused(tmp_path: Path) -> None:
    authority = Authority()
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(trusting(tmp_path, authority), authority.server_context(tmp_path, "other.example"))
    assert "another name than h2.cftunnel.com" in str(explain_tls_error(caught.value, NAME, "127.0.0.1:7844", None))


def test_other_authority_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(trusting(tmp_path, Authority("CA")), Authority("CA").server_context(tmp_path, NAME, with_root=True))
    error = explain_tls_error(caught.value, NAME, "127.0.0.1:7844", None)
    assert "not trusted" in str(error)
    assert "--cacert" in error.advice


@pytest.mark.parametrize(("start", "end", "text"), [(-2 * DAY, -DAY, "has expired"), (DAY, 2 * DAY, "not valid yet")])
def test_out_of_time(tmp_path: Path, start: datetime.timedelta, end: datetime.timedelta, text: str) -> None:
    authority = Authority()
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(trusting(tmp_path, authority), authority.server_context(tmp_path, NAME, start=start, end=end))
    error = explain_tls_error(caught.value, NAME, "127.0.0.1:7844", None)
    assert text in str(error)
    assert "clock" in error.advice


def test_default_trust_does_not_hold_private_authorities(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(edge_context(), Authority().server_context(tmp_path, NAME))


def test_cacert_replaces_everything(tmp_path: Path) -> None:
    assert len(trusting(tmp_path, Authority()).get_ca_certs()) == 1


def test_the_published_anchors_are_loaded() -> None:
    subjects = [certificate["subject"] for certificate in edge_context().get_ca_certs()]
    units = {
        value for subject in subjects for part in subject for key, value in part if key == "organizationalUnitName"
    }
    for unit in ("CloudFlare Origin SSL ECC Certificate Authority", "CloudFlare Origin SSL Certificate Authority"):
        assert unit in units
    assert "Origin Pull" in units


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: anchor.certificate_sha256[:8])
def test_anchor_facts_survive(anchor: Anchor) -> None:
    certificate = x509.load_der_x509_certificate(make_anchor(anchor))
    assert tuple((part.oid.dotted_string, part.value) for part in certificate.subject) == anchor.subject
    assert certificate.subject == certificate.issuer
    same = x509.Name([x509.NameAttribute(x509.ObjectIdentifier(oid), value) for oid, value in anchor.subject])
    assert certificate.subject.public_bytes() == same.public_bytes()
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert key == anchor.public_key
    # The key identifier is SHA-1 of the key: the facts agree with each other.
    assert x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest == anchor.key_id
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, anchor.path_length)
    assert (certificate.not_valid_before_utc, certificate.not_valid_after_utc) == (anchor.not_before, anchor.not_after)


def test_anchors_are_made_once() -> None:
    assert anchor_certificates() is anchor_certificates()


def anchor_for(authority: Authority) -> Anchor:
    public = authority.key.public_key()
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Anchor(
        subject=tuple((part.oid.dotted_string, str(part.value)) for part in authority.name),
        public_key=public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        key_id=x509.SubjectKeyIdentifier.from_public_key(public).digest,
        path_length=2,
        not_before=now - DAY,
        not_after=now + DAY,
        certificate_sha256="",
    )


def edge_like(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Authority:
    """An authority named as the edge's own are (not quite: those are loaded too), with a key of ours."""
    parts = [(oid, value.replace("Origin", "Test Origin")) for oid, value in ANCHORS[0].subject]
    return Authority(x509.Name([x509.NameAttribute(x509.ObjectIdentifier(o), v) for o, v in parts]), key)


@pytest.mark.parametrize("kind", ["ec", "rsa"])
@pytest.mark.parametrize("with_root", [False, True])
def test_chain_through_a_made_anchor(tmp_path: Path, kind: str, with_root: bool) -> None:
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
    authority = edge_like(key)
    context = edge_context()
    context.load_verify_locations(cadata=make_anchor(anchor_for(authority)))
    assert handshake(context, authority.server_context(tmp_path, NAME, with_root=with_root)).version() == "TLSv1.3"
    # Another key under the very same name does not pass, with and without its root in the chain.
    impostor = edge_like(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, impostor.server_context(tmp_path, NAME, with_root=with_root))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, authority.server_context(tmp_path, "other.example", with_root=with_root))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot read"),
        (b"", "holds no certificate"),
        (b"not PEM", "holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "does not load"),
        (b"-----BEGIN CERTIFICATE-----\n", "does not load"),
        (b"\xff-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", "does not load"),
    ],
)
def test_cacert_file_that_is_none(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=text) as caught:
        edge_context(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.advice


def test_cacert_is_a_directory_or_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        edge_context(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot read"):
        edge_context("a\0b")


def test_key_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    authority = Authority()
    handshake(trusting(tmp_path, authority), authority.server_context(tmp_path, NAME))
    assert "CLIENT_HANDSHAKE_TRAFFIC_SECRET" in log.read_text()
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "none" / "keys"))
    with pytest.raises(ConfigError, match="SSLKEYLOGFILE"):
        edge_context()


def test_unknown_transport() -> None:
    with pytest.raises(ValueError, match="no such transport"):
        edge_context(transport="h2mux")


def test_post_quantum_follows_the_library() -> None:
    assert has_post_quantum() == (ssl.OPENSSL_VERSION_INFO[:2] >= (3, 5) and "OpenSSL" in ssl.OPENSSL_VERSION)
