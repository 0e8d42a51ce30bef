"""PARITY.md says of every flag what the program does with it."""

from __future__ import annotations

import re
from pathlib import Path

import connector
from connector.app.command_table import ABSENT, COMMANDS
from connector.app.flag_table import FLAGS
from connector.app.metric_families import CLOUDFLAREDS, FAMILIES

ROW = re.compile(r"^\| `--([a-z0-9-]+)`(?: \(`([a-zA-Z-]+)`\))? \| (.*?) \| (.*?) \|$", re.M)


def test_the_flag_table_of_parity_md_is_the_programs_own() -> None:
    text = (Path(connector.__file__).parent / "PARITY.md").read_text()
    documented = {
        name: (alias, state, tuple(re.findall(r"`(.*?)`", env))) for name, alias, state, env in ROW.findall(text)
    }
    assert documented == {flag.name: (flag.alias, flag.effect, flag.env) for flag in FLAGS.values()}


METRIC_ROW = re.compile(r"^\| `([a-z0-9_]+)` \| (counter|gauge|histogram) \| (.*?) \| (.*?) \|$", re.M)
COUNTED = re.compile(r'COUNTS\.(?:add|set|observe)\(\s*"([a-z0-9_]+)"')


def test_the_metrics_of_parity_md_are_the_programs_own() -> None:
    text = (Path(connector.__file__).parent / "PARITY.md").read_text()
    documented = {
        name: (kind, tuple(re.findall(r"`(.*?)`", labels)), text)
        for name, kind, labels, text in METRIC_ROW.findall(text)
    }
    expected = {}
    for family in FAMILIES.values():
        note = f"{family.state}: {family.note}" if family.note else family.state
        shown = note if family.name in CLOUDFLAREDS else family.help
        expected[family.name] = (family.kind, family.labels, shown)
    assert documented == expected


def test_whatever_is_counted_somewhere_is_in_the_table() -> None:
    for path in Path(connector.__file__).parent.rglob("*.py"):
        for name in COUNTED.findall(path.read_text()):
            assert name in FAMILIES, f"{path.name} counts {name}, which no table names"


def test_every_command_of_cloudflared_has_a_row_that_is_true() -> None:
    text = (Path(connector.__file__).parent / "PARITY.md").read_text()
    section = text[text.index("## Commands") : text.index("## Flags of")]
    rows = dict(re.findall(r"^\| `([a-z -]+)` \| (.*?) \|$", section, re.M))
    assert {words for words, state in rows.items() if state.startswith("no")} == {*ABSENT}
    assert {words for words, state in rows.items() if not state.startswith("no")} <= {*COMMANDS}
    assert {words for words in COMMANDS if words.startswith("tunnel")} <= {*rows}
