"""The golden bytes of proto/vectors/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).resolve().parents[2] / "proto" / "vectors"


def load(file: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((VECTORS / file).read_text())["vectors"]
    return entries


def all_vectors() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for path in sorted(VECTORS.glob("*.json")) for entry in load(path.name)}


def vector(name: str) -> bytes:
    return bytes.fromhex(all_vectors()[name]["hex"])
