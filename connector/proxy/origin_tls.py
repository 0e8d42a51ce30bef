"""TLS towards origins, and texts for what goes wrong on the way to one.

Owns: trusted roots and verification of origin connections; the translation of dial failures.
In: Service, OriginSettings, exceptions of socket and ssl. Out: ssl.SSLContext; OriginDialError, OriginTimeoutError.
Never: dials.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Sequence

from connector.errors import ConfigError, OriginDialError, OriginError, OriginTimeoutError
from connector.proxy.ingress import OriginSettings, Rule, Service

_LOCALHOST_ADVICE = {
    False: " Inside a container, localhost is the container itself: use the service's container name.",
    True: " This process runs inside a container, where localhost is the container itself, not the machine: use the "
    "name of the service's container (on a network that both share), or host.docker.internal for a service of the "
    "machine.",
}


def in_container() -> bool:
    """Tell whether this process seems to run in a container (Docker, Podman, Kubernetes)."""
    return (
        os.path.exists("/.dockerenv")
        or os.path.exists("/run/.containerenv")
        or "KUBERNETES_SERVICE_HOST" in os.environ
        or bool(os.environ.get("container"))  # noqa: SIM112  (systemd's and Podman's name is lower case)
    )


def origin_context(settings: OriginSettings, *, http2: bool = False) -> ssl.SSLContext:
    """Return the client context of a rule: system roots plus `caPool`, TLS 1.2 and later; ALPN only for `http2`.

    Errors: ConfigError for a `caPool` that cannot be read. One without certificates only adds nothing.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 turned this on; Go has no such check and origins' home-made CAs often fail it.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    for certificate in read_ca_pool(settings):
        try:
            context.load_verify_locations(cadata=certificate)
        except ssl.SSLError:
            continue  # the others count all the same, as in Go
    if http2:
        context.set_alpn_protocols(["h2", "http/1.1"])
    if settings.no_tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


def read_ca_pool(settings: OriginSettings) -> list[str]:
    """Return the certificates in `caPool`, as PEM; there may be none. Errors: ConfigError when it cannot be read."""
    if not settings.ca_pool:
        return []
    try:
        with open(settings.ca_pool, encoding="latin-1") as file:
            return _CERTIFICATE.findall(file.read())
    except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a null character
        raise ConfigError(
            f"caPool {settings.ca_pool!r} cannot be read: {getattr(error, 'strerror', None) or error}",
            advice="check the path as this process sees it (inside a container: is the file mounted?)",
        ) from None


def _is_certificate(pem: str) -> bool:
    try:
        ssl.create_default_context(cadata=pem)
    except ssl.SSLError:
        return False
    return True


class ContextCache:
    """Contexts for one rule set: rules that trust the same roots share one (making one takes 10-20 ms)."""

    def __init__(self) -> None:
        self._contexts: dict[tuple[str, bool, bool], ssl.SSLContext] = {}
        self._pools: dict[str, bool] = {}

    def doubt(self, rule: Rule) -> str:
        """Return what is wrong with a rule's `caPool` although it can be read; nothing mostly. Errors: ConfigError.

        Read for plain HTTP too, as cloudflared does: a path that leads nowhere is found when it is configured.
        """
        path = rule.settings.ca_pool
        if path not in self._pools:
            self._pools[path] = not path or any(map(_is_certificate, read_ca_pool(rule.settings)))
        if self._pools[path]:
            return ""
        return (
            f"Rule #{rule.index + 1}: originRequest.caPool: could not append the provided origin CA to the "
            f"certificate pool: {path} holds no certificate in PEM"
        )

    def get(self, service: Service, settings: OriginSettings, *, http2: bool = False) -> ssl.SSLContext | None:
        """Return the context of a TLS service, None for a plain one. Errors: ConfigError."""
        if not service.tls:
            return None
        key = (settings.ca_pool, settings.no_tls_verify, http2)
        context = self._contexts.get(key)
        if context is None:
            context = self._contexts[key] = origin_context(settings, http2=http2)
        return context


def connect_error(service: Service, error: OSError, tried: Sequence[str]) -> OriginError:
    """Return what a failed name lookup or TCP (unix) connect means."""
    where = f"origin {service.text}"
    at = f" (tried {', '.join(tried)})" if tried else ""
    if isinstance(error, socket.gaierror):
        return OriginDialError(
            f"{where}: no such host {service.host!r}: {error.strerror}",
            advice="check the name in the ingress rule; names of containers resolve only on a network they share",
            cause="dns",
        )
    if isinstance(error, TimeoutError):
        return connect_timeout(service, 0, tried)
    if service.path:
        advice = {
            errno.ENOENT: "no such socket file: is the service up, and is the directory mounted here?",
            errno.EACCES: "this process may not open the socket: check its owner and mode",
        }.get(error.errno or 0, "the socket file is there but nobody listens on it: is the service up?")
        cause = "refused" if error.errno in {errno.ENOENT, errno.ECONNREFUSED} else "unreachable"
        return OriginDialError(f"{where}: cannot connect: {error.strerror or error}", advice=advice, cause=cause)
    if isinstance(error, ConnectionRefusedError):
        advice = "nothing listens there: is the service up (for a broker: its websockets listener, often port 9001)?"
        if service.host == "localhost" or service.host.startswith("127.") or service.host == "::1":
            advice += _LOCALHOST_ADVICE[in_container()]
        return OriginDialError(f"{where}: connection refused{at}", advice=advice, cause="refused")
    return OriginDialError(
        f"{where}: cannot connect: {error.strerror or error}{at}",
        advice="check the route to this address",
        cause="reset" if isinstance(error, ConnectionError) else "unreachable",
    )


def connect_timeout(service: Service, limit: float, tried: Sequence[str]) -> OriginTimeoutError:
    """Return the error of a connect that nobody answered."""
    within = f" within {limit:g} s" if limit else ""
    at = f" (tried {', '.join(tried)})" if tried else ""
    return OriginTimeoutError(
        f"origin {service.text}: no connection{within}{at}",
        advice="a firewall that drops packets, or a wrong address; connectTimeout sets the limit",
    )


def tls_error(service: Service, error: BaseException, server_name: str) -> OriginError:
    """Return what a failed TLS handshake means."""
    where = f"origin {service.text}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return OriginDialError(
            f"{where}: certificate not accepted for {server_name!r}: {error.verify_message}",
            advice="set originServerName to a name in the certificate, caPool to the CA that signed it, or noTLSVerify",
            cause="tls",
        )
    if isinstance(error, ssl.SSLError) and error.reason in {
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
    }:
        return OriginDialError(
            f"{where}: the answer to the TLS handshake is not TLS",
            advice="does the origin speak plain HTTP on this port? then the service is http:// (or ws://)",
            cause="tls",
        )
    reason = (error.reason if isinstance(error, ssl.SSLError) else "") or str(error) or type(error).__name__
    return OriginDialError(
        f"{where}: TLS handshake failed: {reason}",
        advice="the origin must speak TLS 1.2 or later on this port and may not ask for a client certificate",
        cause="tls",
    )


def tls_timeout(service: Service, limit: float) -> OriginTimeoutError:
    """Return the error of a handshake that did not end in time."""
    return OriginTimeoutError(
        f"origin {service.text}: TLS handshake not done within {limit:g} s",
        advice="does the origin speak TLS on this port? tlsTimeout sets the limit",
    )
