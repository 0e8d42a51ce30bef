"""Notices that the token file has a new content: the tunnel's secret was rotated.

Owns: the look at the file, from time to time. In: a path, the token in force. Out: a call with the new token.
Never: takes a token that does not decode or is another tunnel's; prints one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from connector.app.config import TOKEN_LIMIT
from connector.app.logs import Logger
from connector.errors import WireError
from connector.wire.token import Token, decode_token

LOOK_SECONDS = 5.0
"""Between two looks. A look is one stat(2). Kubernetes brings a changed secret to its volume within a minute; there the
file is a link to a link, so that its directory would tell nothing to inotify."""


class TokenWatch:
    """One per run with --token-file. `start` inside the loop; `close` ends it."""

    def __init__(
        self, path: str, token: Token, log: Logger, on_token: Callable[[Token], None], *, interval: float = LOOK_SECONDS
    ) -> None:
        self._path = path
        self._token = token
        self._log = log
        self._on_token = on_token
        self._interval = interval
        self._stamp: tuple[int, int, int] | None = None  # so that the first look reads: it may have changed already
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to look."""
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self.start()
        stamp = self._look()
        if stamp is not None and stamp != self._stamp:  # a file that is gone for a moment is being replaced
            self._stamp = stamp
            self._read()

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                text = file.read(TOKEN_LIMIT).decode().strip()
            token = decode_token(text)
        except (OSError, ValueError, WireError) as error:
            cause = "Provided Tunnel token is not valid." if isinstance(error, WireError) else str(error)
            self._log.error(
                "The token file changed, but holds no token; the old one stays in use",
                error=cause,
                advice=f"Write the tunnel's token to {self._path}.",
            )
            return
        if (token.account_tag, token.tunnel_id, token.endpoint) != (
            self._token.account_tag,
            self._token.tunnel_id,
            self._token.endpoint,
        ):
            self._log.error(
                "The token file holds the token of another tunnel; the old one stays in use",
                tunnelID=str(token.tunnel_id),
                advice="Restart the connector to serve another tunnel.",
            )
            return
        if token.secret == self._token.secret:
            return
        self._token = token
        self._log.output.redactor.add(text)
        self._log.output.redactor.add_bytes(token.secret)
        self._log.info("The token file has a new token: registering again with it")
        self._on_token(token)
