"""`tractor-host bench calls`: what it prints. How long anything takes is nobody's claim here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tractor_host.bench import __main__ as bench
from tractor_host.bench import calls

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent
QUIET = {**os.environ, "TRACTOR_HOST_LOG": "off"}
QUICK = ["-n", "1", "--seconds", "0.01"]


def run(
    *words: str, command: tuple[Path | str, ...] = (sys.executable, ROOT / "benches" / "calls.py")
) -> str:
    ran = subprocess.run(
        [*command, *QUICK, *words],
        capture_output=True, text=True, timeout=100, check=True, env=QUIET,
    )  # fmt: skip
    assert ran.stderr == ""
    return ran.stdout


def test_it_measures_all_contestants() -> None:
    rows: list[dict[str, Any]] = json.loads(
        run("--size", "0", str(1 << 20), "--in-flight", "1", "3", "--json")
    )
    there = [name for name in calls.POOLS if name != "loky" or find_spec("loky")] + list(calls.LOOPED)
    assert [(row["size"], row["in_flight"], row["name"]) for row in rows] == [
        (size, in_flight, name) for size in (0, 1 << 20) for in_flight in (1, 3) for name in there
    ]
    for row in rows:
        assert row["us"] > 0
        assert row["ratio"] > 0
        assert row["copies"] > 0 if row["size"] else row["copies"] is None
        assert row["ratio"] == 1 or row["name"] != there[0]


def test_it_prints_a_table(launcher: Path) -> None:
    words = ("--size", "5", "--in-flight", "1", "2", "--only", "th subint")
    head, *lines, last = run(*words, command=(launcher, "bench", "calls")).splitlines()
    assert head.split()[:4] == ["bytes", "in", "flight", "contestant"]
    names = ["th subint_forkserver", "th subint", "th subint, own GIL"]
    found = [[cell.strip() for cell in line.split("  ") if cell][:3] for line in lines]
    assert found == [["5", count, name] for count in ("1", "2") for name in names]
    assert last == "ratio: in units of th subint_forkserver"


def test_what_would_be_too_large_is_left_out() -> None:
    words = ("--size", str(200 << 20), "--in-flight", "1", "2", "--only", "th subint, own GIL", "--json")
    (row,) = json.loads(run(*words))
    assert (row["size"], row["in_flight"], row["ratio"]) == (200 << 20, 1, 1)


def test_it_fails_if_a_contestant_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert bench.main(["calls", *QUICK]) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["-n", "0"],
        ["--size", "-1"],
        ["--size", "much"],
        ["--in-flight", "0"],
        ["--size", str(1 << 28), "--in-flight", "2"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--only", "nobody"],
        ["more"],
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["calls", *words])
    assert "tractor-host bench calls: error: " in capsys.readouterr().err
