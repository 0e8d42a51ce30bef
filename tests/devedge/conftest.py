"""Both protocols between connector and edge."""

from collections.abc import Iterator

import pytest

from tests.devedge.fake_connector import PROTOCOL


@pytest.fixture(params=["http2", "quic"])
def protocol(request: pytest.FixtureRequest) -> Iterator[str]:
    token = PROTOCOL.set(request.param)
    yield str(request.param)
    PROTOCOL.reset(token)
