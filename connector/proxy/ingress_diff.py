"""What changed between two rule sets, in words.

Owns: pairing of rules and the lines. In: two Ingress. Out: lines, none when nothing changed.
Never: shows user names or passwords of services.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from connector.proxy.ingress_model import Ingress, Rule
from connector.proxy.ingress_report import changed_settings


def describe_changes(old: Ingress, new: Ingress) -> list[str]:
    """Return one line per change. Rules are paired by hostname and path; a second rule for the same is a new one."""
    before, after = _by_name(old), _by_name(new)
    lines = []
    for name, rule in after.items():
        was = before.get(name)
        if was is None:
            lines.append(f"+ rule #{rule.index + 1} {_label(rule)}: {_whole(rule)}")
        elif different := _difference(was, rule):
            lines.append(f"~ rule #{rule.index + 1} {_label(rule)}: {different}")
    lines.extend(f"- rule #{rule.index + 1} {_label(rule)}: {_whole(rule)}" for name, rule in before.items()
                 if name not in after)  # fmt: skip
    kept = [name for name in before if name in after]
    if kept != [name for name in after if name in before]:
        lines.append("~ the order of the rules")
    warp = _settings(old.warp_routing, new.warp_routing)
    if warp:
        lines.append(f"~ warp-routing: {warp}")
    return lines


_Name = tuple[str, str, int]


def _by_name(ingress: Ingress) -> dict[_Name, Rule]:
    found: dict[_Name, Rule] = {}
    for rule in ingress.rules:
        again = sum(1 for host, path, _ in found if (host, path) == (rule.hostname, rule.path))
        found[rule.hostname, rule.path, again] = rule
    return found


def _label(rule: Rule) -> str:
    return f"{rule.hostname or '*'}{' path ' + rule.path if rule.path else ''}"


def _whole(rule: Rule) -> str:
    settings = _settings({}, changed_settings(rule.settings))
    return f"{rule.service.text}{', ' + settings if settings else ''}"


def _difference(old: Rule, new: Rule) -> str:
    parts = []
    if old.service != new.service:
        parts.append(f"service {old.service.text} -> {new.service.text}")
    if settings := _settings(changed_settings(old.settings), changed_settings(new.settings)):
        parts.append(settings)
    if (old.ip_rules, old.access) != (new.ip_rules, new.access) and not settings:
        parts.append("its own ipRules or access")
    return ", ".join(parts)


def _settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    parts = []
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            was, now = (str(side[key]) if key in side else "default" for side in (old, new))
            parts.append(f"{key} {was} -> {now}" if key in old else f"{key} {now}")
    return ", ".join(parts)
