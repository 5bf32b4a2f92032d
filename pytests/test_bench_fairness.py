"""`tractor-host bench fairness`: what it prints. How late anything is is nobody's claim here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tractor_host.bench import fairness

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--busy", "2", "--seconds", "0.5", "--starts", "1"]
QUIET = {**os.environ, "TRACTOR_HOST_LOG": "off"}


def test_it_measures_all_kinds() -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "benches" / "fairness.py", *QUICK, "--json"],
        capture_output=True, text=True, timeout=200, check=True, env=QUIET,
    )  # fmt: skip
    assert ran.stderr == ""
    found = json.loads(ran.stdout)
    for kind in fairness.KINDS:
        row = found[f"2 busy, {kind}"]
        assert len(row["late"]) == 3
        assert len(row["used"]) == 2
        assert row["rate"] > 0
    assert found[f"2 busy, {fairness.KINDS[2]}"]["busy_start"] > 0
    assert [len(found[key]["used"]) for key in ("priority", "quota", "own")] == [3, 3, 1]


def test_it_prints_a_table(launcher: Path) -> None:
    ran = subprocess.run(
        [launcher, "bench", "fairness", *QUICK],
        capture_output=True, text=True, timeout=200, check=True, env=QUIET,
    )  # fmt: skip
    for kind in fairness.KINDS:
        assert f"2 busy, {kind}" in ran.stdout
    assert ran.stdout.count("priority") == 3
    assert ran.stdout.count("cpu_quota") == 4


@pytest.mark.parametrize("words", [["--busy", "0"], ["--seconds", "-1"], ["--starts", "no"], ["more"]])
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fairness.main(words)
    assert "usage: tractor-host bench fairness" in capsys.readouterr().err
