"""tractor's own test suite with each of our spawn methods, beside tractor's own.

    python benches/tractor_suite.py path/to/tractor path/to/python [-- ARG OF PYTEST…]

The table says what passes, in what time, and what is left behind. The Python must have what tractor's tests
need; neither the checkout nor this package need be installed there. Each run is a session of its own. A test
that does not end is counted as hung, and the run goes on with the next one. What a run leaves behind is
inherited by this program, told, and ended. Tests that fail are run once more, with no others.

This file is also the plugin of pytest that notes how each test ends, at once, so that nothing is lost with
whoever is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Ours by their names; `own:` is tractor's own of that name; `trio=` is ours under the name `trio`, for tests
#: that are for that name alone.
RUNS = (
    "own:trio",
    "tractor_host",
    "trio=tractor_host",
    "main_thread_forkserver",
    "subint_fork",
    "subint",
    "subint_forkserver",
    "own:main_thread_forkserver",
    "own:subint",
)
BASELINE = "own:trio"
_HERE = Path(__file__).resolve()
_PACKAGE = _HERE.parents[1] / "python"
#: For the plugin: where it notes what happens; and the tests that are to be run, if not all.
_NOTES = "TRACTOR_SUITE_NOTES"
_ONLY = "TRACTOR_SUITE_ONLY"
#: Seconds in which what a run has started may end after it.
_GRACE = 2.0
_PR_SET_CHILD_SUBREAPER = 36


# -- the plugin ------------------------------------------------------------------------------------------


def _note(**what: object) -> None:
    with open(os.environ[_NOTES], "a") as file:
        file.write(json.dumps(what) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out what has been run, and what is not asked for."""
    notes = _read_notes(Path(os.environ[_NOTES]))
    only = json.loads(os.environ[_ONLY]) if _ONLY in os.environ else None
    left_out = [
        item for item in items if item.nodeid in notes or (only is not None and item.nodeid not in only)
    ]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _note(test=nodeid, outcome="hung")


def pytest_runtest_logreport(report: Any) -> None:
    """A part of it has ended."""
    outcome = "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
    if report.when == "call" or outcome != "passed":
        _note(test=report.nodeid, outcome=outcome, text=report.longreprtext[-4000:])


def _read_notes(path: Path) -> dict[str, str]:
    """How each test that was begun has ended; failing is not made good by what comes after it."""
    found: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            if found.get(note["test"]) != "failed":
                found[note["test"]] = note["outcome"]
    return found


