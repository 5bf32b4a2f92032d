"""Dumps of what hangs, under whatever holds the GIL or captures output; and counts of what is left behind."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tractor_host as th
from conftest import PATIENCE, Program
from helpers import until
from tractor_host import _native, devx

pytest_plugins = ["pytester"]

HOG = """
    import ctypes, sys, threading
    import tractor_host as th
    from tractor_host import devx

    def hold_the_gil():
        ctypes.PyDLL(None).usleep(600_000_000)

    def other():
        lock = threading.Lock()
        with lock:
            lock.acquire()

    if __name__ == "__main__":
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        worker = th.spawn("time:sleep", 1000, backend="subint", name="sleeper")
        while worker.state != "running":
            pass
        with devx.dump_on_hang(0.2, path=sys.argv[1]):
            hold_the_gil()
"""


def whole(path: Path) -> str:
    """The dump, once it is written."""

    def stacks() -> str:
        text = path.read_text() if path.exists() else ""
        return text if re.search(r"^==== end of the dump of process \d+\n\Z", text, re.MULTILINE) else ""

    return str(until(stacks, "the dump"))


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
def test_it_shows_who_keeps_the_gil_and_everybody_else(
    launcher: str, program: Callable[..., Program], tmp_path: Path
) -> None:
    path = tmp_path / "hang.dump"
    with program(HOG, launcher=launcher).start(str(path)) as process:
        text = whole(path)
        # It is still at it: nobody has had the GIL since.
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert text.startswith(f"==== tractor-host dump of process {process.pid}, no end within 0.2 s\n")
    assert re.search(r"`MainThread`.*HOLDS THE GIL\n +\S+program\.py:\d+ in hold_the_gil\n", text)
    assert re.search(r"program\.py:\d+ in other\n", text)
    assert "th:sleeper" in text


def test_what_ends_in_time_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "hang.dump"
    path.write_text("of an earlier run")
    with devx.dump_on_hang(PATIENCE, path=path) as where:
        assert where == str(path)
        until(lambda: "th-hang" in _native.resources()["threads"], "the timer")
    assert path.read_text() == ""
    assert "th-hang" not in _native.resources()["threads"]


def test_the_block_goes_on_after_a_dump(tmp_path: Path) -> None:
    path = tmp_path / "hang.dump"
    with devx.dump_on_hang(0, path=path):
        first = whole(path)
    assert "test_the_block_goes_on_after_a_dump" in first
    assert path.read_text().startswith(f"==== tractor-host dump of process {os.getpid()}, ")


def test_watches_nest_and_threads_have_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]

    def watch(path: Path) -> None:
        with devx.dump_on_hang(0, path=path):
            whole(path)

    with devx.dump_on_hang(PATIENCE, path=tmp_path / "outer"):
        threads = [threading.Thread(target=watch, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "outer").read_text() == ""
    assert all(path.read_text() for path in paths)


def test_the_default_file_is_this_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with devx.dump_on_hang() as where:
        assert where == str(tmp_path / f"tractor-host-hang-{os.getpid()}.dump")


def test_an_exception_goes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), devx.dump_on_hang(PATIENCE, path=tmp_path / "x"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("seconds", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_what_is_no_time_is_refused(seconds: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match="seconds"), devx.dump_on_hang(seconds, path=tmp_path / "x"):
        pass


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="nowhere"),
        devx.dump_on_hang(1, path=tmp_path / "nowhere" / "x"),
    ):
        pass


def hang_up(path: str) -> bool:
    """Blocked, so that its frames hold still: another thread looks for the dump."""
    looker = threading.Thread(target=whole, args=(Path(path),))
    with devx.dump_on_hang(0.2, path=path):
        looker.start()
        looker.join()
    return True


def test_it_works_in_every_worker(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "hang.dump"
    assert th.spawn(hang_up, str(path), backend=backend).result(timeout=PATIENCE)
    assert "in hang_up\n" in path.read_text()


def test_a_fork_in_the_block_ends_it_by_itself(program: Callable[..., Program], tmp_path: Path) -> None:
    ran = program(
        """
        import os, sys
        import tractor_host as th
        from tractor_host import devx

        if __name__ == "__main__":
            with devx.dump_on_hang(60, path=sys.argv[1]):
                assert th.spawn("os:getpid", backend="fork").result(timeout=30)
                child = os.fork()
            if child == 0:
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    ).run(str(tmp_path / "x"), env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert (ran.stdout, ran.stderr) == ("7\n", "")


CAPTURED = """
    import ctypes
    from tractor_host import devx

    def test_hang():
        with devx.dump_on_hang(0.1, path="hang.dump"):
            ctypes.PyDLL(None).usleep(1_500_000)
        print("gone on")
"""


@pytest.mark.parametrize("capture", ["fd", "sys", "tee-sys", "no"])
def test_no_capture_swallows_it(capture: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CAPTURED)
    ran = pytester.runpytest_subprocess(f"--capture={capture}", timeout=PATIENCE)
    ran.assert_outcomes(passed=1)
    assert "in test_hang\n" in (pytester.path / "hang.dump").read_text()


# -- resources -------------------------------------------------------------------------------------------

LINE = re.compile(
    r"(.*): threads (\d+)->(\d+), interpreters (\d+)->(\d+), fds (\d+)->(\d+), children (\d+)->(\d+), "
    r"shm (\d+)->(\d+), memory (\d+)->(\d+), workers (\d+)->(\d+), rss ([\d.]+)->([\d.]+) MiB"
)


def test_everything_is_counted() -> None:
    said: list[str] = []
    with devx.track_resource_deltas("block", writer=said.append) as before:
        fd = os.open("/dev/null", os.O_RDONLY)
        shm = Path(f"/dev/shm/th-test-{os.getpid()}")
        shm.touch()
        ballast = bytearray(os.urandom(1)) * (64 << 20)
        workers = [th.spawn("time:sleep", 1000, backend=backend) for backend in ("fork", "subint")]
        for worker in workers:
            until(lambda worker=worker: worker.state == "running", "the target")
        after = devx.resources()
    assert after.fds[fd] == "/dev/null"
    assert set(after.children) - set(before.children) == {workers[0].pid}
    assert shm.name in after.shm
    assert f"th:{workers[1].name}"[:15] in after.threads
    assert after.workers == tuple(worker.name for worker in workers)
    os.close(fd)
    shm.unlink()
    for worker in workers:
        worker.kill()
    match = LINE.fullmatch(said[0])
    assert match
    assert match[1] == "block"
    counts = [float(number) for number in match.groups()[1:]]
    more = [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]
    _, interpreters, fds, children, files, memory, alive, rss = more
    assert (interpreters, children, files, memory, alive) == (1, 1, 1, 0, 2)
    # Another one that was about to end may have been counted before.
    assert counts[1] >= 2
    assert fds >= 2
    assert rss > 50, len(ballast)


def test_it_tells_of_a_block_that_raised_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), devx.track_resource_deltas("it"):
        raise ZeroDivisionError
    match = LINE.fullmatch(capsys.readouterr().err.rstrip("\n"))
    assert match
    assert match[1] == "it"


