"""The connectors that are compared, and how they are started.

Owns: Contender and its command lines.
In: binaries, command lines. Out: Contender values; commands with everything filled in.
Never: starts anything.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

OURS = (
    "{python} -m connector run --edge {edge} --cacert {ca} --protocol {transport} --ha-connections 1 "
    "--token-file {token_file} {features}"
)
CLOUDFLARED = (
    "{binary} tunnel --no-autoupdate --edge {edge} --cacert {ca} --protocol {transport} --ha-connections 1 "
    "--no-prechecks --grace-period 1s --metrics 127.0.0.1:0 run --token-file {token_file} {features}"
)


class Contender(NamedTuple):
    """One connector: its name in the table and its command, with {edge}, {ca}, {transport}, {token_file}, {features}.

    `image`: the name of a container image of it.
    """

    name: str
    command: list[str]
    image: str = ""

    def filled(self, values: Mapping[str, str], features: Sequence[str]) -> list[str]:
        """The command. `{features}` becomes a `--features NAME` each; without that word they are its own affair."""
        command: list[str] = []
        for part in self.command:
            if part == "{features}":
                for feature in features:
                    command += ["--features", feature]
                continue
            filled = part
            for key, value in values.items():
                filled = filled.replace("{" + key + "}", value)
            command.append(filled)
        return command


def ours() -> Contender:
    """This project, on the Python that runs the benchmark."""
    return Contender(
        "ours", [part.replace("{python}", sys.executable) for part in OURS.split()], "tunnel-connector:0.1.0"
    )


def cloudflared(binary: str) -> Contender:
    """The original."""
    command = [part.replace("{binary}", binary) for part in CLOUDFLARED.split()]
    return Contender("cloudflared", command, "cloudflare/cloudflared:latest")


def other(text: str) -> Contender:
    """`NAME=command line`; raises ValueError."""
    name, equals, command = text.partition("=")
    if not (name and equals and "{edge}" in command and "{token_file}" in command):
        raise ValueError(f"{text!r} is not NAME=COMMAND with {{edge}}, {{ca}} and {{token_file}} in it")
    return Contender(name, shlex.split(command))
