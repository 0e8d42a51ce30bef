"""What the edge sends with requests: the fields of a browser behind Cloudflare.

Owns: the field lists of all rows.
In: nothing. Out: lists of fields as HTTP/2 has them; quic_client.py says the same in its words.
Never: encodes.
"""

from __future__ import annotations

from benchmarks.link import Fields

UPGRADE = b"cf-cloudflared-proxy-connection-upgrade"
TCP_SOURCE = b"cf-cloudflared-proxy-src"
HOST = b"app.example.com"
TCP_HOST = b"tcp.example.com"
MQTT_HOST = b"mqtt.example.com"


def request_fields(method: bytes, path: bytes, *extra: tuple[bytes, bytes], host: bytes = HOST) -> Fields:
    """What the edge sends with any request."""
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", host),
        (b":path", path),
        (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        (b"accept", b"*/*"),
        (b"accept-encoding", b"gzip, br"),
        (b"cf-connecting-ip", b"203.0.113.7"),
        (b"x-forwarded-for", b"203.0.113.7"),
        (b"x-forwarded-proto", b"https"),
        (b"cf-visitor", b'{"scheme":"https"}'),
        (b"cdn-loop", b"cloudflare; loops=1"),
        (b"cf-ipcountry", b"PT"),
        *extra,
    ]


KEY = (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ==")
WEBSOCKET = request_fields(b"GET", b"/", KEY, (UPGRADE, b"websocket"))
TCP_RULE = request_fields(b"GET", b"/", KEY, (UPGRADE, b"websocket"), host=TCP_HOST)
MQTT = request_fields(
    b"GET", b"/mqtt", KEY, (b"sec-websocket-protocol", b"mqtt"), (UPGRADE, b"websocket"), host=MQTT_HOST
)
MORE_FIELDS = (
    (b"accept-language", b"en-GB,en;q=0.8,pt;q=0.5"),
    (b"cookie", b"session=8f14e45fceea167a5a36dedd4bea2543; theme=dark; consent=1"),
    (b"referer", b"https://app.example.com/list?page=3"),
    (b"sec-fetch-dest", b"document"),
    (b"sec-fetch-mode", b"navigate"),
    (b"sec-fetch-site", b"same-origin"),
    (b"cache-control", b"max-age=0"),
    (b"upgrade-insecure-requests", b"1"),
    (b"dnt", b"1"),
    (b"priority", b"u=0, i"),
)
"""With the fields of every request, and `cf-ray`, these make twenty that are no pseudo headers."""


def private_tcp(port: int) -> Fields:
    """What opens a stream to a TCP port of the private network."""
    return request_fields(b"GET", b"/", (TCP_SOURCE, b"warp"), host=b"127.0.0.1:%d" % port)
