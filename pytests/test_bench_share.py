"""`tractor-host bench share`: what it prints. How long anything takes is nobody's claim here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tractor_host.bench import __main__ as bench
from tractor_host.bench import share

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent
QUIET = {**os.environ, "TRACTOR_HOST_LOG": "off"}


def test_it_measures_all_contestants() -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "benches" / "share.py", "-n", "1", "--mib", "2", "--json"],
        capture_output=True, text=True, timeout=100, check=True, env=QUIET,
    )  # fmt: skip
    assert ran.stderr == ""
    rows = {row["name"]: row for row in json.loads(ran.stdout)}
    assert {f"th {backend}" for backend in share.BACKENDS} <= set(rows)
    assert {"multiprocessing.Pool", "ProcessPoolExecutor", share.SHARED} <= set(rows)
    for name, row in rows.items():
        assert row["call"] > 0
        assert row["there"] > 0
        assert row["memcpy"] > 0
        assert row["both"] is None if name == share.SHARED else row["both"] > 0


def test_it_prints_a_table(launcher: Path) -> None:
    ran = subprocess.run(
        [launcher, "bench", "share", "-n", "1", "--mib", "1", "--mib", "3", "--only", "subint"],
        capture_output=True, text=True, timeout=100, check=True, env=QUIET,
    )  # fmt: skip
    head, *lines, last = ran.stdout.splitlines()
    assert head.split()[:2] == ["MiB", "contestant"]
    assert [line.split()[:3] for line in lines] == [
        [mib, "th", name] for mib in ("1", "3") for name in ("subint", "subint_forkserver")
    ]
    assert last.startswith("memcpy: 1 MiB ")


@pytest.mark.parametrize("words", [["-n", "0"], ["--mib", "0"], ["--mib", "much"], ["more"]])
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["share", *words])
    assert "tractor-host bench share: error: " in capsys.readouterr().err
