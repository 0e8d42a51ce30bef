"""The certificate authority: what strict verifiers ask for, private files, two processes at once."""

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from connector.devedge.authority import EDGE_LEAF_NAMES, PUBLIC_LEAF_NAMES, Authority, StateDir, default_state_dir
from connector.errors import ConfigError

STRICT = ssl.VERIFY_X509_STRICT


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    """Do a TLS handshake in memory; raises what the client raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass


@pytest.mark.parametrize("name", [*EDGE_LEAF_NAMES, "::1", "demo.localhost", "app.test"])
def test_strict_clients_accept_the_leaves(tmp_path: Path, name: str) -> None:
    authority = Authority.open(StateDir(tmp_path / "state"))
    names = [*EDGE_LEAF_NAMES, *PUBLIC_LEAF_NAMES, "demo.localhost", "app.test"]
    client = ssl.create_default_context(cafile=str(authority.ca_file))
    client.verify_flags |= STRICT
    handshake(authority.server_context(names), client, name)


def test_other_names_and_other_authorities_are_refused(tmp_path: Path) -> None:
    authority = Authority.open(StateDir(tmp_path / "one"))
    other = Authority.open(StateDir(tmp_path / "two"))
    server = authority.server_context(EDGE_LEAF_NAMES)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server, ssl.create_default_context(cafile=str(authority.ca_file)), "example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, ssl.create_default_context(cafile=str(other.ca_file)), "h2.cftunnel.com")


def test_the_authority_has_the_extensions_of_an_authority(tmp_path: Path) -> None:
    authority = Authority.open(StateDir(tmp_path))
    certificate = x509.load_pem_x509_certificate(authority.ca_file.read_bytes())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer_id = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert issuer_id.key_identifier == key_id.digest


def test_files_are_private_and_nothing_else_is_left(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    authority = Authority.open(StateDir(state))
    authority.server_context(EDGE_LEAF_NAMES)
    assert state.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in state.iterdir()) == ["ca-key.pem", "ca.pem", "lock"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in state.iterdir())


def test_a_directory_in_other_use_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    tmp_path.chmod(0o755)
    Authority.open(StateDir(tmp_path))
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_it_is_made_once(tmp_path: Path) -> None:
    first = Authority.open(StateDir(tmp_path)).ca_file.read_bytes()
    assert Authority.open(StateDir(tmp_path)).ca_file.read_bytes() == first


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    code = "import sys; from connector.devedge.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code]
    jobs = [
        subprocess.Popen(
            [*command, *arguments, "--state-dir", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in (["ca"], ["token", "x"]) * 3
    ]
    results = [job.communicate(timeout=60) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), results
    assert len({out for out, _ in results}) == 2
    assert results[0][0].strip() == str(tmp_path / "ca.pem")
    Authority.open(StateDir(tmp_path))  # key and certificate belong together


def test_damage_is_named(tmp_path: Path) -> None:
    Authority.open(StateDir(tmp_path))
    other = Authority.open(StateDir(tmp_path / "other"))
    os.replace(tmp_path / "other" / "ca-key.pem", tmp_path / "ca-key.pem")
    with pytest.raises(ConfigError, match="does not belong") as caught:
        Authority.open(StateDir(tmp_path))
    assert "Delete" in caught.value.advice
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="certificate authority in"):
        Authority.open(StateDir(tmp_path))
    assert other.ca_file.exists()


def test_an_impossible_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="state directory"):
        Authority.open(StateDir(tmp_path / "file" / "state"))


def test_the_default_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / "tunnel-connector" / "edge"


def test_keys_are_elliptic(tmp_path: Path) -> None:
    Authority.open(StateDir(tmp_path))
    key = serialization.load_pem_private_key((tmp_path / "ca-key.pem").read_bytes(), password=None)
    assert key.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]
