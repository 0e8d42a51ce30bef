"""Management at the dev edge: tokens for one tunnel, and which connector a request with such a token is for.

Owns: the signing key in the state directory, the tokens' form and life, the routing by token and `connector_id`.
In: a tunnel and a name; the target of a request for the management host. Out: tokens; the link to use.
Never: shows a token's content to anybody but its connector.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from uuid import UUID

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from connector.devedge.authority import StateDir
from connector.devedge.tunnels import Tunnel
from connector.errors import ConfigError, ConnectorError

if TYPE_CHECKING:
    from connector.devedge.connectors import Link, Roster

HOSTS = ("management.argotunnel.com", "management.fed.argotunnel.com")

KEY_FILE = "management.pem"
ALGORITHM = "ES256"
ISSUER = "tunnelstore"
TOKEN_SECONDS = 3600
"""Life of a token, as the real ones have."""


class ManagementError(ConnectorError):
    """A management request that goes to no connector; `status` and the text are its answer."""

    def __init__(self, message: str, *, status: int, advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.status = status


class ManagementDesk:
    """Issues tokens and checks them. One per state directory."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._key: ec.EllipticCurvePrivateKey | None = None

    def issue(self, tunnel: Tunnel, actor: str = "dev@localhost") -> str:
        """Make a token for one tunnel."""
        import jwt  # noqa: PLC0415  (slow, and rarely needed)

        now = int(time.time())
        claims = {
            "tun": {"id": str(tunnel.id), "account_tag": tunnel.account},
            "actor": {"id": actor, "support": False},
            "iss": ISSUER, "iat": now, "exp": now + TOKEN_SECONDS,
        }  # fmt: skip
        return jwt.encode(claims, self._signing_key(), algorithm=ALGORITHM)

    def route(self, roster: Roster, target: bytes) -> Link:
        """Give the link of the connector that a management request is for. Errors: ManagementError."""
        query = parse_qs(target.partition(b"?")[2].decode("latin-1"), max_num_fields=32)
        token = query.get("access_token", [""])[0]
        if not token:
            raise ManagementError("missing access_token query parameter", status=400)
        claims = self._check(token)
        tunnel = next((each for each in roster.directory.tunnels.values() if str(each.id) == claims["tun"]["id"]), None)
        links = roster.links_of(tunnel) if tunnel is not None else []
        wanted = query.get("connector_id", [""])[0]
        if wanted:
            links = [
                link for link in links if link.registration is not None and _same(link.registration.connector, wanted)
            ]
        if not links:
            raise ManagementError(
                "no connector of this tunnel is attached" + (f" with the id {wanted}" if wanted else ""),
                status=530,
                advice="Start a connector with the tunnel's token.",
            )
        return links[0]

    def _check(self, token: str) -> dict[str, Any]:
        import jwt  # noqa: PLC0415  (as above)

        try:
            claims: dict[str, Any] = jwt.decode(
                token, self._signing_key().public_key(), algorithms=[ALGORITHM], issuer=ISSUER
            )
            str(claims["tun"]["id"])
        except (jwt.PyJWTError, KeyError, TypeError) as error:
            raise ManagementError(
                f"the management token is not valid: {error}",
                status=403,
                advice="Make one with `connector edge management NAME`.",
            ) from None
        return claims

    def _signing_key(self) -> ec.EllipticCurvePrivateKey:
        if self._key is None:
            with self._state.locked():
                path = self._state.path / KEY_FILE
                try:
                    found = serialization.load_pem_private_key(path.read_bytes(), None)
                except FileNotFoundError:
                    found = ec.generate_private_key(ec.SECP256R1())
                    pem = found.private_bytes(
                        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                    )
                    self._state.write(KEY_FILE, pem)
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{path}: {error}", advice="Delete it; a new key is made.") from error
            if not isinstance(found, ec.EllipticCurvePrivateKey):
                raise ConfigError(f"{path}: not a key for {ALGORITHM}", advice="Delete it; a new key is made.")
            self._key = found
        return self._key


def _same(connector: object, wanted: str) -> bool:
    try:
        return str(connector) == str(UUID(wanted))
    except ValueError:
        return False
