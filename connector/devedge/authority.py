"""The dev edge's own certificate authority and state directory.

Owns: `ca.pem`, `ca-key.pem` and the lock file in the state directory; leaf certificates, which live in memory only.
In: a directory, names for a leaf. Out: PEM paths, ready `ssl.SSLContext`s.
Never: leaves a key readable by others, or a half-written file under its final name.

Strategy: everything that makes or changes a file happens under one `flock`, and files appear by rename, so that two
processes may use one directory at once. Certificates carry every extension that OpenSSL's strict mode (on by default
in Python 3.13) and Go ask for: SKI, AKI, key usage, basic constraints.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from connector.errors import ConfigError

EDGE_LEAF_NAMES = (
    "h2.cftunnel.com",
    "quic.cftunnel.com",
    "probe.cftunnel.com",
    "cftunnel.com",
    "localhost",
    "127.0.0.1",
)
"""What connectors verify (edge-connection 6.1), and names for programs that look at the port by hand."""

PUBLIC_LEAF_NAMES = (
    "localhost", "127.0.0.1", "::1", "*.localhost", "management.argotunnel.com", "management.fed.argotunnel.com",
)  # fmt: skip
"""What visitors always may call the public side. OpenSSL takes no wildcard right below a top-level name, browsers may:
so each tunnel's NAME.localhost is in the leaf as well."""

CA_DAYS = 3650
LEAF_DAYS = 90
"""A leaf lives as long as one run of the edge, so this only bounds a forgotten process (Let's Encrypt: 90)."""


def default_state_dir() -> Path:
    """The state directory when none is given."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "tunnel-connector" / "edge"


class StateDir:
    """A private directory with atomic writes and one lock; made on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make the directory, mode 0700; raises ConfigError. One that is in other use keeps its mode."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not any(self.path.iterdir()):
                self.path.chmod(0o700)
        except OSError as error:
            raise ConfigError(
                f"state directory {self.path}: {error.strerror or error}", advice="Name another one with --state-dir."
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that serialises all changes; other processes wait."""
        self.prepare()
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"state directory {self.path}: {error.strerror or error}", advice="Name another one with --state-dir."
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def write(self, name: str, data: bytes) -> Path:
        """Write a file by rename, mode 0600."""
        target = self.path / name
        fd, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)  # made with mode 0600
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return target


def keylog_name() -> str | None:
    """Give the file that SSLKEYLOGFILE names, writable as of now, or None. Raises ConfigError."""
    name = os.environ.get("SSLKEYLOGFILE")
    if not name:
        return None
    try:
        with open(name, "a", encoding="ascii"):
            pass
    except OSError as error:
        raise ConfigError(
            f"SSLKEYLOGFILE names {name}, which cannot be written: {error.strerror or error}",
            advice="Unset SSLKEYLOGFILE, or name a file in a directory that exists and can be written.",
        ) from None
    return name


class TakesLeaf(Protocol):
    """An `ssl.SSLContext`, or the configuration of a QUIC library that looks like one here."""

    @property
    def load_cert_chain(self) -> Callable[[str], None]:
        """Load a PEM file with chain and key."""


class Authority:
    """A CA that signs leaves for this machine's dev edge."""

    def __init__(self, state: StateDir, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.state = state
        self._certificate = certificate
        self._key = key

    @property
    def ca_file(self) -> Path:
        """PEM file of the CA certificate."""
        return self.state.path / "ca.pem"

    @classmethod
    def open(cls, state: StateDir) -> Authority:
        """Load the CA, or make it; raises ConfigError when what is there cannot be used."""
        with state.locked():
            certificate_file, key_file = state.path / "ca.pem", state.path / "ca-key.pem"
            if not certificate_file.exists():
                certificate, key = _make_ca()
                state.write("ca-key.pem", _key_pem(key))
                state.write("ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
                return cls(state, certificate, key)
            again = f"Delete {certificate_file} to have a new authority made; connectors then need the new file."
            try:
                certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
                loaded = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            except (OSError, ValueError) as error:
                raise ConfigError(f"certificate authority in {state.path}: {error}", advice=again) from error
            if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != certificate.public_key():
                raise ConfigError(
                    f"certificate authority in {state.path}: ca-key.pem does not belong to ca.pem", advice=again
                )
            if certificate.not_valid_after_utc < _now() + datetime.timedelta(days=1):
                raise ConfigError(f"certificate authority in {state.path} has expired", advice=again)
            return cls(state, certificate, loaded)

    def server_context(self, names: Iterable[str], *, alpn: list[str] | None = None) -> ssl.SSLContext:
        """Make a server context (TLS 1.2 and up) with a fresh leaf for `names` (host names and addresses)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if alpn:
            context.set_alpn_protocols(alpn)
        keylog = keylog_name()
        if keylog is not None:
            context.keylog_filename = keylog
        self.load_leaf(context, names)
        return context

    def load_leaf(self, context: TakesLeaf, names: Iterable[str]) -> None:
        """Put a fresh leaf for `names` into a context; connections from now on use it."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign_leaf(key, list(dict.fromkeys(names)))
        pem = leaf.public_bytes(serialization.Encoding.PEM) + self._certificate.public_bytes(serialization.Encoding.PEM)
        # `ssl` takes files only: this one is private and gone at once. aioquic wants the key last.
        with tempfile.NamedTemporaryFile(dir=self.state.path, prefix=".leaf.", suffix=".pem") as file:
            file.write(pem + _key_pem(key))
            file.flush()
            context.load_cert_chain(file.name)

    def _sign_leaf(self, key: ec.EllipticCurvePrivateKey, names: list[str]) -> x509.Certificate:
        now = _now()
        issuer_key_id = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "connector dev edge")]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(min(now + datetime.timedelta(days=LEAF_DAYS), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )


def _make_ca() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "connector dev edge"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"connector dev edge CA {serial & 0xFFFFFFFF:08x}"),
        ]
    )
    now = _now()
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(key_id, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
