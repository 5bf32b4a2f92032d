"""`tractor-host bench spawn`: what it prints, what it skips, and that nothing is left of it.

How long anything takes is nobody's claim here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import helpers
from conftest import Running
from helpers import until, until_same
from tractor_host.bench import __main__ as bench
from tractor_host.bench import _contestants, spawn
from tractor_host.bench._contestants import CONTESTANTS, YARDSTICK

pytestmark = pytest.mark.outside

LIMIT = 100
ROOT = Path(__file__).resolve().parent.parent
#: Those that need nothing that may not be there.
BUILT_IN = [name for name, make in CONTESTANTS.items() if make().needs is None]
CAN_PRELOAD = [name for name in BUILT_IN if CONTESTANTS[name]().preload is not None]


class Mark:
    """A variable that all processes of a run inherit, by which they are found."""

    def __init__(self) -> None:
        self.value = f"{os.getpid()}-{os.urandom(8).hex()}"
        self.environment = {**helpers.importable(), "TH_TEST_MARK": self.value}

    def processes(self) -> list[int]:
        """Those that have it, but for zombies."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended just now; a zombie has none
                if f"TH_TEST_MARK={self.value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


@pytest.fixture
def mark() -> Mark:
    return Mark()


def run(mark: Mark, *arguments: str, command: tuple[str, ...] = ("-m", "tractor_host.bench", "spawn")) -> str:
    """What it prints; it must end well, write nothing to stderr, and leave nobody behind."""
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env=mark.environment,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert mark.processes() == []
    return done.stdout


