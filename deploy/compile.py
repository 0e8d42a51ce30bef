"""Compiles the hot path of an installed package, or of a copy of the sources: `python deploy/compile.py DIRECTORY`.

Owns: the list of modules that are worth it, and how mypyc is called.
In: the directory that holds `connector` (compiled modules stand for their sources from then on), mypy, setuptools, cc.
Out: extension modules beside their sources, for the Python that runs this. Exit status 0, or 3 without a compiler.
Never: changes a source file; downloads anything.

The sources stay the whole truth: the same files run as they are, and the same tests run on both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

# In the order of a message's way. Left out: whatever runs once, and coroutines (mypyc's `throw` is deprecated in 3.12).
# An interpreted class cannot inherit from a compiled one: what inherits from one here is here too.
MODULES: list[str] = """
    wire/h2_frames wire/h2_headers wire/h2_hpack wire/connect wire/ws_stream wire/datagram_v2 wire/datagram_v3
    protocol/ports protocol/counts protocol/h2_limits protocol/h2_guard protocol/h2_blocks protocol/h2_request
    protocol/h2_opening protocol/h2_control protocol/h2_stream protocol/h2_connection protocol/http1
    protocol/quic_limits protocol/quic_request protocol/quic_stream protocol/quic_streams protocol/datagrams
    protocol/idle_wheel transport/streams transport/tls_stream proxy/write_queue
    proxy/exchange proxy/watch proxy/reply proxy/builtin proxy/ws_pings proxy/origins proxy/http proxy/http2_exchange
    proxy/splice proxy/ws_splice proxy/carrier proxy/websocket proxy/dispatch
""".split()  # noqa: SIM905


def problem() -> str:
    """What stands in the way of compiling here; empty if nothing does."""
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(compiler) and not shutil.which("cc"):
        return f"there is no C compiler ({compiler}, cc)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"the headers of this Python are missing ({header.name})"
    for name in ("mypyc", "setuptools"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return ""


def compile_tree(tree: Path, *, level: str) -> None:
    """Compile MODULES under `tree`/connector. Errors: SystemExit with the compiler's words."""
    from mypyc.build import mypycify  # noqa: PLC0415  (`problem` says when they are missing)
    from setuptools import setup  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        # Alone: beside other packages mypy would take them for sources of its own.
        shutil.copytree(tree / "connector", "connector", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        config = Path("mypy.ini")
        # Types are checked by `make types`; here only what is compiled matters.
        config.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n")
        files = [f"connector/{module}.py" for module in MODULES]
        extensions = mypycify(
            ["--config-file", str(config), *files],
            opt_level=level,
            debug_level="0",
            target_dir="c",
            group_name="connector",
        )
        setup(
            name="connector-compiled",
            packages=[],
            ext_modules=extensions,
            script_args=[
                *("-q", "build_ext", "--build-temp", "o", "--build-lib", "lib"),
            ],
        )
        for made in Path("lib").rglob("*.so"):
            shutil.copy2(made, tree / made.relative_to("lib"))


def main() -> int:
    """Run."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "connector" / "wire").is_dir():
        print("usage: python deploy/compile.py DIRECTORY    (one that holds the package `connector`)", file=sys.stderr)
        return 2
    if text := problem():
        print(f"compile: not compiled: {text}; the sources run as they are", file=sys.stderr)
        return 3
    began = time.monotonic()
    compile_tree(Path(sys.argv[1]).resolve(), level=os.environ.get("LEVEL", "3"))
    print(f"compile: {len(MODULES)} modules in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