FIXTURES = """
    import os
    from tractor_host import devx

    def write(line):
        with open("lines", "a") as file:
            file.write(line + chr(10))

    every = devx.resource_delta_fixture(writer=write)
    asked = devx.resource_delta_fixture(autouse=False, writer=lambda line: write("asked " + line))
"""
FIXTURED = """
    import os

    def test_leaks():
        os.open("/dev/null", os.O_RDONLY)

    def test_asks(asked):
        assert asked.interpreters == (0,)
"""


@pytest.mark.parametrize("how", [[], ["-p", "no:randomly", "--capture=no"]])
def test_the_fixture_tracks_each_test(how: list[str], pytester: pytest.Pytester) -> None:
    pytester.makeconftest(FIXTURES)
    pytester.makepyfile(FIXTURED)
    ran = pytester.runpytest_subprocess(*how, timeout=PATIENCE)
    ran.assert_outcomes(passed=2)
    lines = (pytester.path / "lines").read_text().splitlines()
    found = {match[1]: match for line in lines if (match := LINE.fullmatch(line))}
    assert sorted(found) == ["asked test_asks", "test_asks", "test_leaks"]
    leak, none = found["test_leaks"], found["test_asks"]
    assert int(leak[7]) == int(leak[6]) + 1
    assert none[6] == none[7]


def test_a_worker_loads_none_of_it() -> None:
    loaded = th.spawn(th.Source("import sys; 'tractor_host.devx' in sys.modules"), backend="exec")
    assert loaded.result(timeout=PATIENCE) is False
    assert sys.modules["tractor_host.devx"] is th.devx
