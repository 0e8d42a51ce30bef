"""Dashboard and alert rules against a scrape of a running connector; promtool reads scrape, rules and their tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from connector.app.metric_families import ABSENT, CLOUDFLAREDS, FAMILIES, SERVED
from tests.support.origins import http_origin
from tests.support.processes import ROOT, tunnel

DEPLOY = ROOT / "deploy" / "grafana"
NAME = re.compile(r"\b(?:build_info|(?:cloudflared|connector|quic_client|process|python|promhttp)_[a-z0-9_]+)\b")
TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.M)
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: apt-get install prometheus)")
SUFFIXES = ("_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    state = tmp_path_factory.mktemp("state")
    with http_origin() as port, tunnel(state, f"http://127.0.0.1:{port}", run_args=("--metrics", "127.0.0.1:0")) as it:
        line = it.connector.message("Starting metrics server on ")
        address = line["message"].split()[-1]
        for path in ("/", "/missing"):
            url = f"{it.public}{path}"
            subprocess.run(["curl", "-s", "--cacert", str(it.ca), "-o", "/dev/null", url], check=True, timeout=30)
        with urlopen(f"http://{address}", timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            yield answer.read().decode()


def expressions() -> list[str]:
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("expr"), str):
                found.append(value["expr"])
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    walk(json.loads((DEPLOY / "dashboard.json").read_text()))
    walk(yaml.safe_load((DEPLOY / "alerts.yml").read_text()))
    return found


def family_of(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def test_every_metric_that_a_panel_or_rule_names_is_served(scrape: str) -> None:
    names = {name for text in expressions() for name in NAME.findall(text)}
    assert len(names) > 20
    served = {line.split("{")[0].split(" ")[0] for line in scrape.splitlines() if not line.startswith("#")}
    for name in names:
        family = FAMILIES.get(name) or FAMILIES.get(family_of(name))
        if family is None or (family.state == SERVED and not family.labels):
            assert name in served, name
        else:
            assert family.state != ABSENT, name


def test_the_scrape_is_what_the_table_says(scrape: str) -> None:
    types = dict(TYPE.findall(scrape))
    for name, kind in types.items():
        if name in FAMILIES:
            assert kind == FAMILIES[name].kind, name
            assert FAMILIES[name].state != ABSENT, name
        else:
            assert name.startswith(("process_", "python_")), name
    for family in FAMILIES.values():
        if family.state == SERVED:
            assert family.name in types, family.name
    for line in scrape.splitlines():
        if line.startswith("#"):
            continue
        name = line.split("{")[0].split(" ")[0]
        family = FAMILIES.get(name) or FAMILIES.get(family_of(name))
        if family is not None:
            labels = set(re.findall(r'(\w+)="', line)) - {"le"}
            assert labels == set(family.labels), line


def promtool(*words: str, text: str = "", cwd: Path = ROOT) -> tuple[int, str]:
    done = subprocess.run(
        ["promtool", *words], input=text, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


@needs_promtool
def test_promtool_reads_the_scrape(scrape: str) -> None:
    status, remarks = promtool("check", "metrics", text=scrape)
    assert status in {0, 3}, remarks  # 3: it would have named something otherwise
    for remark in remarks.splitlines():
        assert remark.split(" ")[0] in CLOUDFLAREDS, remark  # names that were cloudflared's choice


@needs_promtool
def test_promtool_accepts_rules_and_their_tests() -> None:
    for command in (("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")):
        status, remarks = promtool(*command, cwd=DEPLOY)
        assert status == 0, remarks


@needs_promtool
def test_promtool_accepts_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    rules = []
    for number, text in enumerate(expressions()):
        filled = text.replace("$__rate_interval", "5m").replace("$job", "x").replace("$instance", "y")
        rules.append({"record": f"panel:{number}", "expr": filled})
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    status, remarks = promtool("check", "rules", str(path))
    assert status == 0, remarks
