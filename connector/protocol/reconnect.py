"""What to do after an edge connection failed: wait how long, at which address, or end the process.

Owns: the classification of failed attempts, the back-off schedule and the rule which failures end the process.
In: a RetryState, an error, the time and a random number. Out: a Decision with the next RetryState.
Never: sleeps, reads a clock, draws random numbers, logs; knows no socket.

Strategy: everything is a value. One `RetryState` per conn_index lives in the caller; `RetryPolicy` holds what the flags
say; `RetryPolicy.decide` is a pure function over the two. What a retry in seconds does not mend goes to the second,
slower schedule (`outer_backoff.py`), where connections wait together.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from connector.errors import (
    DuplicateConnectionError,
    EdgeDialError,
    EdgeLostError,
    ProtocolError,
    RegistrationError,
    UnauthorizedError,
)

BASE_WAIT = 1.0
"""Seconds that the exponent multiplies; cloudflared's own base."""

DEFAULT_RETRIES = 5
"""Cap of the exponent, not a number of attempts: no connection ever gives up. `--retries`."""

LOST_WAIT = 1.0
"""Seconds; the longest first wait after a link that had registered was lost. Half of the plain schedule's: the edge was
there a moment ago, and it is the only wait that traffic feels."""

MAX_WAIT = 3600.0
"""Seconds; ceiling for what `--retries` and an edge's retryAfter can ask for, so that no wait is endless."""

MAX_PREVIOUS_ATTEMPTS = 255
"""numPreviousAttempts is one byte on the wire."""


class Failure(Enum):
    """Why an attempt, or an established connection, ended."""

    DIAL = "dial"
    """TCP or TLS did not come up."""
    DUPLICATE = "duplicate"
    """EDUPCONN: this edge server has our conn_index already."""
    UNAUTHORIZED = "unauthorized"
    """The edge does not know the tunnel or the secret (yet: new tunnels take a moment to be known everywhere)."""
    REFUSED_FOR_NOW = "refused for now"
    """Registration refused, and the edge asks us to try again."""
    REFUSED = "refused"
    """Registration refused for good, or answered with an RPC exception."""
    LOST = "lost"
    """The link ended without being asked to, before or after registration."""
    INTERNAL = "internal"
    """A bug on our side."""


ROTATES = frozenset({Failure.DIAL, Failure.DUPLICATE})
"""Failures after which another address is tried (edge-connection section 8.3)."""

HOPELESS = frozenset({Failure.REFUSED, Failure.INTERNAL})
"""Failures that the same attempt would meet again. They end the process as long as no connection of it has ever
registered; afterwards nothing does, and they wait on the slow schedule.

cloudflared also ends on REFUSED_FOR_NOW and on LOST there. We follow the edge's wish to be asked again, and treat a
link that broke, or an answer that did not come, during registration as what it is: a passing condition.
"""


def classify(error: BaseException) -> Failure:
    """Tell which kind of failure `error` is; anything unknown is INTERNAL."""
    match error:
        case DuplicateConnectionError():
            return Failure.DUPLICATE
        case UnauthorizedError():
            return Failure.UNAUTHORIZED
        case RegistrationError():
            return Failure.REFUSED_FOR_NOW if error.should_retry else Failure.REFUSED
        case EdgeDialError():
            return Failure.DIAL
        case EdgeLostError() | ProtocolError():
            return Failure.LOST
        case _:
            return Failure.INTERNAL


class RetryState(NamedTuple):
    """What one conn_index remembers between attempts. A value: `decide` and `registered` give the next one."""

    conn_index: int
    counter: int = 0
    """Failed attempts since the last registration, capped by the policy."""
    was_registered: bool = False
    """The last attempt got as far as a registration."""

    def registered(self) -> RetryState:
        """Give the state after a successful registration: the schedule starts over."""
        return RetryState(self.conn_index, 0, True)

    def started_over(self) -> RetryState:
        """Give the state with the schedule at its beginning."""
        return self._replace(counter=0)

    @property
    def previous_attempts(self) -> int:
        """What registration sends as numPreviousAttempts."""
        return min(self.counter, MAX_PREVIOUS_ATTEMPTS)


class Action(Enum):
    """What the owner of the connection does next."""

    RETRY = "retry"
    WAIT_TOGETHER = "wait together"
    """End this connection's task; the supervisor starts it again by the slow schedule."""
    END_PROCESS = "end process"


class Decision(NamedTuple):
    """The answer to one failure."""

    action: Action
    state: RetryState
    failure: Failure
    wait: float
    """Seconds to wait before the next attempt."""
    wait_limit: float
    """What `wait` can have been at most: the X of `Retrying connection in up to X`."""
    retry_at: float
    """`now + wait`, on the caller's clock."""
    rotate: bool
    """True when the next attempt should go to another address, if there is one."""


class RetryPolicy(NamedTuple):
    """The schedule for all connections of a process: uniform in [0, 2^counter) s, the exponent capped."""

    max_exponent: int = DEFAULT_RETRIES

    def decide(
        self, state: RetryState, error: BaseException, *, now: float, random: float, ever_registered: bool
    ) -> Decision:
        """Answer one failure.

        `random` is uniform in [0, 1); `ever_registered` tells whether any connection of this process has ever been
        registered. An edge's retryAfter comes before the wait, so that those it was told to do not return together.
        """
        failure = classify(error)
        counter = min(state.counter + 1, max(self.max_exponent, 0))
        limit = MAX_WAIT if counter > 60 else min(BASE_WAIT * 2**counter, MAX_WAIT)
        if failure is Failure.LOST and state.was_registered:
            limit = min(limit, LOST_WAIT)
        at_least = 0.0
        if isinstance(error, RegistrationError) and error.retry_after > 0:
            at_least = min(error.retry_after, MAX_WAIT)
        wait = at_least + limit * random
        limit += at_least
        action = Action.RETRY
        if failure in HOPELESS:
            action = Action.WAIT_TOGETHER if ever_registered else Action.END_PROCESS
        return Decision(
            action=action,
            state=RetryState(state.conn_index, counter),
            failure=failure,
            wait=wait,
            wait_limit=limit,
            retry_at=now + wait,
            rotate=failure in ROTATES,
        )
