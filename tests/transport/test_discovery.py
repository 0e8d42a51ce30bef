"""Every way to the edge, against a real DNS server on loopback that fails in every way that networks do."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from connector.errors import DiscoveryError, WireError
from connector.protocol.edge_addresses import EdgeAddress, Service, order_services
from connector.protocol.protocol_choice import RemoteFeatures, Share
from connector.transport.discovery import (
    Discovery,
    Found,
    find_static,
    host_names,
    load_saved,
    protocol_shares,
    remote_features,
    save,
    saved_path,
    service_name,
)
from connector.transport.resolvers import (
    Endpoint,
    HttpsResolver,
    SystemResolver,
    TlsResolver,
    order_by_route,
)
from tests.support.aio import run
from tests.support.certs import Authority
from tests.support.dns_server import DnsServer
from tests.support.loops import LOOPS

SRV = "_v2-origintunneld._tcp.argotunnel.com"
ONE, TWO = "region1.v2.argotunnel.com", "region2.v2.argotunnel.com"
ZONE = {
    (SRV, "SRV"): [f"1 1 7844 {ONE}.", f"2 1 7845 {TWO}."],
    (ONE, "A"): ["192.0.2.1", "192.0.2.2"],
    (ONE, "AAAA"): ["2001:db8::1"],
    (TWO, "A"): ["192.0.2.129"],
    (TWO, "AAAA"): ["2001:db8::81"],
}
NAME = "dns.test"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("DNS Test CA")


@pytest.fixture
def server_tls(authority: Authority, tmp_path: Path) -> ssl.SSLContext:
    return authority.server_context(tmp_path, NAME)


@pytest.fixture
def trust(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem())
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def plain(server: DnsServer, limit: float = 30.0) -> SystemResolver:
    return SystemResolver(nameservers=[server.nameserver], limit=limit)


def over_tls(server: DnsServer, trust: ssl.SSLContext, limit: float = 30.0) -> TlsResolver:
    return TlsResolver([Endpoint("127.0.0.1", server.tls_port, NAME)], context=trust, limit=limit)


def over_https(server: DnsServer, trust: ssl.SSLContext, limit: float = 30.0) -> HttpsResolver:
    return HttpsResolver([Endpoint("127.0.0.1", server.https_port, NAME)], context=trust, limit=limit)


def hosts(found: Found) -> list[set[str]]:
    return [{each.host for each in region} for region in found.regions]


def complete(found: Found) -> bool:
    return hosts(found) == [{"192.0.2.1", "192.0.2.2", "2001:db8::1"}, {"192.0.2.129", "2001:db8::81"}]


# -- the ways, one after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("truncate", [False, True], ids=["udp", "tcp"])
def test_the_system_resolver_suffices(factory: Callable[[], asyncio.AbstractEventLoop], truncate: bool) -> None:
    async def main() -> None:
        async with DnsServer(ZONE) as server:
            server.truncate = truncate
            found = await Discovery(system=plain(server)).find()
            assert complete(found)
            assert found.way == "SRV records"
            assert found.failures == ()
            assert {each.port for each in found.regions[0]} == {7844}
            assert {each.port for each in found.regions[1]} == {7845}
            assert any(transport == "tcp" for transport, _, _ in server.questions) is truncate

    run(main(), loop_factory=factory)


@pytest.mark.parametrize("factory", LOOPS.values(), ids=LOOPS)
def test_dns_over_tls_when_the_system_knows_no_srv(
    factory: Callable[[], asyncio.AbstractEventLoop], server_tls: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    async def main() -> None:
        async with DnsServer(ZONE, tls=server_tls) as server:
            system = plain(server)
            server.refusing = {"udp"}
            tls = over_tls(server, trust)

            found = await Discovery(system=system, tls=tls).find()
            assert complete(found)
            assert found.way == "SRV records over DNS-over-TLS"
            assert len(found.failures) == 1
            assert "SRV" in found.failures[0]

    run(main(), loop_factory=factory)


def test_after_srv_over_tls_the_addresses_still_come_from_the_system(
    server_tls: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    async def main() -> None:
        zone = {key: value for key, value in ZONE.items() if key[1] != "SRV"}
        async with DnsServer(zone) as system, DnsServer(ZONE, tls=server_tls) as secure:
            found = await Discovery(system=plain(system), tls=over_tls(secure, trust)).find()
            assert complete(found)
            assert [kind for _, _, kind in secure.questions] == ["SRV"]

    run(main())


def test_the_regions_names_when_nobody_knows_srv() -> None:
    async def main() -> None:
        zone = {key: value for key, value in ZONE.items() if key[1] != "SRV"}
        async with DnsServer(zone) as server:
            found = await Discovery(system=plain(server)).find()
            assert complete(found)
            assert found.way == "addresses of the regions' names"
            assert {each.port for region in found.regions for each in region} == {7844}

    run(main())


@pytest.mark.parametrize("factory", LOOPS.values(), ids=LOOPS)
def test_dns_over_https_is_the_last_resort(
    factory: Callable[[], asyncio.AbstractEventLoop], server_tls: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    async def main() -> None:
        async with DnsServer({("other.test", "A"): ["192.0.2.9"]}) as system, DnsServer(ZONE, tls=server_tls) as secure:
            secure.refusing = {"tls"}
            discovery = Discovery(system=plain(system), tls=over_tls(secure, trust), https=over_https(secure, trust))
            found = await discovery.find()
            assert complete(found)
            assert found.way == "SRV records over DNS-over-HTTPS"
            assert len(found.failures) == 3
            assert "SERVFAIL" in " ".join(found.failures)

    run(main(), loop_factory=factory)


def test_a_silent_resolver_does_not_hold_up_the_next_way(server_tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    async def main() -> None:
        async with DnsServer(ZONE) as system, DnsServer(ZONE, tls=server_tls) as secure:
            system.silent = {"SRV"}
            secure.silent = {"tls"}
            discovery = Discovery(
                system=plain(system, limit=60.0),
                tls=over_tls(secure, trust, limit=60.0),
                stagger=0.01,
            )
            found = await discovery.find()  # would otherwise meet the limit of a test
            assert complete(found)
            assert found.way == "addresses of the regions' names"

    run(main())


def test_silence_everywhere_ends_in_one_error_with_advice(server_tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    async def main() -> None:
        async with DnsServer(ZONE, tls=server_tls) as server:
            server.silent = {"udp", "tcp", "tls", "https"}
            discovery = Discovery(
                system=plain(server, limit=0.05),
                tls=over_tls(server, trust, limit=0.3),
                https=over_https(server, trust, limit=0.3),
                stagger=0.01,
            )
            with pytest.raises(DiscoveryError, match="Cannot find the addresses of the edge: SRV records: ") as failed:
                await discovery.find()
            assert "no answer in time" in str(failed.value)
            assert "--edge" in failed.value.advice
            assert SRV in failed.value.advice
            assert await discovery.refresh() is None

    run(main())


def test_fewer_than_two_regions_are_no_answer() -> None:
    async def main() -> None:
        async with DnsServer({(SRV, "SRV"): [f"1 1 7844 {ONE}."], (ONE, "A"): ["192.0.2.1"]}) as server:
            with pytest.raises(
                DiscoveryError, match="expected at least 2 Cloudflare Regions regions, but SRV only ret"
            ):
                await Discovery(system=plain(server)).find()

    run(main())


def test_a_target_without_addresses_is_no_answer() -> None:
    async def main() -> None:
        zone = {**ZONE, (TWO, "A"): [], (TWO, "AAAA"): []}
        async with DnsServer(zone) as server:
            with pytest.raises(DiscoveryError, match=TWO):
                await Discovery(system=plain(server)).find()

    run(main())


def test_third_and_further_records_are_not_used() -> None:
    async def main() -> None:
        third = {(SRV, "SRV"): [*ZONE[SRV, "SRV"], "3 1 7844 nowhere.test."]}
        async with DnsServer({**ZONE, **third}) as server:
            assert complete(await Discovery(system=plain(server)).find())
            assert "nowhere.test" not in {name for _, name, _ in server.questions}

    run(main())


def test_one_family_is_enough_and_aliases_are_followed(server_tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    async def main() -> None:
        zone = {
            (SRV, "SRV"): [f"1 1 7844 {ONE}.", f"1 1 7844 {TWO}."],
            (ONE, "CNAME"): ["a.test."],
            ("a.test", "A"): ["192.0.2.1"],
            (TWO, "AAAA"): ["2001:db8::81"],
        }
        async with DnsServer(zone, tls=server_tls) as server:
            for discovery in (Discovery(system=plain(server)), Discovery(system=over_https(server, trust))):
                found = await discovery.find()
                assert sorted(hosts(found), key=str) == [{"192.0.2.1"}, {"2001:db8::81"}]

    run(main())


def test_a_region_is_a_prefix_of_all_names() -> None:
    assert service_name("us") == "_us-v2-origintunneld._tcp.argotunnel.com"
    assert service_name("") == SRV
    assert host_names("fed") == ("fed-region1.v2.argotunnel.com", "fed-region2.v2.argotunnel.com")

    async def main() -> None:
        zone = {
            ("fed-region1.v2.argotunnel.com", "A"): ["192.0.2.1"],
            ("fed-region2.v2.argotunnel.com", "A"): ["192.0.2.2"],
        }
        async with DnsServer(zone) as server:
            found = await Discovery(region="fed", system=plain(server)).find()
            assert hosts(found) == [{"192.0.2.1"}, {"192.0.2.2"}]
            assert ("udp", "_fed-v2-origintunneld._tcp.argotunnel.com", "SRV") in server.questions

    run(main())


@pytest.mark.parametrize("region", ["a" * 64, "a..b", "\udc80", "\u00fc..", ""])
def test_a_region_that_makes_no_name_is_an_error_not_a_crash(region: str) -> None:
    async def main() -> None:
        async with DnsServer({}) as server:
            with pytest.raises(DiscoveryError):
                await Discovery(region=region, system=plain(server)).find()

    run(main())


# -- encrypted ways ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [over_tls, over_https])
def test_the_certificate_must_be_right(
    way: Callable[..., TlsResolver | HttpsResolver], server_tls: ssl.SSLContext, authority: Authority, tmp_path: Path
) -> None:
    async def main() -> None:
        strangers = ssl.create_default_context(cadata=Authority("Another CA").pem())
        other_name = authority.server_context(tmp_path, "other.test")
        trusting = ssl.create_default_context(cadata=authority.pem())
        for tls, context in ((server_tls, strangers), (other_name, trusting)):
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
            async with DnsServer(ZONE, tls=tls) as server:
                with pytest.raises(DiscoveryError, match=r"(?i)certificate"):
                    await way(server, context).services(SRV)
                assert server.questions == []

    run(main())


@pytest.mark.parametrize("way", [over_tls, over_https])
@pytest.mark.parametrize(
    "mangle",
    [
        lambda data: b"",
        lambda data: data[:11],
        lambda data: data[:-3],
        lambda data: b"\x12\x34" + data[2:],
        lambda data: data[:2] + b"\x00" + data[3:],
        lambda data: b"\xff" * 512,
        lambda data: data + b"\x00" * 70_000,
    ],
    ids=["empty", "short head", "cut", "other id", "no answer", "garbage", "too long"],
)
def test_bad_answers_are_refused(
    way: Callable[..., TlsResolver | HttpsResolver],
    mangle: Callable[[bytes], bytes],
    server_tls: ssl.SSLContext,
    trust: ssl.SSLContext,
) -> None:
    async def main() -> None:
        async with DnsServer(ZONE, tls=server_tls) as server:
            server.mangle = lambda data: mangle(data)[: 65535 if way is over_tls else None]
            with pytest.raises(DiscoveryError, match="DNS-over-"):
                await way(server, trust).services(SRV)

    run(main())


def test_https_answers_count_only_with_status_200(server_tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    async def main() -> None:
        async with DnsServer(ZONE, tls=server_tls) as server:
            server.http_status = 403
            with pytest.raises(DiscoveryError, match="HTTP status 403"):
                await over_https(server, trust).services(SRV)

    run(main())


def test_the_next_endpoint_is_tried_when_one_does_not_connect(
    server_tls: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    async def main() -> None:
        async with DnsServer(ZONE, tls=server_tls) as server:
            dead = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
            port = dead.sockets[0].getsockname()[1]
            dead.close()
            await dead.wait_closed()
            endpoints = [Endpoint("127.0.0.1", port, NAME), Endpoint("127.0.0.1", server.tls_port, NAME)]
            assert len(await TlsResolver(endpoints, context=trust).services(SRV)) == 2
            with pytest.raises(DiscoveryError):
                await TlsResolver(endpoints[:1], context=trust).services(SRV)

    run(main())


def test_questions_over_tls_carry_id_0_and_plain_ones_do_not_matter(
    server_tls: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    async def main() -> None:
        async with DnsServer(ZONE, tls=server_tls) as server:
            ids: list[bytes] = []

            def note(data: bytes) -> bytes:
                ids.append(data[:2])
                return data

            server.mangle = note
            await over_tls(server, trust).services(SRV)
            assert ids == [b"\0\0"]

    run(main())


def test_addresses_without_a_route_go_last() -> None:
    assert order_by_route(["127.0.0.2", "127.0.0.1", "127.0.0.2"]) == ["127.0.0.2", "127.0.0.1"]
    mixed = order_by_route(["127.0.0.1", "::1"])
    assert set(mixed) == {"127.0.0.1", "::1"}


# -- the saved answer --------------------------------------------------------------------------------------------------


def test_the_last_good_answer_serves_when_dns_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "state" / "edge.json"
        async with DnsServer(ZONE) as server:
            first = await Discovery(system=plain(server), saved=path, clock=lambda: 1000.0).find()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert [each.name for each in path.parent.iterdir()] == [path.name]
            server.refusing = {"udp", "tcp"}
            discovery = Discovery(system=plain(server), saved=path, clock=lambda: 1000.0 + 5400)
            found = await discovery.find()
            assert found.regions == first.regions
            assert found.way == "answer saved 1.5 h ago"
            assert "SERVFAIL" in found.failures[0]
            assert await discovery.refresh() is None
            with pytest.raises(DiscoveryError):
                await Discovery(region="us", system=plain(server), saved=path).find()

    run(main())


def test_a_refresh_saves_too_and_a_state_directory_that_cannot_be_written_is_no_harm(tmp_path: Path) -> None:
    async def main() -> None:
        async with DnsServer(ZONE) as server:
            path = tmp_path / "edge.json"
            discovery = Discovery(system=plain(server), saved=path, clock=lambda: 7.0)
            found = await discovery.refresh()
            assert found is not None
            assert complete(found)
            assert json.loads(path.read_text())["saved_at"] == 7.0
            (tmp_path / "file").write_text("")
            blocked = Discovery(system=plain(server), saved=tmp_path / "file" / "edge.json")
            assert complete(await blocked.find())
            assert "edge.json" in blocked.save_error

    run(main())


REGIONS = (
    (EdgeAddress("192.0.2.1", 7844), EdgeAddress("2001:db8::1", 7844)),
    (EdgeAddress("192.0.2.2", 7845),),
)


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "edge.json"
    save(path, "", REGIONS, 1.0)
    save(path, "", REGIONS[::-1], 2.0)
    assert load_saved(path, "") == (REGIONS[::-1], 2.0)
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r".+"):
        save(path, "", REGIONS, 3.0)
    assert list(tmp_path.iterdir()) == [path]
    assert load_saved(path, "") is None


def test_files_that_others_may_write_and_special_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "edge.json"
    save(path, "", REGIONS, 1.0)
    path.chmod(0o622)
    assert load_saved(path, "") is None
    path.unlink()
    os.mkfifo(path)
    assert load_saved(path, "") is None  # and does not wait for a writer
    assert load_saved(tmp_path / "missing", "") is None


def test_the_path_follows_xdg_and_survives_odd_regions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert saved_path("") == tmp_path / "tunnel-connector" / "edge-addresses.json"
    assert saved_path("us") == tmp_path / "tunnel-connector" / "edge-addresses-us.json"
    odd = saved_path("../../etc/x")
    assert odd is not None
    assert odd.parent == tmp_path / "tunnel-connector"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert saved_path("") == tmp_path / ".local" / "state" / "tunnel-connector" / "edge-addresses.json"


def test_asking_the_system_does_not_load_a_quic_library() -> None:
    code = (
        "import asyncio, sys\n"
        "from connector.errors import DiscoveryError\n"
        "from connector.transport.resolvers import SystemResolver\n"
        "try:\n"
        "    asyncio.run(SystemResolver(nameservers=[('127.0.0.1', 9)], limit=0.01).services('x.test'))\n"
        "except DiscoveryError:\n"
        "    pass\n"
        "assert 'dns.asyncresolver' in sys.modules\n"
        "print([name for name in sys.modules if name.startswith('aioquic')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]"


# -- static addresses --------------------------------------------------------------------------------------------------


def test_static_addresses_alternate_between_the_regions_after_skipping() -> None:
    async def main() -> None:
        zone = {
            ("both.test", "A"): ["192.0.2.7"],
            ("both.test", "AAAA"): ["2001:db8::7"],
            ("six.test", "AAAA"): ["::6"],
        }
        async with DnsServer(zone) as server:
            skipped: list[tuple[str, str]] = []
            edges = [("127.0.0.1", 1), ("gone.test", 2), ("both.test", 3), ("six.test", 4), ("127.0.0.1", 1)]
            regions = await find_static(
                edges, resolver=plain(server), skipped=lambda edge, error: skipped.append((edge, error))
            )
            assert regions == (
                (EdgeAddress("127.0.0.1", 1), EdgeAddress("::6", 4)),
                (EdgeAddress("192.0.2.7", 3), EdgeAddress("127.0.0.1", 1)),
            )
            assert [edge for edge, _ in skipped] == ["gone.test:2"]
            with pytest.raises(DiscoveryError, match="failed to resolve any edge address"):
                await find_static([("gone.test", 2)], resolver=plain(server), skipped=lambda *_: None)

    run(main())


def test_the_machines_own_look_up_knows_localhost() -> None:
    addresses = run(SystemResolver().addresses("localhost"))
    assert set(addresses) & {"127.0.0.1", "::1"}
    no_name = "x" * 64 + ".invalid"
    with pytest.raises(DiscoveryError, match=no_name):
        run(SystemResolver().addresses(no_name))


# -- TXT records -------------------------------------------------------------------------------------------------------


def test_txt_records() -> None:
    async def main() -> None:
        zone = {
            ("protocol-v2.argotunnel.com", "TXT"): [r'"[{\"protocol\":\"quic\"," "\"percentage\":100}]"'],
            ("cfd-features.argotunnel.com", "TXT"): [r'"{\"dv3_2\":30,\"skip_prechecks\":true}"'],
        }
        async with DnsServer(zone) as server:
            assert await protocol_shares(plain(server)) == (Share("quic", 100),)
            assert await remote_features(plain(server)) == RemoteFeatures(30, True)
            server.zone["cfd-features.argotunnel.com", "TXT"] = ['"{"']
            with pytest.raises(WireError, match="cfd-features"):
                await remote_features(plain(server))
            server.silent = {"TXT"}
            with pytest.raises(DiscoveryError, match="no answer in time"):
                await remote_features(plain(server), limit=0.02)

    run(main())


# -- RFC 2782 ----------------------------------------------------------------------------------------------------------


def test_priority_first_then_weight() -> None:
    a, b, c, zero = (Service(*each) for each in [(1, 10, 1, "a"), (1, 30, 1, "b"), (0, 0, 1, "c"), (1, 0, 1, "z")])
    assert order_services([a, b, c, zero], lambda: 0.999) == [c, b, a, zero]
    assert order_services([b, a, zero, c], lambda: 0.0) == [c, zero, a, b]
    assert order_services([Service(0, 0, 1, "."), c], lambda: 0.5) == [c]
    assert order_services([], lambda: 0.5) == []
    draws = [index / 1000 for index in range(1000)]
    firsts = Counter(order_services([a, b], lambda draw=draw: draw)[0].target for draw in draws)  # type: ignore[misc]
    assert firsts["b"] / 1000 == pytest.approx(30 / 41, abs=0.002)
