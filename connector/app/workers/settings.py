"""What a run was asked to do, and rule sets, as bytes for a worker.

Owns: which parts of a RunConfig a worker gets. In: RunConfig, Ingress. Out: bytes, and the same again.
Never: takes bytes from anybody but our own leading process: a pickle can do anything.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, Final

from connector.app.config import EDGE_NAMES, RunConfig
from connector.proxy.ingress import Ingress
from connector.proxy.patterns import PathPattern, compile_path
from connector.wire.token import Token

_LEADERS: Final = frozenset({
    "applications", "capture", "edges", "fixed_ingress", "ingress", "inspect", "metrics", "pidfile",
    "proxy_exempt", "stdin_control", "token", "token_file", "watched",
})  # fmt: skip
"""What stays with the leading process, or cannot be put into bytes; rules travel apart, and the token as its parts."""


class _Pickler(pickle.Pickler):
    """Knows that an expression is compiled again where it is unpacked."""

    def reducer_override(self, thing: Any) -> Any:
        """See pickle."""
        if isinstance(thing, PathPattern):
            return compile_path, (thing.text,)
        return NotImplemented


def _packed(thing: Any) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(thing)
    return out.getvalue()


def pack_config(config: RunConfig, token: Token) -> bytes:
    """Give what a worker needs of the settings; `token` is the one in force."""
    values = {name: getattr(config, name) for name in RunConfig.__slots__ if name not in _LEADERS}
    parts = (token.account_tag, token.secret, token.tunnel_id, token.endpoint)
    # NO_PROXY counts where the environment named the proxy, for the edge's names too where no edge was given.
    return _packed((parts, values, config.exempt_by_environment, not config.edges))


def unpack_config(data: bytes) -> RunConfig:
    """Give it again."""
    parts, values, exempt, named = pickle.loads(data)  # noqa: S301  (from our own process, over its own socket)
    config = RunConfig(Token(*parts))
    for name, value in values.items():
        setattr(config, name, value)
    if exempt:
        from connector.transport import outbound_proxy  # noqa: PLC0415  (few need it)

        names = EDGE_NAMES if named else ()
        config.proxy_exempt = lambda host: outbound_proxy.exempt(host, os.environ, also=names)
    return config


def pack_rules(ingress: Ingress) -> bytes:
    """Give a rule set as bytes, without what it has matched so far."""
    return _packed(
        Ingress(ingress.version, ingress.rules, dict(ingress.warp_routing), ingress.warnings, ingress.defaults)
    )


def unpack_rules(data: bytes) -> Ingress:
    """Give it again."""
    ingress: Ingress = pickle.loads(data)  # noqa: S301  (as above)
    return ingress
