"""The edge's half of the TLS handshake under QUIC: aioquic's, and the key exchanges that connectors ask for.

Owns: the answer to a ClientHello: X25519MLKEM768 where `cryptography` has ML-KEM, X25519, P-256, and a
HelloRetryRequest (RFC 8446 4.1.4) when the connector offers one of them but sent no share of it.
In: aioquic's TLS context, with its private attributes. Out: handshake messages.
Never: resumes sessions or asks for client certificates; connectors do neither.

aioquic knows X25519 and the NIST curves, and no retry. cloudflared sends one share, X25519MLKEM768, and offers P-256
next to it, so without this module it could not connect.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from aioquic import tls
from aioquic._buffer import Buffer
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

try:
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
except ImportError:  # cryptography before 47
    MLKEM768PublicKey = None  # type: ignore[assignment,misc]

X25519MLKEM768 = 0x11EC
P256 = 0x0017
X25519 = 0x001D

MLKEM_SHARE = 1184
"""Bytes of an ML-KEM-768 encapsulation key, in front of the X25519 share."""

RETRY_RANDOM = hashlib.sha256(b"HelloRetryRequest").digest()
MESSAGE_HASH = b"\xfe\x00\x00"


def _with_x25519(share: bytes) -> tuple[bytes, bytes]:
    key = x25519.X25519PrivateKey.generate()
    secret = key.exchange(x25519.X25519PublicKey.from_public_bytes(share))
    return key.public_key().public_bytes_raw(), secret


def _with_p256(share: bytes) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), share))
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint), secret


def _with_hybrid(share: bytes) -> tuple[bytes, bytes]:
    secret, ciphertext = MLKEM768PublicKey.from_public_bytes(share[:MLKEM_SHARE]).encapsulate()
    answer, classical = _with_x25519(share[MLKEM_SHARE:])
    return ciphertext + answer, secret + classical


EXCHANGES: dict[int, Callable[[bytes], tuple[bytes, bytes]]] = {X25519: _with_x25519, P256: _with_p256}
"""Per group: the peer's share to ours and the secret; ValueError for a bad one. Best first."""

if MLKEM768PublicKey is not None:
    EXCHANGES = {X25519MLKEM768: _with_hybrid, **EXCHANGES}


class ServerContext(tls.Context):
    """aioquic's context with another answer to ClientHello. Made by `adopt`."""

    _retried: tls.KeySchedule | None = None

    @classmethod
    def adopt(cls, context: tls.Context) -> None:
        """Turn a server's context into this class."""
        context.__class__ = cls

    def _server_handle_hello(self, input_buf: Buffer, initial_buf: Buffer, handshake_buf: Buffer) -> None:
        hello = tls.pull_client_hello(input_buf)
        suite = tls.negotiate(
            self._cipher_suites, hello.cipher_suites, tls.AlertHandshakeFailure("no common cipher suite")
        )
        algorithm = tls.negotiate(
            self._signature_algorithms_for_private_key(),
            hello.signature_algorithms,
            tls.AlertHandshakeFailure("no common signature algorithm"),
        )
        version = tls.negotiate(
            self._supported_versions, hello.supported_versions, tls.AlertProtocolVersion("not TLS 1.3")
        )
        shares = dict(hello.key_share or ())
        group = next((known for known in EXCHANGES if known in shares), None)
        if group is None:
            self._ask_again(hello, suite, version, input_buf.data, initial_buf)
            return

        self.alpn_negotiated = tls.negotiate(
            self._alpn_protocols or [], hello.alpn_protocols, tls.AlertNoApplicationProtocol("no common ALPN protocol")
        )
        self.client_random = hello.random
        self.server_random = os.urandom(32)
        self.legacy_session_id = hello.legacy_session_id
        self.received_extensions = hello.other_extensions
        if self.alpn_cb is not None:
            self.alpn_cb(self.alpn_negotiated)
        try:
            share, secret = EXCHANGES[group](shares[group])
        except ValueError:
            raise tls.AlertIllegalParameter("the key share is invalid") from None

        schedule = self.key_schedule = self._retried or tls.KeySchedule(suite)
        schedule.extract(None)
        schedule.update_hash(input_buf.data)
        with tls.push_message(schedule, initial_buf):
            answer = tls.ServerHello(self.server_random, self.legacy_session_id, suite, tls.CompressionMethod.NULL)
            answer.key_share = (group, share)
            answer.supported_version = version
            tls.push_server_hello(initial_buf, answer)
        schedule.extract(secret)
        self._setup_traffic_protection(tls.Direction.ENCRYPT, tls.Epoch.HANDSHAKE, b"s hs traffic")
        self._setup_traffic_protection(tls.Direction.DECRYPT, tls.Epoch.HANDSHAKE, b"c hs traffic")
        self._prove(algorithm, handshake_buf)
        schedule.extract(None)
        self._setup_traffic_protection(tls.Direction.ENCRYPT, tls.Epoch.ONE_RTT, b"s ap traffic")
        self._next_dec_key = schedule.derive_secret(b"c ap traffic")
        self._psk_key_exchange_mode = None
        self._server_expect_finished()

    def _ask_again(
        self, hello: tls.ClientHello, suite: tls.CipherSuite, version: int, message: bytes, initial_buf: Buffer
    ) -> None:
        """Send a HelloRetryRequest; the transcript goes on with the hash of the first ClientHello."""
        group = next((known for known in EXCHANGES if known in (hello.supported_groups or ())), None)
        if group is None or self._retried is not None:
            raise tls.AlertHandshakeFailure("no common key exchange group")
        first, schedule = tls.KeySchedule(suite), tls.KeySchedule(suite)
        first.update_hash(message)
        digest = first.hash.finalize()
        schedule.update_hash(MESSAGE_HASH + bytes([len(digest)]) + digest)
        with tls.push_message(schedule, initial_buf):
            retry = tls.ServerHello(RETRY_RANDOM, hello.legacy_session_id, suite, tls.CompressionMethod.NULL)
            retry.supported_version = version
            retry.other_extensions.append((tls.ExtensionType.KEY_SHARE, group.to_bytes(2)))
            tls.push_server_hello(initial_buf, retry)
        self._retried = schedule

    def _prove(self, algorithm: tls.SignatureAlgorithm, out: Buffer) -> None:
        """Send EncryptedExtensions to Finished."""
        schedule, certificate, key = self.key_schedule, self.certificate, self.certificate_private_key
        assert schedule is not None
        assert certificate is not None
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # what authority.py makes
        assert self._enc_key is not None
        with tls.push_message(schedule, out):
            tls.push_encrypted_extensions(
                out,
                tls.EncryptedExtensions(alpn_protocol=self.alpn_negotiated, other_extensions=self.handshake_extensions),
            )
        with tls.push_message(schedule, out):
            chain = [certificate, *self.certificate_chain]
            tls.push_certificate(out, tls.Certificate(b"", [(each.public_bytes(Encoding.DER), b"") for each in chain]))
        signed = schedule.certificate_verify_data(tls.SERVER_CONTEXT_STRING)
        signature = key.sign(signed, *tls.signature_algorithm_params(algorithm))
        with tls.push_message(schedule, out):
            tls.push_certificate_verify(out, tls.CertificateVerify(algorithm, signature))
        with tls.push_message(schedule, out):
            tls.push_finished(out, tls.Finished(schedule.finished_verify_data(self._enc_key)))
