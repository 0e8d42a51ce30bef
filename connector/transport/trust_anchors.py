"""The three certificate authorities of the edge that no system store has.

Owns: their names and public keys, and the certificates made from them.
In: nothing. Out: `anchor_certificates()`: DER for `SSLContext.load_verify_locations`.
Never: reads files or the network; holds a certificate of anybody.

*Strategy*: a trust anchor is a name and a public key (RFC 5914), and these facts are what this module keeps. OpenSSL
takes anchors only as certificates, so one is made per anchor at start: subject and issuer, key, key identifier and
basic constraints are the authority's; the signature is none. No library checks the signature of an anchor, and whoever
wants to be trusted below it needs the authority's true private key all the same.
"""

from __future__ import annotations

import datetime
from functools import cache
from typing import NamedTuple


class Anchor(NamedTuple):
    """One authority. `certificate_sha256` is the digest of the certificate that Cloudflare publishes for it."""

    subject: tuple[tuple[str, str], ...]
    public_key: bytes
    key_id: bytes
    path_length: int | None
    not_before: datetime.datetime
    not_after: datetime.datetime
    certificate_sha256: str


ANCHORS = (
    Anchor(
        subject=(
            ("2.5.4.6", "US"),  # C
            ("2.5.4.8", "California"),  # ST
            ("2.5.4.7", "San Francisco"),  # L
            ("2.5.4.10", "CloudFlare, Inc."),  # O
            ("2.5.4.11", "CloudFlare Origin SSL ECC Certificate Authority"),  # OU
        ),
        public_key=bytes.fromhex(
            "3059301306072a8648ce3d020106082a8648ce3d0301070342000491fac1802ee686b219d46dcc4aaf2fb42c45d9e0d6"
            "3a25402d49e03a83cecade3680c69220f46e743e89297d69216daacb7e9719bb4500a18cb6b2ed0484def0"
        ),
        key_id=bytes.fromhex("85305d3b2a70d4edd5926707fdeb39b41a0e38a7"),
        path_length=2,
        not_before=datetime.datetime(2019, 8, 23, 21, 8, tzinfo=datetime.UTC),
        not_after=datetime.datetime(2029, 8, 15, 17, 0, tzinfo=datetime.UTC),
        certificate_sha256="aa63697a22764b67b2134ce14cb5690ea336940b93986113f49545917832d80d",
    ),
    Anchor(
        subject=(
            ("2.5.4.6", "US"),  # C
            ("2.5.4.10", "CloudFlare, Inc."),  # O
            ("2.5.4.11", "CloudFlare Origin SSL Certificate Authority"),  # OU
            ("2.5.4.7", "San Francisco"),  # L
            ("2.5.4.8", "California"),  # ST
        ),
        public_key=bytes.fromhex(
            "30820122300d06092a864886f70d01010105000382010f003082010a0282010100c0489567f5284291e616c1ef9398ac"
            "07145e86e90ff031bd26115ebf7599b46efa5a84ed86f2c91512850875e657a679ffae99e12d3d9a0b14b85c2f273327"
            "13a123eb222c60d09bf6bf503916bc05d86b90d9fa91d4e5cb799d9f291b3a89a7c1b51f2e513156035d94fd17a11a1e"
            "3306d0e39f7c7e88876e53b607f2cab8d7c9cc031f4bba197b7e1bfaf2c1cab3ffd5b80248b75cd40c50735002d04b10"
            "42181cc9324d8271b8bdad5cee880f9702b285b0f26787b9f4de656d83c94a65c8fdc01ede35e3d4504b2599309e80ca"
            "7b4bf5df1785fa7177dac9921f4a81eda257dad04c5b84d6b453e6cece48970ac54b249601dc18760c70d7cd32294d1d"
            "bf0203010001"
        ),
        key_id=bytes.fromhex("24e853575d7c344087a9eb94dbbae11678fc29a4"),
        path_length=2,
        not_before=datetime.datetime(2019, 8, 23, 21, 8, tzinfo=datetime.UTC),
        not_after=datetime.datetime(2029, 8, 15, 17, 0, tzinfo=datetime.UTC),
        certificate_sha256="d3c7e85c91707fc0a12abc5d88266747aa4fa8e7b162f633ffb3c9d989947620",
    ),
    Anchor(
        subject=(
            ("2.5.4.6", "US"),  # C
            ("2.5.4.10", "CloudFlare, Inc."),  # O
            ("2.5.4.11", "Origin Pull"),  # OU
            ("2.5.4.7", "San Francisco"),  # L
            ("2.5.4.8", "California"),  # ST
            ("2.5.4.3", "origin-pull.cloudflare.net"),  # CN
        ),
        public_key=bytes.fromhex(
            "30820222300d06092a864886f70d01010105000382020f003082020a0282020100ddb2db3a2361f9746ca7e1a7400904"
            "5795fa342a6c2c37b079af10fc0b9aa0cbab29c8e36b595d1e72f75e1907d66bc1b2ff2b93b8e9ec5dfcbba32675766f"
            "7773731e6bb62433b28d31ce58ea6e76d04f6d1e8a1c7f5ab1783a464ac9d673b1d689b1600fba99431f93fb27cdaade"
            "b7bcf2341d804e61aa3a85677725086ee5c6807084b69ace6dcd2499547f3764f7ba2e46f9c5180b97779710571f2360"
            "e39e53ad2c5aa98c7b840774ebe9a81f756c9a184122951635201de4e937cb4da4a25f6fd2c89f7a6e9f76c2f4d28d1e"
            "d44a30d5f72a5fec00fabbabf0259ddbc0d8ac370e4ba6da61d0506773547a9c3a079af411a32cada1ed2b97f77cd358"
            "bd36bbbf7d76be9792b69dfd64a11dc85f8e346768bdf99e22540ebd36609b4f83158e6ecadf394eb707c8ee2d4a615b"
            "fe013a38c9c801b997d8f5fff6941848bfb047b996a56fd0fefc42bc68c51f8c317889c1069be4507c4c6fda73a9911e"
            "017d0a6917f74b9a461f8e0b4ed78d375f48a1913e933d841d9984ba25fe77fcaa6a0b7680f91ef38366e2aedbe9ae29"
            "e5475e0c36fc0eb033b3b0ae29f1662c819391e10af6800c7ecf66953acffcefe4d5391d2bd788ab42cc5b83bb8fd97e"
            "2df845f1d778251f1c06f829f3515c9c0cb3151afb86694805f61ba467194e667ae5e9539fd5f83409a7f7baf57cb263"
            "a4570e8332c1a10594895706a8d1440da90203010001"
        ),
        key_id=bytes.fromhex("43594b2b698b80e111336a57cd5738da9e7dc5eb"),
        path_length=2,
        not_before=datetime.datetime(2019, 10, 10, 18, 45, tzinfo=datetime.UTC),
        not_after=datetime.datetime(2029, 11, 1, 17, 0, tzinfo=datetime.UTC),
        certificate_sha256="9a1ac2b4be15f9f27eee20a734cba4e9898f61001b3bd7c84b69b56a3e25a2b9",
    ),
)


