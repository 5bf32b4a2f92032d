"""The main job, examples/audit_stdlib.py: it passes, and it fails when anything that it checks does."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.outside

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "audit_stdlib.py"
LIMIT = 90


def run(*arguments: str, launcher: str) -> subprocess.CompletedProcess[str]:
    python = Path(sys.executable)
    command = [str(python)] if launcher == "python" else [str(python.with_name("tractor-host")), "run"]
    return subprocess.run(
        [*command, str(EXAMPLE), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
def test_it_passes_with_every_backend(launcher: str) -> None:
    done = run("--limit", "30", launcher=launcher)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "all of it held"
    assert lines[0].startswith("30 files below ")
    start = next(index for index, line in enumerate(lines) if line.startswith("backend "))
    table = lines[start + 1 : lines.index("", start)]
    titles = ["plain loop, no worker", "subint, shared GIL", "subint, own GIL", "forkserver", "fork", "exec"]
    for line, title in zip(table, titles, strict=True):
        assert line.startswith(title)
        # Progress goes to a pipe here: a line for every quarter, and the last one for all.
        assert f"{title:<22}    30 of 30 files" in lines
    # On a busy machine the budget of 10 ms for `unwind` may be over before its thread has had a turn.
    for line, rung in zip(table[1:], [*["unwind|unblock"] * 2, *["sigterm"] * 3], strict=True):
        assert re.search(rf"killed by ({rung})", line), line
        assert "signalled 11" in line
        assert line.endswith(" 0/0/0/0")


def test_what_does_not_parse_is_counted_and_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("def f():\n    pass\n\nclass C:\n    pass\n")
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "bad_encoding.py").write_bytes(b"# coding: utf-8\n'\xff'\n")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("")
    done = run("--root", str(tmp_path), launcher="python")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 files: 9 lines, 1 functions, 1 classes; 3 do not parse" in done.stdout


def test_an_empty_folder_is_a_failure(tmp_path: Path) -> None:
    done = run("--root", str(tmp_path), launcher="python")
    assert done.returncode == 1
    assert "FAILED: there is nothing to audit" in done.stdout


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The example as a module, set to audit four files with one backend."""
    for index in range(4):
        (tmp_path / f"{index}.py").write_text(f"x = {index}\n")
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    module = importlib.import_module(EXAMPLE.stem)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--root", str(tmp_path)])
    monkeypatch.setattr(module, "WALLS", [wall for wall in module.WALLS if wall.backend == "fork"])
    monkeypatch.setattr(module, "SETTLE", 0.2)
    yield module
    del sys.modules[EXAMPLE.stem]


@pytest.fixture
def failures(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    def run_and_collect() -> list[str]:
        assert example.main() == 1
        out, err = capsys.readouterr()
        assert err == ""
        assert "all of it held" not in out
        return [line for line in out.splitlines() if line.startswith("FAILED: fork: ")]

    return run_and_collect


def test_it_passes_as_a_module(example: ModuleType) -> None:
    """Or else the tests below would prove nothing."""
    assert example.main() == 0


def test_a_different_finding_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], list[str]]
) -> None:
    honest = example.audit_in_a_loop

    def one_hash_off(root: str, paths: list[str]) -> object:
        row = honest(root, paths)
        row.findings[0] = (*row.findings[0][:-1], "0" * 64)
        return row

    monkeypatch.setattr(example, "audit_in_a_loop", one_hash_off)
    assert failures() == ["FAILED: fork: its findings are not those of the plain loop"]


def test_a_worker_that_raises_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], list[str]]
) -> None:
    honest = example.split
    monkeypatch.setattr(example, "split", lambda paths, parts: [["no such file"], *honest(paths, parts)[1:]])
    first, last = failures()
    assert "FileNotFoundError" in first
    assert last.endswith("its findings are not those of the plain loop")


def test_a_spinning_worker_that_complies_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(example, "spin", functools.partial(time.sleep, 1000))
    (failure,) = failures()
    assert "the spinning worker was to be killed in time, but: Exit(kind='cancelled'" in failure


def test_a_spinning_worker_that_ends_early_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(example, "spin", os.getpid)
    first, last = failures()
    assert "the spinning worker was to spin until now, but: <Worker " in first
    assert "but: Exit(kind='returned'" in last


def test_a_worker_that_does_not_crash_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(example, "crash", os.getpid)
    (failure,) = failures()
    assert "the crashing worker was to die by SIGSEGV, but: Exit(kind='returned'" in failure


def test_an_fd_left_behind_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: Callable[[], list[str]]
) -> None:
    honest, leaked = example.split, []

    def leaky(paths: list[str], parts: int) -> list[list[str]]:
        leaked.append(os.open("/", os.O_PATH))
        return honest(paths, parts)

    monkeypatch.setattr(example, "split", leaky)
    try:
        assert failures() == [
            "FAILED: fork: left over: {'threads': 0, 'fds': 1, 'children': 0, 'interpreters': 0}"
        ]
    finally:
        for fd in leaked:
            os.close(fd)
