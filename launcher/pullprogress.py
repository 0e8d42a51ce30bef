"""What an engine tells while it pulls an image, in a handful of lines for people.

Owns: adding up layers and bytes, deciding when there is something new to say.
In: the engine's messages. Out: a line, or None.
Never: asks an engine; keeps more than two numbers a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEP = 10
"""Per cent of the bytes known of between two lines."""

READY = {"Already exists", "Pull complete"}


class PullProgress:
    """One pull. Podman tells nothing but the last line."""

    def __init__(self) -> None:
        self._ready: dict[str, bool] = {}
        self._bytes: dict[str, tuple[int, int]] = {}
        self._said: tuple[int, int] | None = None

    def line(self, message: Mapping[str, Any]) -> str | None:
        """What to tell after this message."""
        status, layer = str(message.get("status") or ""), str(message.get("id") or "")
        if status.startswith("Digest: "):
            return f"pulled: {status.removeprefix('Digest: ')}"
        if not layer or status.startswith("Pulling from"):
            return None
        self._ready[layer] = self._ready.get(layer, False) or status in READY
        detail = message.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self._bytes[layer] = int(detail.get("current") or 0), int(detail["total"])
        elif status not in {"Pulling fs layer", "Waiting"} and layer in self._bytes:
            total = self._bytes[layer][1]
            self._bytes[layer] = total, total
        got, total = (sum(numbers) for numbers in zip(*self._bytes.values(), strict=True)) if self._bytes else (0, 0)
        ready = sum(self._ready.values())
        now = (100 * got // total // STEP if total else 0), ready
        if now in {self._said, (0, 0)}:
            return None
        self._said = now
        size = f"{got / 1e6:.1f} of {total / 1e6:.1f} MB, " if total else ""
        return f"pulling: {size}{ready} of {len(self._ready)} layers ready"
