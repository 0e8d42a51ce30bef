from __future__ import annotations

import io
import uuid

import pytest

from connector.app.addresses import AddressBook, find_edge
from connector.app.config import RunConfig
from connector.app.logs import Logger, LogOutput
from connector.errors import ConfigError, DiscoveryError
from connector.protocol.edge_addresses import EdgeAddress, RegionAddresses
from connector.wire.token import Token
from tests.support.aio import run

A, B, C = EdgeAddress("192.0.2.1", 7844), EdgeAddress("192.0.2.2", 7844), EdgeAddress("192.0.2.3", 7844)


def test_each_index_has_its_own_address_and_keeps_it() -> None:
    book = AddressBook(((A, B), (C,)))
    first = [book.get(index) for index in (0, 1, 2)]
    assert set(first) == {A, B, C}
    assert [book.get(index) for index in (0, 1, 2)] == first
    assert book.get(3) is None
    assert book.capacity == 0


def test_rotation_goes_to_one_that_nobody_uses() -> None:
    book = AddressBook(((A, B), (C,)))
    used = {book.get(0), book.get(1)}
    book.rotate(0, unreachable=False, leave_region=False)
    assert {book.get(0)} == {A, B, C} - used


def test_without_a_free_address_everybody_stays() -> None:
    book = AddressBook(((A,), ()))
    assert book.get(0) == A
    book.rotate(0, unreachable=True, leave_region=True)
    assert book.get(0) == A


def test_failed_dials_ask_for_a_look_up_that_adds_addresses() -> None:
    now = 0.0
    answers: list[RegionAddresses | None] = [None, ((B,), (C,))]

    async def refresh() -> RegionAddresses | None:
        return answers.pop(0)

    book = AddressBook(((A,), ()), refresh=refresh, clock=lambda: now)
    assert book.get(0) == A
    now = 61.0
    for _ in range(3):
        book.failed()
    assert not book.refresh_due()
    book.failed()
    assert book.refresh_due()
    assert not run(book.refresh())
    assert book.get(0) == A
    assert not book.refresh_due()
    now = 300.0
    for _ in range(4):
        book.failed()
    assert book.refresh_due()
    assert run(book.refresh())
    assert book.get(0) == A  # in use until it is given back
    book.rotate(0, unreachable=True, leave_region=False)
    assert book.get(0) in {B, C}


def test_given_addresses_are_never_looked_up_again() -> None:
    book = AddressBook(((A,), ()), clock=iter(range(0, 10_000_000, 1000)).__next__)
    for _ in range(10):
        book.failed()
    assert not book.refresh_due()


def find(*edges: str, bind: str | None = None) -> tuple[AddressBook, str]:
    stream = io.StringIO()
    config = RunConfig(Token("account", b"s" * 32, uuid.uuid4()))
    config.edges = list(edges)
    config.bind_address = bind
    book = run(find_edge(config, Logger(LogOutput(stream=stream))))
    return book, stream.getvalue()


def test_an_address_named_four_times_serves_four_connections() -> None:
    book, _ = find(*["127.0.0.1:1"] * 4)
    assert book.capacity == 4
    assert {book.get(index) for index in range(4)} == {EdgeAddress("127.0.0.1", 1)}


def test_names_that_do_not_resolve_are_logged_and_skipped() -> None:
    book, text = find("does-not-exist.invalid:1", "127.0.0.1:2")
    assert book.get(0) == EdgeAddress("127.0.0.1", 2)
    assert "does-not-exist.invalid:1" in text


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DiscoveryError, match="failed to resolve any edge address"):
        find("does-not-exist.invalid:1")


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(ConfigError, match=r"--edge-bind-address: cannot bind 192\.0\.2\.1"):
        find("127.0.0.1:1", bind="192.0.2.1")