@cache
def anchor_certificates() -> bytes:
    """Return the DER of all anchors, one after the other. Made on first use, then kept."""
    return b"".join(make_anchor(anchor) for anchor in ANCHORS)


_SEQUENCE, _SET, _OID, _INTEGER, _BITS, _OCTETS, _BOOLEAN = 0x30, 0x31, 0x06, 0x02, 0x03, 0x04, 0x01
_PRINTABLE, _UTF8, _TIME, _VERSION, _EXTENSIONS = 0x13, 0x0C, 0x17, 0xA0, 0xA3
_COUNTRY = "2.5.4.6"
_ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_NO_SIGNATURE = bytes.fromhex("003006020101020101")  # well-formed, of nothing: r = s = 1


def make_anchor(anchor: Anchor) -> bytes:
    """Return a certificate in DER that makes `anchor` trusted when it is loaded as an authority.

    Written by hand: a library for certificates would cost each start 50 ms of CPU.
    """
    subject = _der(_SEQUENCE, *(_der(_SET, _attribute(oid, value)) for oid, value in anchor.subject))
    constraints = _der(_BOOLEAN, b"\xff")
    if anchor.path_length is not None:
        constraints += _der(_INTEGER, bytes((anchor.path_length,)))
    body = _der(
        _SEQUENCE,
        _der(_VERSION, _der(_INTEGER, b"\x02")),
        _der(_INTEGER, b"\x01"),
        _ECDSA_SHA256,
        subject,
        _der(_SEQUENCE, _time(anchor.not_before), _time(anchor.not_after)),
        subject,
        anchor.public_key,
        _der(
            _EXTENSIONS,
            _der(
                _SEQUENCE,
                _extension("2.5.29.19", _der(_SEQUENCE, constraints), critical=True),
                _extension("2.5.29.14", _der(_OCTETS, anchor.key_id)),
            ),
        ),
    )
    return _der(_SEQUENCE, body, _ECDSA_SHA256, _der(_BITS, _NO_SIGNATURE))


def _der(tag: int, *parts: bytes) -> bytes:
    """Return one value in DER; all here are shorter than 64 KiB."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    return (bytes((tag, 0x81, size)) if size < 0x100 else bytes((tag, 0x82, size >> 8, size & 0xFF))) + content


def _oid(text: str) -> bytes:
    """Return an object identifier whose parts are all below 128."""
    first, second, *rest = map(int, text.split("."))
    return _der(_OID, bytes((first * 40 + second, *rest)))


def _attribute(oid: str, value: str) -> bytes:
    """Return a part of a name, in the string types that authorities use: names are compared byte by byte by some."""
    return _der(_SEQUENCE, _oid(oid), _der(_PRINTABLE if oid == _COUNTRY else _UTF8, value.encode()))


def _time(when: datetime.datetime) -> bytes:
    return _der(_TIME, when.strftime("%y%m%d%H%M%SZ").encode())


def _extension(oid: str, value: bytes, *, critical: bool = False) -> bytes:
    return _der(_SEQUENCE, _oid(oid), *([_der(_BOOLEAN, b"\xff")] if critical else []), _der(_OCTETS, value))
