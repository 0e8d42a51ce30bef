"""Bytes in JSON, both ways, and the one place that knows what JSON looks like in dumps and captures.

Owns: `jsonable` and `from_json`. In: decoded values. Out: values that `json` takes, and back.
Never: redacts (redact.py does).
"""

from __future__ import annotations

import binascii
from typing import Any

from connector.errors import UsageError


def bytes_to_json(data: bytes) -> Any:
    """Return printable UTF-8 as text, anything else as `{"hex": "..."}`."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return {"hex": data.hex()}
    return text if all(char.isprintable() or char in "\n\r\t" for char in text) else {"hex": data.hex()}


def jsonable(value: Any) -> Any:
    """Return `value` with every bytes object replaced; containers are copied."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes_to_json(bytes(value))
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """Turn `{"hex": "00ff"}` and `{"base64": "AP8="}` back into bytes, anywhere in `value`. Errors: UsageError."""
    if isinstance(value, dict):
        if set(value) == {"hex"} or set(value) == {"base64"}:
            ((form, text),) = value.items()
            try:
                return bytes.fromhex(text) if form == "hex" else binascii.a2b_base64(text, strict_mode=True)
            except (ValueError, TypeError) as error:
                raise UsageError(f"a {form} value that is none: {error}") from None
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value


def as_bytes(value: Any) -> bytes:
    """Return text as UTF-8, bytes as they are. Errors: UsageError."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise UsageError(f"{value!r} stands where text or bytes are due", advice='Bytes are {"hex": "00ff"} in JSON.')
