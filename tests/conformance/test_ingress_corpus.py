"""`ingress validate` and `ingress rule` answer as cloudflared does: 757 configurations and requests, recorded from it.

With CLOUDFLARED set the recording itself is checked against that program.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from connector.app.cli import main
from tests.conformance.record_ingress import RECORDED, ask, cases

CASES: list[dict[str, Any]] = json.loads(RECORDED.read_text())

OTHER_WORDS = (
    "invalid HTTP status code", "error parsing YAML", "json: ", "invalid character", "strconv.", "unexpected end of",
    "cloudflared tunnel rule expects", "invalid host: ParseAddr",
)  # fmt: skip
"""Refusals that say the same in other words (Go's libraries speak there)."""


def shown(case: dict[str, Any]) -> str:
    return json.dumps([*case["args"], case.get("file")], ensure_ascii=False)[:300]


def answer(case: dict[str, Any], directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    words = ["tunnel"]
    path = directory / "config.yml"
    if "file" in case:
        path.write_text(case["file"], encoding="utf-8")
        words += ["--config", str(path)]
    status = main([*words, *case["args"]])
    out, err = (text.replace(str(path), "FILE") for text in capsys.readouterr())
    return {"status": status, "stdout": out, "stderr": err}


def test_every_verdict_and_every_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("connector.app.local_config.DIRECTORIES", (str(tmp_path / "none"),))
    wrong = []
    for case in CASES:
        ours = answer(case, tmp_path, capsys)
        theirs_out = case["stdout"].replace("://u:p@", "://").replace("://u:p%40h@", "://")
        if ours["status"] != case["status"] or ours["stdout"] != theirs_out:
            wrong.append(f"{shown(case)}\n  cloudflared: {case}\n  connector:   {ours}")
        elif case["status"] and not any(words in case["stderr"] for words in OTHER_WORDS):
            first = case["stderr"].strip().replace("://u p@", "://")
            if not ours["stderr"].removeprefix("Note: Configuration file FILE was empty\n").startswith(first):
                wrong.append(f"{shown(case)}\n  cloudflared says: {first}\n  connector says: {ours['stderr']}")
    assert not wrong, f"{len(wrong)} of {len(CASES)}:\n" + "\n".join(wrong[:40])


def test_the_recording_covers_the_corpus() -> None:
    recorded = [{key: case[key] for key in ("args", "file") if key in case} for case in CASES]
    assert recorded == cases(), "run tests/conformance/record_ingress.py with CLOUDFLARED set"


@pytest.mark.skipif("CLOUDFLARED" not in os.environ, reason="CLOUDFLARED is not set: the recording is not re-asked")
def test_cloudflared_still_says_so(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda case: ask(os.environ["CLOUDFLARED"], case, tmp_path), CASES)
        for case, now in zip(CASES, answers, strict=True):
            assert now == {key: case[key] for key in now}, shown(case)
