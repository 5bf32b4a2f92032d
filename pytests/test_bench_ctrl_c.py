"""`tractor-host bench ctrl-c`: what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tractor_host.bench import __main__ as bench

pytestmark = pytest.mark.outside

ROOT = Path(__file__).resolve().parent.parent


def test_it_measures_both_pythons() -> None:
    words = ["-n", "1", "--json", "--situation", "lock", "--situation", "C code that holds the GIL"]
    ran = subprocess.run(
        [sys.executable, ROOT / "benches" / "ctrl_c.py", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stderr == ""
    rows = {(row["situation"], row["python"]): row for row in map(json.loads, ran.stdout.splitlines())}
    for python in ("tractor-host", "python"):
        heeded = rows["lock", python]
        assert heeded["code"] == -2
        assert heeded["reaction"] > 0
        assert heeded["end"] > 0
    stuck = rows["C code that holds the GIL", "tractor-host"]
    assert stuck["code"] == 130
    assert stuck["reaction"] is None
    left_alone = rows["C code that holds the GIL", "python"]
    assert (left_alone["code"], left_alone["end"]) == (None, None)


def test_it_prints_a_table(launcher: Path) -> None:
    ran = subprocess.run(
        [launcher, "bench", "ctrl-c", "-n", "1", "--situation", "sleep"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    head, ours, theirs = ran.stdout.splitlines()
    assert head.split()[:2] == ["situation", "under"]
    assert ours.split()[:2] == ["sleep", "tractor-host"]
    assert theirs.split()[:2] == ["sleep", "python"]


@pytest.mark.parametrize("words", [["-n", "0"], ["--situation", "snow"]], ids=["n", "situation"])
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.main(["ctrl-c", *words])
    assert raised.value.code == 2
    assert words[0] in capsys.readouterr().err
