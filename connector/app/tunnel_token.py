"""`connector tunnel token`, `connector management token`: tokens of a tunnel, by the account's certificate.

Owns: reading `cert.pem`, two questions to Cloudflare's API. In: a Call. Out: the token on stdout, or a file of them.
Never: shows the API's key; writes over a file.
"""

from __future__ import annotations

import base64
import json
import os
import re
import uuid
from typing import Any, Final, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from connector import __version__
from connector.app.command_table import Call
from connector.app.local_config import DIRECTORIES, configured_flags
from connector.errors import ConfigError, UsageError, WireError
from connector.wire.token import Token, decode_token, encode_token

LIMIT_SECONDS: Final = 15.0
MAX_ANSWER: Final = 1 << 20
MAX_CERTIFICATE: Final = 1 << 20
FILE_MODE: Final = 0o400
NAME: Final = "cert.pem"
_BLOCK = re.compile(rb"-----BEGIN ARGO TUNNEL TOKEN-----\s(.*?)-----END ARGO TUNNEL TOKEN-----", re.DOTALL)


RESOURCES: Final = ("logs", "admin", "host_details")
"""What a management token may be for."""


class Account(NamedTuple):
    """Who asks, as `cert.pem` says."""

    account_id: str
    key: str

    def __repr__(self) -> str:
        return f"<Account {self.account_id}>"


def tunnel_token(call: Call) -> int:
    """Print the token, or write it as a credentials file."""
    if len(call.arguments) != 1:
        raise UsageError(
            f'"{call.program} tunnel token" requires exactly 1 argument, the name or UUID of tunnel to fetch the'
            " credentials token for."
        )
    url, account = _tunnel(call)
    text = _ask(f"{url}/token", account, "get tunnel token")
    try:
        token = decode_token(str(text))
    except WireError as error:
        raise ConfigError("the Cloudflare API answered with a token that is none", advice=error.advice) from None
    path = call.flags.text("credentials-file")
    if path:
        _write(os.path.expanduser(path), token)
    else:
        print(encode_token(token))
    return 0


def management_token(call: Call) -> int:
    """Print a token for the management of a tunnel, as cloudflared does: a JSON object."""
    if len(call.arguments) != 1:
        raise UsageError(f"{call.program} management token takes one argument, the name or UUID of the tunnel")
    resource = call.flags.text("resource")
    if resource not in RESOURCES:
        raise UsageError(
            f"invalid resource '{resource}': must be one of: {', '.join(RESOURCES)}", advice="Give --resource logs."
        )
    url, account = _tunnel(call)
    token = _ask(f"{url}/management/{resource}", account, "get tunnel token", method="POST")
    print(json.dumps({"token": str(token)}))
    return 0


def _tunnel(call: Call) -> tuple[str, Account]:
    """Give the API's URL of the tunnel that the argument names, and who asks. Errors: ConfigError."""
    flags, _ = configured_flags(call.flags)
    account = read_account(_certificate(flags.text("origincert")))
    base = f"{flags.text('api-url').rstrip('/')}/accounts/{quote(account.account_id)}/cfd_tunnel"
    return f"{base}/{_find(base, account, call.arguments[0])}", account


def _certificate(path: str) -> str:
    """Give the path of the certificate: the flag's, or the first default one. Errors: ConfigError."""
    places = [path] if path else [os.path.join(directory, NAME) for directory in DIRECTORIES]
    for place in map(os.path.expanduser, places):
        if os.path.isfile(place):
            return place
    if path:
        raise ConfigError(f"Cannot find a valid certificate for your origin at the path: {path}", advice=_LOGIN)
    raise ConfigError(
        "Error locating origin cert: client didn't specify origincert path",
        advice=f"No file {NAME} in [{' '.join(DIRECTORIES)}]. {_LOGIN}",
    )


_LOGIN = "Give --origincert FILE (TUNNEL_ORIGIN_CERT), which `cloudflared tunnel login` of Cloudflare's own makes."


def read_account(path: str) -> Account:
    """Read a certificate file; only its block ARGO TUNNEL TOKEN counts. Errors: ConfigError."""
    try:
        with open(path, "rb") as file:
            blocks = _BLOCK.findall(file.read(MAX_CERTIFICATE))
        fields = json.loads(base64.b64decode(blocks[0])) if blocks else {}
    except OSError as error:
        raise ConfigError(f"Can't read origin cert from {path}: {error.strerror or error}", advice=_LOGIN) from None
    except (ValueError, RecursionError):
        fields = {}
    if len(blocks) > 1:
        raise ConfigError(f"Error decoding origin cert {path}: found multiple tokens in the certificate", advice=_LOGIN)
    fields = fields if isinstance(fields, dict) else {}
    account, key = fields.get("accountID"), fields.get("apiToken")
    if not (isinstance(account, str) and account and isinstance(key, str) and key.isascii() and key.isprintable()):
        raise ConfigError(f"Error decoding origin cert {path}: missing token in the certificate", advice=_LOGIN)
    return Account(account, key)


def _find(base: str, account: Account, wanted: str) -> uuid.UUID:
    """Give the ID of a tunnel by ID or name. Errors: ConfigError."""
    try:
        return uuid.UUID(wanted)
    except ValueError:
        pass
    found = _ask(f"{base}?{urlencode({'is_deleted': 'false', 'name': wanted})}", account, "list tunnels")
    try:
        (tunnel,) = found
        return uuid.UUID(tunnel["id"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"error parsing tunnel ID: {wanted} is neither the ID nor the name of any of your tunnels",
            advice="The dashboard lists them: Networks > Tunnels.",
        ) from None


def _ask(url: str, account: Account, what: str, *, method: str = "GET") -> Any:
    """Give the `result` of an answer. Errors: ConfigError."""
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"--api-url: not an HTTP URL: {url.partition('/accounts/')[0]}")
    headers = {
        "Authorization": f"Bearer {account.key}", "Accept": "application/json;version=1",
        "User-Agent": f"cloudflared/{__version__}",
    }  # fmt: skip
    status = 0
    try:
        with urlopen(Request(url, headers=headers, method=method), timeout=LIMIT_SECONDS) as answer:  # noqa: S310  (HTTP, see above)
            status, body = answer.status, answer.read(MAX_ANSWER)
    except HTTPError as error:
        with error:
            status, body = error.code, error.read(MAX_ANSWER)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"REST request failed: {reason}", advice="Check --api-url and the way to it.") from None
    try:
        document = json.loads(body)
        errors = [f"code: {each['code']}, reason: {each['message']}" for each in document.get("errors") or ()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        document, errors = {}, []
    if status != 200 or errors or document.get("success") is not True:
        advice = {
            401: "The certificate's key is not valid any more; log in again.",
            403: "The certificate's key is not valid any more; log in again.",
            404: "Is the tunnel of this account, and not deleted?",
        }.get(status, "Try again later.")
        said = "; ".join(errors) or f"the API answered {status}"
        raise ConfigError(f"Failed to {what}: {said}", advice=advice)
    return document.get("result")


def _write(path: str, token: Token) -> None:
    """Write a credentials file that only its owner reads. Errors: ConfigError."""
    fields = {
        "AccountTag": token.account_tag,
        "TunnelSecret": base64.b64encode(token.secret).decode(),
        "TunnelID": str(token.tunnel_id),
        "Endpoint": token.endpoint,
    }
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE), "w", encoding="utf-8") as file:
            json.dump(fields, file)
    except OSError as error:
        raise ConfigError(
            f"error writing token credentials to JSON file in path {path}: {error.strerror or error}",
            advice="The file must not exist yet.",
        ) from None