def rows_of(found: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    assert found["failed"] == []
    return [tuple(row[name] for name in names) for row in found["results"]]


# -- what it measures ----------------------------------------------------------------------------------


def test_every_contestant_has_a_row_beside_its_live_workers(mark: Mark) -> None:
    found = json.loads(run(mark, "-n", "2", "--live", "2", "--jobs", "2", "--json"))
    missing = [name for name, make in CONTESTANTS.items() if (needs := make().needs) and not find_spec(needs)]
    assert found["failed"] == []
    assert found["skipped"] == [f"{name}: it is not installed" for name in missing]
    assert [row["name"] for row in found["results"]] == [name for name in CONTESTANTS if name not in missing]
    assert (found["about"]["rounds"], found["about"]["jobs"]) == (2, 2)
    (unit,) = (row["p50"] for row in found["results"] if row["name"] == YARDSTICK)
    for row in found["results"]:
        assert (row["preload"], row["ballast"], row["live"]) == ("bare", 0, 2)
        reaped = [1e3 * seconds for seconds in row["seconds"]["reaped"]]
        assert len(reaped) == len(row["seconds"]["answered"]) == 2
        assert 0 < row["p50"] <= row["p95"] <= row["max"] == max(reaped)
        assert row["ratio"] == row["p50"] / unit
        assert row["throughput"] > 0 < row["answered"]
        assert row["kill"] > 0
        # What a subinterpreter takes may have been there from the one before it.
        assert row["private"] > 0 or row["name"] in ("th subint", "th subint, own GIL", "interpreters")


def test_without_live_workers_there_is_nothing_to_say_of_them(mark: Mark) -> None:
    found = json.loads(run(mark, "-n", "1", "--only", "subprocess", "th fork", "--live", "0", "--json"))
    rows = rows_of(found, "name", "live", "private", "kill", "ratio")
    assert rows == [("subprocess", 0, None, None, None), ("th fork", 0, None, None, None)]


def test_many_live_workers_and_much_ballast_come_one_contestant_after_the_other(mark: Mark) -> None:
    names = ("th forkserver", YARDSTICK, "mp fork")
    arguments = ("--live", "1", "--live", "17", "--ballast", "0", "--ballast", "65")
    found = json.loads(run(mark, "-n", "3", "--jobs", "1", "--only", *names, *arguments, "--json"))
    settings = [(ballast, live) for ballast in (0, 65) for live in (1, 17)]
    expected = [(name, *setting) for setting in settings for name in names]
    assert rows_of(found, "name", "ballast", "live") == expected
    for row in found["results"]:
        together = (row["ballast"], row["live"]) == (0, 1)
        # The yardstick takes turns with each of the others then.
        turns = 6 if row["name"] == YARDSTICK and not together else 3
        assert len(row["seconds"]["reaped"]) == turns, row


def test_ballast_is_memory_of_its_own() -> None:
    before = _contestants.private(os.getpid())
    ballast = _contestants.touch(16)
    assert _contestants.private(os.getpid()) - before > 15 << 20
    ballast.close()


def test_each_way_to_preload_imports_once_for_all_workers(mark: Mark, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "told.py").write_text(f"with open({str(seen)!r}, 'a') as file: file.write('imported\\n')")
    mark.environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    only = ("--only", *BUILT_IN)
    found = json.loads(run(mark, "-n", "1", "--jobs", "1", *only, "--preload", "told", "--json"))
    bare = [(name, "bare") for name in BUILT_IN]
    assert rows_of(found, "name", "preload") == bare + [(name, "told") for name in CAN_PRELOAD]
    own = {"th forkserver", "th subint_forkserver", "th fork"}
    assert own | {"os.fork", "mp fork", "mp forkserver"} == set(CAN_PRELOAD)
    # One of them has two interpreters to import it into.
    assert seen.read_text() == "imported\n" * (len(CAN_PRELOAD) + 1)


# -- how it is printed ---------------------------------------------------------------------------------


def test_text_and_markdown_have_the_same_table(mark: Mark) -> None:
    arguments = ("-n", "1", "--jobs", "1", "--only", "subprocess", "interpreters")
    text = run(mark, *arguments).splitlines()
    heads, _, *lines = run(mark, *arguments, "--markdown").splitlines()
    assert [cell.strip() for cell in heads.strip("|").split("|")] == re.split(r"  +", text[0])
    assert [line.strip("| ").partition(" ")[0] for line in lines[:2]] == ["subprocess", "interpreters"]
    assert [line.partition(" ")[0] for line in text[1:3]] == ["subprocess", "interpreters"]
    assert "rounds 1" in text[-1]
    assert "rounds 1" in lines[-1]


def test_the_program_for_make_bench_is_the_same_command(mark: Mark) -> None:
    program = (str(ROOT / "benches" / "spawn.py"),)
    found = run(mark, "-n", "1", "--jobs", "1", "--only", YARDSTICK, "--json", command=program)
    assert rows_of(json.loads(found), "name", "ratio") == [(YARDSTICK, 1.0)]


def test_the_launcher_has_the_command(launcher: Path, mark: Mark) -> None:
    done = subprocess.run(
        [launcher, "bench", "spawn", "-n", "1", "--jobs", "1", "--only", "th exec", "--json"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
        env=mark.environment,
    )
    assert rows_of(json.loads(done.stdout), "name") == [("th exec",)]
    assert mark.processes() == []


@pytest.mark.parametrize(
    "words", [["--live", "-1"], ["-n", "0"], ["--only", "nobody"], ["--json", "--markdown"]]
)
def test_a_command_line_that_makes_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["spawn", *words])
    assert "tractor-host bench spawn: error: " in capsys.readouterr().err


# -- what it can't measure -----------------------------------------------------------------------------


def test_what_is_not_installed_is_skipped_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spawn, "find_spec", lambda name: None)
    only = ("--only", "loky", YARDSTICK, "anyio.to_process")
    assert spawn.main(["-n", "1", "--jobs", "1", *only, "--preload", "numpy", "--preload", "no.such"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines if line.startswith("skipped: ")] == [
        "loky: it is not installed",
        "anyio.to_process: it is not installed",
        "--preload numpy: it is not installed",
        "--preload no.such: it is not installed",
    ]
    assert lines[1].startswith(YARDSTICK)
    assert lines[2] == ""


def test_what_does_not_fit_into_the_memory_is_skipped_with_a_line(mark: Mark) -> None:
    tib = 1 << 20
    found = json.loads(run(mark, "-n", "1", "--only", YARDSTICK, "--ballast", str(1000 * tib), "--json"))
    assert rows_of(found) == []
    (line,) = found["skipped"]
    assert line.startswith("os.fork (bare, ballast 1048576000 MiB, live 1): it would take 1048576000 MiB")


def failures(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert spawn.main(["-n", "1", "--jobs", "1", "--json", *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == found["skipped"] == []
    return [line.partition("): ")[2] for line in found["failed"]]


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("import time; time.sleep(1000)", "no reply within 1 s"),
        ("import signal, time; signal.alarm(1); time.sleep(1000)", "no reply within 1 s"),
        ("import os; os._exit(7)", "its process ended with exit status 7"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL"),
        ("""print('{"failed": "ValueError: no"}')""", "ValueError: no"),
    ],
)
@pytest.mark.parametrize("answers", [False, True])
def test_a_contestant_that_fails_is_told_and_ended(
    program: str,
    complaint: str,
    answers: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At its start, and in the midst of it."""
    start = "import sys; print('null', flush=True); sys.stdin.readline(); " if answers else ""
    monkeypatch.setattr(_contestants, "MAIN", start + program)
    assert failures(capsys, "--only", YARDSTICK, "--timeout", "1") == [complaint]


def test_the_others_go_on_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    condition = f"import os, sys; sys.argv[2] == {YARDSTICK!r} and os._exit(7); "
    monkeypatch.setattr(_contestants, "MAIN", condition + _contestants.MAIN)
    assert spawn.main(["-n", "1", "--jobs", "1", "--only", YARDSTICK, "mp fork", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["ratio"]) for row in found["results"]] == [("mp fork", None)]
    assert len(found["failed"]) == 1


def test_what_a_contestant_leaves_over_is_told_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mark: Mark
) -> None:
    program = """
import subprocess, sys
subprocess.Popen(["sleep", "1000"])
print("null", flush=True)
for line in sys.stdin:
    print("[]" if "left" in line else "0.001", flush=True)
"""
    monkeypatch.setenv("TH_TEST_MARK", mark.value)
    monkeypatch.setattr(_contestants, "MAIN", program)
    monkeypatch.setattr(spawn, "_PATIENCE", 0.2)
    assert failures(capsys, "--only", YARDSTICK) == ["processes that were left over, and killed: 1"]
    assert mark.processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_it_when_it_is_ended_in_the_midst(number: signal.Signals, mark: Mark) -> None:
    command = [sys.executable, "-m", "tractor_host.bench", "spawn", "-n", "1000000", "--live", "3", "--only"]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options |= {"env": mark.environment, "start_new_session": True}
    with Running([*command, *BUILT_IN], text=True, **options) as process:
        # The contestants themselves are among them: some have their live workers, and one may have none yet.
        until(lambda: len(mark.processes()) > 3 * len(BUILT_IN), "the live workers")
        process.send_signal(number)
        process.wait(LIMIT)
        until_same(mark.processes, [])
