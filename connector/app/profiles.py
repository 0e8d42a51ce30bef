"""What a Python program can honestly say at /debug/pprof: stacks, objects, samples.

Owns: the texts. In: the running process. Out: text. Never: runs unless somebody asks.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import traceback
from collections import Counter
from types import FrameType

SAMPLE_SECONDS = 0.005
"""Between samples: 200 a second cost well under a hundredth of one core."""

MAX_SECONDS = 120.0
SHOWN_TYPES = 40
SHOWN_LINES = 30
MAX_DEPTH = 64

_sampling = threading.Lock()


def stack_dump() -> str:
    """Give the stack of every thread and every task of the loop that runs here."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)))
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        lines = []
        for frame in task.get_stack():
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
        parts.append(f"task {task.get_name()}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def heap_dump(trace: str = "") -> str:
    """Count live objects by type. `trace`: `start` lets Python note where memory is taken, `show` tells, `stop` ends.

    Noting costs a third of all speed while it lasts.
    """
    import tracemalloc  # noqa: PLC0415  (rarely needed)

    if trace == "start":
        tracemalloc.start()
        return "tracing memory; look with ?trace=show, end with ?trace=stop\n"
    if trace == "stop":
        tracemalloc.stop()
        return "no longer tracing memory\n"
    if trace == "show":
        if not tracemalloc.is_tracing():
            return "not tracing memory; begin with ?trace=start\n"
        statistics = tracemalloc.take_snapshot().statistics("lineno")
        return "".join(f"{row}\n" for row in statistics[:SHOWN_LINES])
    objects = gc.get_objects()
    counts = Counter(type(thing).__qualname__ for thing in objects)
    rows = [f"{count:8} {name}" for name, count in counts.most_common(SHOWN_TYPES)]
    return "\n".join([f"{len(objects)} objects that the collector knows", *rows]) + "\n"


async def sample(seconds: float) -> str:
    """Look at every thread's stack for `seconds` (at most MAX_SECONDS); give collapsed stacks with counts.

    One profile at a time. The sampler is a thread of its own, so that it sees the loop's thread while it works.
    """
    seconds = min(max(seconds, SAMPLE_SECONDS), MAX_SECONDS)
    if not _sampling.acquire(blocking=False):
        return "a profile is being taken already\n"
    stop = threading.Event()
    counts: Counter[str] = Counter()
    thread = threading.Thread(target=_sample_until, args=(stop, counts), name="sampling profile", daemon=True)
    thread.start()
    try:
        await asyncio.sleep(seconds)
    finally:
        stop.set()
        _sampling.release()
    await asyncio.get_running_loop().run_in_executor(None, thread.join)
    return "".join(f"{stack} {count}\n" for stack, count in counts.most_common())


def _sample_until(stop: threading.Event, counts: Counter[str]) -> None:
    mine = threading.get_ident()
    while not stop.wait(SAMPLE_SECONDS):
        for ident, frame in sys._current_frames().items():
            if ident != mine:
                counts[_collapse(frame)] += 1
        time.sleep(0)


def _collapse(frame: FrameType | None) -> str:
    names: list[str] = []
    while frame is not None and len(names) < MAX_DEPTH:
        code = frame.f_code
        names.append(f"{code.co_filename.rpartition('/')[2]}:{code.co_qualname}")
        frame = frame.f_back
    return ";".join(reversed(names))