# -- the program -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What became of one run.

    Attributes:
        name: As in `RUNS`.
        outcomes: How each test ended, by its name without that of the spawn method.
        seconds: How long the run took; what was run again is not in it.
        left: Command lines of processes that were left behind.
        sockets: Socket files that were left behind.
        end: Why it is not complete, if it is not.
        passed_again: Those that failed at first, and passed when no others were run.
    """

    name: str
    outcomes: dict[str, str]
    seconds: float
    left: list[str]
    sockets: list[str]
    end: str
    passed_again: list[str] = dataclasses.field(default_factory=list)

    def bad(self) -> list[str]:
        """The tests that did not pass and should have."""
        return [test for test, outcome in self.outcomes.items() if outcome in ("failed", "hung")]


def _children() -> dict[int, list[int]]:
    """All processes by their parents."""
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found.setdefault(int(fields[1]), []).append(int(folder.name))
    return found


def _below(pid: int) -> Iterator[int]:
    """All that is below a process, and alive."""
    children = _children()
    todo = list(children.get(pid, ()))
    while todo:
        pid = todo.pop()
        yield pid
        todo.extend(children.get(pid, ()))


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return f"{Path(f'/proc/{pid}/comm').read_text().strip()}: {shlex.join(filter(None, words))}"
    except OSError:
        return "?"


def _end_all_below() -> None:
    """Ends what a run has left behind, and whatever that starts meanwhile."""
    while below := list(_below(os.getpid())):
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.01)
    _reap()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _left_behind() -> list[str]:
    """What does not end by itself in time."""
    deadline = time.monotonic() + _GRACE
    while (below := list(_below(os.getpid()))) and time.monotonic() < deadline:
        _reap()
        time.sleep(0.05)
    return [_command(pid) for pid in below]


class Suite:
    """The checkout, and how its tests are run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder

    def run(self, name: str) -> Result:
        """Runs it, and then what has failed once more."""
        path = self._folder / f"{name}.notes"
        begun = time.monotonic()
        left: list[str] = []
        sockets: list[str] = []
        while True:
            end, more, files = self._session(name, path, begun + self._options.limit)
            left += more
            sockets += files
            # With the next test, if it was one that held it up.
            if end != "a test hung":
                break
        seconds = time.monotonic() - begun
        result = Result(name, _read_notes(path), seconds, left, sockets, end)
        if bad := result.bad():
            again = self._folder / f"{name}.again"
            self._session(name, again, time.monotonic() + self._options.limit, only=bad)
            outcomes = _read_notes(again)
            result.passed_again = [test for test in bad if outcomes.get(test) == "passed"]
        key = name.rpartition(":")[2].partition("=")[0]
        result.outcomes = {_plain(test, key): outcome for test, outcome in result.outcomes.items()}
        result.passed_again = [_plain(test, key) for test in result.passed_again]
        return result

    def _session(
        self, name: str, notes: Path, deadline: float, only: list[str] | None = None
    ) -> tuple[str, list[str], list[str]]:
        """One pytest: why it ended before its time, and what it has left behind."""
        with tempfile.TemporaryDirectory(prefix="ts", ignore_cleanup_errors=True) as runtime:
            environment = {**os.environ, "XDG_RUNTIME_DIR": runtime, _NOTES: str(notes)}
            if only is not None:
                environment[_ONLY] = json.dumps(only)
            command = self._command(name, environment)
            with open(self._folder / f"{name}.log", "ab") as log:
                process = subprocess.Popen(
                    command,
                    cwd=self._options.checkout,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            end = self._watch(process, notes, deadline)
            left = [] if end else _left_behind()
            _end_all_below()
            process.wait()
            # A program of ours that was killed leaves one too, which is no actor's.
            sockets = [path for path in Path(runtime).rglob("*.sock") if path.parent.name != "tractor-host"]
            return end, left, [str(path.relative_to(runtime)) for path in sockets]

    def _command(self, name: str, environment: dict[str, str]) -> list[str]:
        folders = [str(self._options.checkout), str(_HERE.parent)]
        # In the same order each time: a run is compared with others.
        plugins = ("-p", "no:cacheprovider", "-p", "no:randomly", "-p", _HERE.stem)
        words = [str(self._options.python), "-m", "pytest", "-v", *plugins]
        key = name
        if name.startswith("own:"):
            key = name.removeprefix("own:")
            words += ["-p", "no:tractor_host"]
            if "forkserver" in key:
                words.append("--capture=sys")  # which it insists on
        else:
            folders.append(str(_PACKAGE))
            words += ["-p", "no:tractor_host", "-p", "tractor_host.tractor"]
            if name.startswith("trio="):
                key, _, environment["TRACTOR_HOST_TRIO"] = name.partition("=")
        environment["PYTHONPATH"] = os.pathsep.join(folders)
        # Some tests run a `python`.
        environment["PATH"] = os.pathsep.join([str(self._options.python.parent), os.environ.get("PATH", "")])
        # Who compiles everything each time has the time of that measured.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return [*words, f"--spawn-backend={key}", *self._options.arguments]

    def _watch(self, process: subprocess.Popen[bytes], notes: Path, deadline: float) -> str:
        """Waits for its end, or ends it where nothing goes on; and says so."""
        before = _size(notes)
        size, since = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            found = _size(notes)
            if found != size:
                size, since = found, now
            if now > deadline:
                process.kill()
                return f"not done after {self._options.limit:g} s"
            if now - since > self._options.test_limit:
                process.kill()
                return "a test hung" if found else "it does not come to its first test"
        if process.returncode in (0, 1):
            return ""
        if before and _size(notes) == before:
            return "" if process.returncode == 5 else "broken"  # there is none left
        last = [*_read_notes(notes).values()][-1:]
        return "a test hung" if last == ["hung"] else "broken"  # it has died of that


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _plain(test: str, key: str) -> str:
    return re.sub(rf"start_method={re.escape(key)}(?=[-\]])", "start_method=…", test)


def _table(results: list[Result]) -> Iterator[str]:
    columns = ("passed", "failed", "hung", "skipped", "xfailed")
    yield f"{'run':<28}" + "".join(f"{column:>9}" for column in (*columns, "seconds", "left", "sockets"))
    for result in results:
        counts = Counter(result.outcomes.values())
        numbers = (*(counts[column] for column in columns), f"{result.seconds:.0f}")
        cells = (*numbers, len(result.left), len(result.sockets))
        yield f"{result.name:<28}" + "".join(f"{cell:>9}" for cell in cells) + f"  {result.end}"
    baseline = next((result.outcomes for result in results if result.name == BASELINE), {})
    for result in results:
        bad = result.bad()
        missing = [test for test, outcome in baseline.items() if outcome == "passed"]
        unseen = [test for test in missing if result.outcomes.get(test, "") in ("", "skipped", "xfailed")]
        if not (bad or unseen or result.left or result.sockets):
            continue
        yield ""
        yield f"{result.name}:"
        for test in bad:
            there = baseline.get(test, "not run")
            again = ", passes among those that failed" if test in result.passed_again else ""
            yield f"  {result.outcomes[test]}, {there} with trio{again}: {test}"
        for test in unseen if result.name != BASELINE else ():
            yield f"  {result.outcomes.get(test, 'not run')}, passed with trio: {test}"
        for what in (*result.left, *result.sockets):
            yield f"  left behind: {what}"


def main(arguments: list[str]) -> int:
    """The program; returns 1 if a test fails with one of ours which passes with tractor's `trio`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="of tractor")
    parser.add_argument("python", type=Path, help="one that has what tractor's tests need")
    parser.add_argument(
        "arguments", nargs="*", help="of pytest; after a `--` (default: tests --ignore=tests/devx)"
    )
    parser.add_argument("--run", action="append", help=f"one of {', '.join(RUNS)}; again for more; all")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for a run (%(default)g)")
    parser.add_argument("--test-limit", type=float, default=90.0, help="seconds for a test (%(default)g)")
    parser.add_argument("--output", type=Path, help="a folder for the logs; a new one")
    parser.add_argument("--json", action="store_true", help="print an object a run, and no table")
    options = parser.parse_args(arguments)
    names = options.run or list(RUNS)
    for name in names:
        if not re.fullmatch(r"(own:|trio=)?\w+", name):
            parser.error(f"--run: there is no {name!r}")
    options.checkout = options.checkout.resolve()
    options.python = options.python.absolute()
    options.arguments = options.arguments or ["tests", "--ignore=tests/devx"]
    folder = (options.output or Path(tempfile.mkdtemp(prefix="tractor-suite-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.notes"), *folder.glob("*.again"), *folder.glob("*.log")):
        path.unlink()
    print(f"logs: {folder}", file=sys.stderr)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    # What a shell starts in the background ignores it, and so would the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    suite = Suite(options, folder)
    results: list[Result] = []
    try:
        for name in names:
            results.append(suite.run(name))
            if options.json:
                print(json.dumps(dataclasses.asdict(results[-1])), flush=True)
            else:
                print(f"{name}: {results[-1].seconds:.0f} s", file=sys.stderr)
    finally:
        _end_all_below()
        if not options.json:
            print("\n".join(_table(results)))
    baseline = next((result.outcomes for result in results if result.name == BASELINE), {})
    ours = [result for result in results if not result.name.startswith("own:")]
    return int(any(baseline.get(test) == "passed" for result in ours for test in result.bad()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
