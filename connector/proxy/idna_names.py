"""Internationalised names as resolvers and certificates spell them.

Owns: the lookup form of a host name (UTS 46, non-transitional, STD3 rules). In: a name. Out: ASCII, or nothing.
Never: resolves.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PLAIN = re.compile(r"[a-z0-9.-]*")
_LABEL = re.compile(r"[a-z0-9-]*")


@lru_cache(maxsize=1024)
def lookup_name(name: str) -> str:
    """Return the ASCII form that a lookup of `name` uses, or an empty text when the name cannot be looked up.

    This is what Go's `idna.Lookup` gives: lower case, mapped and punycoded; names with `*` or `_` have no such form.
    """
    if name.isascii():
        mapped = name.lower()
        if not _PLAIN.fullmatch(mapped):
            return ""
    else:
        import idna  # noqa: PLC0415  (tables; rarely needed)

        try:
            mapped = idna.uts46_remap(name, std3_rules=True, transitional=False)
        except (idna.IDNAError, UnicodeError, IndexError):
            return ""
        mapped = mapped.replace("。", ".")
    labels = mapped.split(".")
    try:
        return ".".join(_label(label) for label in labels)
    except ValueError:
        return ""


def _label(label: str) -> str:
    if label.startswith("xn--"):
        decoded = label[4:].encode("ascii").decode("punycode")
        if not decoded or decoded.isascii():
            raise ValueError(label)
        return label
    if label[2:4] == "--" or label.startswith("-") or label.endswith("-"):
        raise ValueError(label)
    if label.isascii():
        if not _LABEL.fullmatch(label):
            raise ValueError(label)
        return label
    return "xn--" + label.encode("punycode").decode("ascii")
