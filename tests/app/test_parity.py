"""PARITY.md says of every flag what the program does with it."""

from __future__ import annotations

import re
from pathlib import Path

import connector
from connector.app.flag_table import FLAGS

ROW = re.compile(r"^\| `--([a-z0-9-]+)`(?: \(`([a-zA-Z-]+)`\))? \| (.*?) \| (.*?) \|$", re.M)


def test_the_flag_table_of_parity_md_is_the_programs_own() -> None:
    text = (Path(connector.__file__).parent / "PARITY.md").read_text()
    documented = {
        name: (alias, state, tuple(re.findall(r"`(.*?)`", env))) for name, alias, state, env in ROW.findall(text)
    }
    assert documented == {flag.name: (flag.alias, flag.effect, flag.env) for flag in FLAGS.values()}
