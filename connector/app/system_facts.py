"""Facts of the machine for /diag/system and `tunnel diag`: memory, descriptors, system, disks.

Owns: the reading of /proc and statvfs, in cloudflared's form. In: nothing. Out: a JSON object; errors beside the facts.
Never: fails as a whole because one fact is missing.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from connector import __version__
from connector.transport.daemon_thread import in_daemon_thread
from connector.transport.rpc import go_arch

SYSTEM_SECONDS = 10.0
"""What the whole collection may take: a network disk that hangs must not hang the page."""

_PSEUDO = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "fusectl",
    "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "squashfs", "sysfs", "tmpfs",
    "tracefs",
})  # fmt: skip
MAX_DISKS = 64


async def system_information() -> dict[str, Any]:
    """Give `{"info":…,"errors":…}`; `errors` is empty when everything could be read."""
    try:
        async with asyncio.timeout(SYSTEM_SECONDS):
            return await in_daemon_thread(_collect, "facts of the system")  # a dead mount would hold it for ever
    except TimeoutError:
        text = f"no answer of the system within {SYSTEM_SECONDS:g} seconds"
        return {"info": None, "errors": {"diskVolumeInformationError": {"error": text, "rawInfo": ""}}}


def _collect() -> dict[str, Any]:
    info: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    parts: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
        ("memoryInformationError", _memory),
        ("fileDescriptorsInformationError", _descriptors),
        ("operatingSystemInformationError", _system),
        ("diskVolumeInformationError", _disks),
    )
    for name, part in parts:
        try:
            info.update(part())
        except (OSError, ValueError, KeyError) as error:
            errors[name] = {"error": str(error), "rawInfo": ""}
    info.update(
        cloudflaredVersion=__version__,
        goVersion=f"Python {platform.python_version()}",
        goArch=go_arch().partition("_")[2],
    )
    return {"info": info, "errors": errors}


def _memory() -> dict[str, Any]:
    """Kilobytes, of the whole machine."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, available = (int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return {"memoryMaximum": total, "memoryCurrent": total - available}


def _descriptors() -> dict[str, Any]:
    used, _, most = Path("/proc/sys/fs/file-nr").read_text().split()
    return {"fileDescriptorMaximum": min(int(most), 2**63 - 1), "fileDescriptorCurrent": int(used)}


def _system() -> dict[str, Any]:
    name = platform.uname()
    return {
        "osSystem": name.system,
        "hostName": socket.gethostname(),
        "osVersion": name.release,  # the names are as cloudflared has them
        "osRelease": name.version,
        "architecture": name.machine,
    }


def _disks() -> dict[str, Any]:
    """Kilobytes of every mounted file system that is one."""
    disks: dict[str, dict[str, Any]] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        device, place, kind = line.split()[:3]
        if kind in _PSEUDO or device in disks or len(disks) >= MAX_DISKS:
            continue
        try:
            usage = shutil.disk_usage(place.encode().decode("unicode_escape"))
        except (OSError, ValueError):
            continue  # not ours to read
        disks[device] = {"name": device, "sizeMaximum": usage.total // 1024, "sizeCurrent": usage.used // 1024}
    return {"disk": list(disks.values())}
