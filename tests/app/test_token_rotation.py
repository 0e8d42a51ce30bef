from __future__ import annotations

import uuid

from connector.app.token_rotation import TokenRotation
from connector.wire.token import Token

OLD, NEW, NEWER = (Token("account", secret * 32, uuid.UUID(int=1)) for secret in (b"o", b"n", b"m"))


def test_one_connection_follows_the_other() -> None:
    rotation = TokenRotation(OLD)
    assert rotation.next_move({0, 1, 2}, 3) is None
    rotation.begin(NEW, range(3))
    assert rotation.token is NEW
    assert rotation.next_move({0, 2}, 3) == 0
    assert rotation.next_move({2}, 3) is None
    assert rotation.next_move({0, 2}, 4) == 2  # 1 is not connected: it takes the new token by itself
    assert rotation.next_move({0}, 4) is None
    assert rotation.next_move({0, 1, 2}, 6) is None


def test_a_refused_token_gives_way_to_the_one_before() -> None:
    rotation = TokenRotation(OLD)
    assert not rotation.refused(OLD)
    rotation.begin(NEW, range(3))
    assert rotation.next_move({0, 1, 2}, 3) == 0
    assert not rotation.refused(OLD)  # a registration that was under way
    assert rotation.refused(NEW)
    assert rotation.token is OLD
    assert rotation.next_move({0, 1, 2}, 4) is None


def test_an_accepted_token_stays() -> None:
    rotation = TokenRotation(OLD)
    rotation.begin(NEW, range(2))
    rotation.accepted(NEW)
    assert not rotation.refused(NEW)
    assert rotation.token is NEW


def test_a_second_change_falls_back_to_what_worked() -> None:
    rotation = TokenRotation(OLD)
    rotation.begin(NEW, range(2))
    rotation.begin(NEWER, range(2))
    assert rotation.refused(NEWER)
    assert rotation.token is OLD
