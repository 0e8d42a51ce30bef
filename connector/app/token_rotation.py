"""A tunnel whose secret was rotated: which token registrations use, and which connection registers again next.

Owns: the token in force and the one before it. In: a new token, registrations and refusals. Out: one conn_index after
another. Never: touches a connection.

*Strategy*: one connection at a time leaves its link to drain and registers again; the next one follows when that
registration stands, so that a tunnel with several connections serves all the time. If the edge refuses the new token,
the old one is in force again: it may be the file that is wrong.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from connector.wire.token import Token


class TokenRotation:
    """One per run."""

    def __init__(self, token: Token) -> None:
        self.token = token
        """What registrations of now use."""
        self._before: Token | None = None
        self._waiting: list[int] = []
        self._mark = -1

    @property
    def before(self) -> Token | None:
        """The token that is in force again if the edge refuses the new one; None when there is no way back."""
        return self._before

    def begin(self, token: Token, connections: Iterable[int]) -> None:
        """Put `token` in force; `connections` are to register again."""
        self._before = self.token if self._before is None else self._before
        self.token = token
        self._waiting = list(connections)
        self._mark = -1

    def next_move(self, connected: Container[int], registrations: int) -> int | None:
        """Give the connection that should register again now. `registrations` counts all of this run."""
        if registrations <= self._mark:
            return None  # the one before is still on its way
        while self._waiting:
            conn_index = self._waiting.pop(0)
            if conn_index in connected:  # the others register with the new token anyway
                self._mark = registrations
                return conn_index
        return None

    def accepted(self, token: Token) -> None:
        """Note a registration with `token`: there is no way back behind it."""
        if token is self.token:
            self._before = None

    def refused(self, token: Token) -> bool:
        """Note that the edge refused `token`; whether the one before it is in force again."""
        if self._before is None or token is not self.token:
            return False
        self.token, self._before = self._before, None
        self._waiting = []
        return True
