"""Coverage-guided fuzzing of tokens, datagrams, Cap'n Proto, origins' answers, configurations, WebSocket and SOCKS.

`python tests/fuzz/fuzz_decoders.py [corpus]`. The first byte picks the decoder; the checks are those of the
test_fuzz_*.py files, which run without `atheris`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz_decoders needs the package atheris: pip install atheris")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    with atheris.instrument_imports(include=["connector"]):
        from connector.errors import ConfigError, WireError
        from connector.inspector.decode import guess
        from connector.inspector.frames import FrameLog
        from connector.proxy.ingress import parse_remote_config
        from connector.wire import datagram_v2, datagram_v3, icmp
        from connector.wire.capnp import MessageCounter, message_length
        from tests.fuzz.test_fuzz_datagrams import feed_both_versions
        from tests.fuzz.test_fuzz_http1 import feed
        from tests.fuzz.test_fuzz_token_capnp import decodes_or_wire_error
        from tests.fuzz.test_fuzz_websocket import check as check_clients
    import json

    def token(data: bytes) -> None:
        decodes_or_wire_error(data.decode("latin-1"))

    def capnp(data: bytes) -> None:
        try:
            message_length(data)
            counter = MessageCounter()
            for at in range(0, len(data), 7):
                counter.feed(data[at : at + 7])
        except WireError:
            pass

    def origin(data: bytes) -> None:
        assert feed(data, max(1, len(data)), b"GET") == feed(data, 3, b"GET")

    def configuration(data: bytes) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        try:
            parse_remote_config(1, value).match(b"a.example.com:80", "/x")
        except ConfigError:
            pass

    def datagram(data: bytes) -> None:
        for decode in (
            datagram_v2.decode, datagram_v3.decode_registration, datagram_v3.decode_response, icmp.decode_echo_request,
        ):  # fmt: skip
            try:
                decode(data)
            except WireError:
                pass
        feed_both_versions([data[:40], data[40:80], data])

    def clients(data: bytes) -> None:
        if data:
            check_clients(data[1:], data[0] % 40 + 1)

    def anything(data: bytes) -> None:
        try:
            guess(data)
        except WireError:
            pass

    def frames(data: bytes) -> None:
        log = FrameLog(lambda entry: None, None)
        for at in range(0, len(data), 11):
            log.feed(at & 1, data[at : at + 11], 0.0)
        log.flush()

    checks = (token, capnp, origin, configuration, datagram, clients, anything, frames)

    def one_input(data: bytes) -> None:
        if data:
            checks[data[0] % len(checks)](data[1:])

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
