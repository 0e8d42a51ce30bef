"""`connector tunnel` without a command: a quick tunnel, or what to do instead.

Owns: the request for a tunnel that needs no account, and its checks. In: a Call. Out: an exit status.
Never: runs a tunnel that somebody has a token for; prints the secret that the service hands out.

*Strategy*: one POST before anything else runs, with the standard library; then the run is as any other, with the
credentials that came back.
"""

from __future__ import annotations

import base64
import json
import uuid
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from connector import __version__
from connector.app.command_table import Call
from connector.app.config import run_config
from connector.app.local_config import RUN_ONLY, configured_flags
from connector.app.log_table import log_table
from connector.app.logs import Logger
from connector.app.run import start_log
from connector.errors import ConfigError
from connector.wire.token import Token, encode_token

LIMIT_SECONDS = 15.0
"""For the request, as cloudflared has it: each read of the answer, and the connection before it."""

MAX_ANSWER = 256 * 1024
"""Bytes of an answer; real ones have some 400."""

DISCLAIMER = (
    "A quick tunnel needs no account, and lasts as long as this process. It is for trying out: nobody promises that it "
    "stays up, and the terms of the service that hands it out apply. For anything else make a named tunnel in the"
    " dashboard."
)


class QuickTunnel(NamedTuple):
    """What the service handed out."""

    token: Token
    hostname: str
    name: str


def quick(call: Call) -> int:
    """Run a quick tunnel, if --url or --hello-world asks for one."""
    flags, local = configured_flags(call.flags, skip=RUN_ONLY)
    call = call._replace(flags=flags)
    flags.check()
    if call.arguments:
        raise ConfigError(f"tunnel takes no argument {call.arguments[0]}")
    if flags.text("name"):
        raise ConfigError(
            "--name creates a tunnel, which this program does not do",
            advice=f"Make the tunnel in the dashboard, then: {call.program} tunnel run --token-file FILE.",
        )
    service = flags.text("quick-service")
    if not ((flags.is_set("url") or flags.value("hello-world") or flags.text("unix-socket")) and service):
        if local is not None and local.file.tunnel:
            raise ConfigError(
                f"use `{call.program} tunnel run` to start tunnel {local.file.tunnel}",
                advice=f"{local.path} names that tunnel.",
            )
        if flags.text("hostname"):
            raise ConfigError(
                "Classic tunnels have been deprecated, please use Named Tunnels.",
                advice="Leave --hostname out: host names belong to the tunnel's rules.",
            )
        raise ConfigError(
            f"You did not specify any valid additional argument to the {call.program} tunnel command.",
            advice=f"A tunnel of an account: {call.program} tunnel run --token-file FILE.\n"
            f"A quick tunnel: {call.program} tunnel --url http://localhost:8080.",
        )
    log = start_log(call)
    log.info(DISCLAIMER)
    log.info("Requesting new quick Tunnel on trycloudflare.com...")
    made = request_tunnel(service, log)
    log.output.redactor.add(encode_token(made.token))
    log.output.redactor.add_bytes(made.token.secret)
    url = made.hostname if made.hostname.startswith("https://") else f"https://{made.hostname}"
    log_table(log, ["Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):", url])

    config = run_config(flags, [], encode_token(made.token), local)
    config.ha_connections = 1
    config.token_given = True  # so that `auto` asks for no record: cloudflared dials quick tunnels over QUIC
    config.token_file = None
    config.quick_hostname = made.hostname

    from connector.app.process import run_tunnel  # noqa: PLC0415  (everything that a run needs)

    return run_tunnel(config, log)


def request_tunnel(service: str, log: Logger) -> QuickTunnel:
    """Ask `service` (a URL) for a tunnel. Errors: ConfigError."""
    status, body = _post(service)
    try:
        answer = json.loads(body)
        result = answer["result"]
        errors = _errors(answer)
        if result is None and errors:
            result = {}
        if not isinstance(result, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        text = body[:500].decode("utf-8", "replace")
        log.error("Error unmarshaling QuickTunnel response", status_code=status, body=text)
        raise ConfigError(
            f"failed to unmarshal quick Tunnel: {service} answered {status} with something that is none",
            advice="Try again later, or check --quick-service.",
        ) from None
    if answer.get("success") is False or not result:
        raise ConfigError(f"{service} gives no quick tunnel: {errors or f'status {status}'}", advice="Try again later.")
    try:
        tunnel_id = uuid.UUID(_text(result, "id"))
    except ValueError:
        raise ConfigError("failed to parse quick Tunnel ID", advice="Check --quick-service.") from None
    hostname = _text(result, "hostname")
    try:
        secret = base64.b64decode(_text(result, "secret"), validate=True)
    except ValueError:
        secret = b""
    if not hostname or not secret:
        raise ConfigError(f"{service} answered without host name or secret", advice="Check --quick-service.")
    return QuickTunnel(Token(_text(result, "account_tag"), secret, tunnel_id), hostname, _text(result, "name"))


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _errors(answer: dict[str, Any]) -> str:
    errors = answer.get("errors")
    if not isinstance(errors, list):
        return ""
    return "; ".join(f"{e.get('message')} (code {e.get('code')})" for e in errors if isinstance(e, dict))[:500]


def _post(service: str) -> tuple[int, bytes]:
    try:
        parts = urlsplit(service if "://" in service else f"https://{service}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if parts.scheme not in {"http", "https"} or not host:
        raise ConfigError(f'--quick-service: "{service}" is no URL', advice="Write https://HOST.")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(host, port, timeout=LIMIT_SECONDS)
    headers = {"Content-Type": "application/json", "User-Agent": f"tunnel-connector/{__version__}"}
    try:
        connection.request("POST", f"{parts.path.rstrip('/')}/tunnel", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER)
    except (OSError, HTTPException) as error:
        raise ConfigError(
            f"failed to request quick Tunnel: {service}: {error or type(error).__name__}",
            advice="Is the service to be reached from here? See --quick-service.",
        ) from None
    finally:
        connection.close()
