"""Whom a QUIC link trusts: the same certificates as `tls.edge_context`, in the form that QUIC libraries take.

Owns: the list of trusted certificates as PEM, the key log file's name.
In: an optional `--cacert` file. Out: QuicContext; ConfigError about the file.
Never: dials, or turns verification off.
"""

from __future__ import annotations

import os
import re
import ssl
from functools import cache

from connector.transport.tls import edge_context

_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.\d+")


class QuicContext:
    """What `dial_quic` needs to know of TLS: trusted certificates (PEM) and where to log keys, if anywhere."""

    __slots__ = ("cadata", "keylog")

    def __init__(self, cadata: bytes, keylog: str | None = None) -> None:
        self.cadata = cadata
        self.keylog = keylog

    def __repr__(self) -> str:
        return f"<QuicContext {self.cadata.count(b'BEGIN')} certificates>"


def quic_context(cacert: str | None = None, same: ssl.SSLContext | None = None) -> QuicContext:
    """Return the trust for QUIC links: system roots and the edge's authorities, or only the certificates of `cacert`.

    Make one at start and keep it: it reads the system's roots (25 ms), unless `same` is an `edge_context` of the same
    `cacert`. Errors: ConfigError about the file or SSLKEYLOGFILE.
    """
    # edge_context also checks the files and words what is wrong with them.
    context = same if same is not None else edge_context(cacert, transport="quic")
    found = dict.fromkeys(context.get_ca_certs(binary_form=True))
    if cacert is None:
        found |= dict.fromkeys(_roots_of_directory())
    pem = "".join(ssl.DER_cert_to_PEM_cert(certificate) for certificate in found)
    return QuicContext(pem.encode(), os.environ.get("SSLKEYLOGFILE") or None)


@cache
def _roots_of_directory() -> tuple[bytes, ...]:
    """Return the certificates of the system's hashed directory, which OpenSSL itself reads only as it needs them."""
    directory = ssl.get_default_verify_paths().capath
    found: list[bytes] = []
    try:
        names = sorted(name for name in os.listdir(directory or "") if _HASHED_NAME.fullmatch(name))
    except OSError:
        return ()
    for name in names:
        try:
            with open(os.path.join(directory or "", name), encoding="ascii") as file:
                text = file.read()
            start = text.index("-----BEGIN CERTIFICATE-----")
            end = text.index("-----END CERTIFICATE-----", start) + len("-----END CERTIFICATE-----")
            found.append(ssl.PEM_cert_to_DER_cert(text[start:end]))
        except (OSError, ValueError):
            continue  # one bad file must not cost the others
    return tuple(found)
