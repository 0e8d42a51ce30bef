"""The objects that loading code makes: they stay for good, so nobody should look through them for garbage.

Owns: the collector's pause while modules load. In: nothing. Out: nothing. Never: stays off when the loading is over.

*Strategy*: importing makes some 100,000 objects and hardly any garbage, yet the collector walks them again and again as
their number grows: 6 of 104 ms of CPU. Afterwards they are set aside (`gc.freeze`), so that no collection of a run of
days walks them again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Load modules inside this block. Blocks may be nested; the outermost one ends the pause."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
