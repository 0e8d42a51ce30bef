"""Coverage-guided fuzzing of the HTTP/2 engine: `python tests/fuzz/fuzz_h2.py [corpus]`. Needs `atheris`.

The first byte picks what the rest is: raw bytes behind a good handshake, a header block, or a serialised list. The
same checks as in test_fuzz_h2.py apply, which runs without `atheris`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz_h2 needs the package atheris: pip install atheris")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    with atheris.instrument_imports(include=["connector"]):
        from tests.fuzz.test_fuzz_h2 import check_header_block, check_serialised, check_stream
    checks = (check_stream, check_header_block, check_serialised)

    def one_input(data: bytes) -> None:
        if data:
            checks[data[0] % len(checks)](data[1:])

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
