from __future__ import annotations

import io

import pytest

from connector.app.addresses import AddressBook, EdgeAddress, resolve_edges
from connector.app.logs import Logger, LogOutput
from connector.errors import ConfigError
from tests.support.aio import run

A, B, C = EdgeAddress("192.0.2.1", 7844), EdgeAddress("192.0.2.2", 7844), EdgeAddress("192.0.2.3", 7844)


def test_each_index_has_its_own_address_and_keeps_it() -> None:
    book = AddressBook([A, B, C])
    assert [book.get(0), book.get(1), book.get(0), book.get(2)] == [A, B, A, C]


def test_rotation_goes_to_one_that_nobody_uses() -> None:
    book = AddressBook([A, B, C])
    assert (book.get(0), book.get(1)) == (A, B)
    assert book.rotate(0) == C
    assert book.rotate(0) == A
    assert book.get(0) == A


def test_without_a_free_address_everybody_stays() -> None:
    book = AddressBook([A])
    assert book.get(0) == A
    assert book.rotate(0) == A
    assert book.get(1) == A  # more connections than addresses do not crash, they share


def test_rotation_visits_every_address() -> None:
    book = AddressBook([A, B, C])
    book.get(0)
    assert {book.rotate(0) for _ in range(3)} == {A, B, C}


def resolve(*edges: str, one_each: bool = True, ip_version: str = "auto") -> tuple[list[EdgeAddress], str]:
    stream = io.StringIO()
    log = Logger(LogOutput(stream=stream))
    found = run(resolve_edges(edges, one_each=one_each, ip_version=ip_version, log=log))
    return found, stream.getvalue()


def test_numeric_addresses_resolve_to_themselves() -> None:
    found, _ = resolve("127.0.0.1:1", "[::1]:2", "127.0.0.1:1")
    assert found == [EdgeAddress("127.0.0.1", 1), EdgeAddress("::1", 2)]


def test_names_that_do_not_resolve_are_logged_and_skipped() -> None:
    found, text = resolve("does-not-exist.invalid:1", "127.0.0.1:2")
    assert found == [EdgeAddress("127.0.0.1", 2)]
    assert "does-not-exist.invalid:1" in text


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ConfigError, match="failed to resolve any edge address"):
        resolve("does-not-exist.invalid:1")


def test_the_ip_version_filters() -> None:
    with pytest.raises(ConfigError):
        resolve("127.0.0.1:1", ip_version="6")
