"""WriteQueue: who wrote during a read of a link is flushed once at its end, in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from connector.proxy.write_queue import WriteQueue


class Writer:
    """Notes when it was flushed."""

    def __init__(self, name: str, order: list[str], then: Callable[[], None] | None = None) -> None:
        self.name = name
        self.order = order
        self.then = then

    def flush(self) -> None:
        self.order.append(self.name)
        if self.then is not None:
            self.then()


def test_flushed_in_order_once() -> None:
    queue, order = WriteQueue(), list[str]()
    assert not queue.holding
    for _ in range(2):
        queue.begin()
        assert queue.holding
        for name in "abc":
            queue.add(Writer(name, order))
        assert order == []
        queue.end()
        assert not queue.holding
        assert order == ["a", "b", "c"]
        order.clear()
    queue.begin()
    queue.end()
    queue.end()
    assert order == []


def test_not_holding_while_they_write() -> None:
    """What a flush brings about is written at once, or waits for the next read: the buffers are going away."""
    queue, order, holding = WriteQueue(), list[str](), list[bool]()
    second = Writer("second", order)

    def again() -> None:
        holding.append(queue.holding)
        queue.add(second)

    queue.begin()
    queue.add(Writer("first", order, again))
    queue.end()
    assert (order, holding) == (["first"], [False])
    queue.begin()
    queue.end()
    assert order == ["first", "second"]


def test_one_that_raises_does_not_stop_the_others() -> None:
    queue, order = WriteQueue(), list[str]()

    def fail() -> None:
        raise ValueError("a bug")

    queue.begin()
    queue.add(Writer("a", order, fail))
    queue.add(Writer("b", order))
    with pytest.raises(ValueError, match="a bug"):
        queue.end()
    assert order == ["a", "b"]
    assert not queue.holding
    queue.begin()
    queue.end()
    assert order == ["a", "b"]
