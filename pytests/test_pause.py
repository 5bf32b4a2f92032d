"""`Worker.pause` and `Worker.resume`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import counting
import tractor_host as th
from counting import Counters
from helpers import importable, until

WALLS: list[dict[str, Any]] = [
    {"backend": "subint"},
    {"backend": "subint", "gil": "own"},
    {"backend": "forkserver"},
    {"backend": "fork"},
    {"backend": "exec"},
    {"backend": "subint_forkserver"},
    {"backend": "subint_forkserver", "process": "shared"},
    {"backend": "subint_forkserver", "process": "own", "gil": "own"},
]


def name(wall: dict[str, Any]) -> str:
    return "-".join(wall.values())


every_wall = pytest.mark.parametrize("wall", WALLS, ids=name)
each_gil = pytest.mark.parametrize("gil", ["shared", "own"])


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    with Counters(counting.path_of(tmp_path)) as found:
        yield found


@pytest.fixture
def path(tmp_path: Path, counters: Counters) -> str:
    return counting.path_of(tmp_path)


@every_wall
def test_a_paused_worker_stands_still_and_goes_on(
    path: str, counters: Counters, wall: dict[str, Any]
) -> None:
    with th.spawn(counting.count, path, **wall) as worker:
        counters.go_on()
        assert not worker.paused
        for _ in range(2):
            worker.pause()
            worker.pause()
            assert worker.paused
            counters.stand_still()
            worker.resume()
            worker.resume()
            assert not worker.paused
            counters.go_on()


@every_wall
def test_a_paused_worker_is_killed_as_any_other(path: str, counters: Counters, wall: dict[str, Any]) -> None:
    worker = th.spawn(counting.count_and_resist, path, **wall, cancel_timeout=0)
    counters.go_on()
    worker.pause()
    counters.stand_still()
    exit = worker.kill()
    assert exit.kind == "killed"
    assert not worker.paused
    worker.pause()
    worker.resume()
    assert not worker.paused


@every_wall
def test_a_paused_worker_can_be_cancelled(path: str, counters: Counters, wall: dict[str, Any]) -> None:
    worker = th.spawn(counting.count_in_a_loop, path, runtime="trio", **wall)
    counters.go_on()
    worker.pause()
    counters.stand_still()
    worker.cancel()
    assert worker.wait(30).kind == "cancelled"


@every_wall
def test_the_time_of_a_paused_worker_goes_on(path: str, counters: Counters, wall: dict[str, Any]) -> None:
    worker = th.spawn(counting.count, path, **wall, timeout=3, cancel_timeout=0)
    worker.pause()
    exit = worker.wait(30)
    assert exit.kind == "killed"
    assert "timeout" in exit.cause


@each_gil
def test_all_threads_of_an_interpreter_stand_still(path: str, counters: Counters, gil: Any) -> None:
    with th.spawn(counting.count_in_threads, path, 6, backend="subint", gil=gil) as worker:
        counters.go_on(6)
        for _ in range(3):
            worker.pause()
            counters.stand_still(6)
            worker.resume()
            counters.go_on(6)
        worker.pause()
        counters.stand_still(6)
        assert worker.kill().kind in ("cancelled", "killed")


@each_gil
@pytest.mark.parametrize("how", ["count_and_sleep", "count_under_a_lock"])
def test_one_that_is_blocked_stands_still_when_it_is_back(
    path: str, counters: Counters, how: str, gil: Any
) -> None:
    with th.spawn(f"counting:{how}", path, backend="subint", gil=gil) as worker:
        counters.go_on()
        worker.pause()
        counters.stand_still(2)
        worker.resume()
        counters.go_on()


@each_gil
@pytest.mark.parametrize("runtime", ["trio", "asyncio"])
def test_a_loop_stands_still(path: str, counters: Counters, runtime: Any, gil: Any) -> None:
    with th.spawn(counting.count_in_a_loop, path, backend="subint", gil=gil, runtime=runtime) as worker:
        counters.go_on()
        worker.pause()
        counters.stand_still()
        worker.resume()
        counters.go_on()


def test_only_one_of_those_in_a_process_stands_still(path: str, counters: Counters) -> None:
    wall: dict[str, Any] = {"backend": "subint_forkserver", "process": "both"}
    with th.spawn(counting.count, path, 0, **wall) as one, th.spawn(counting.count, path, 1, **wall):
        counters.go_on(2)
        one.pause()
        counters.stand_still()
        before = counters[1]
        until(lambda: counters[1] > before)
        one.resume()
        counters.go_on(2)


@pytest.mark.parametrize("wall", [{"backend": "subint"}, {"backend": "forkserver"}], ids=name)
@pytest.mark.parametrize("below", ["subint", "fork", "forkserver"])
def test_what_a_worker_has_spawned_stands_still_with_it(
    path: str, counters: Counters, wall: dict[str, Any], below: str
) -> None:
    with th.spawn(counting.count_with_a_child, path, below, **wall) as worker:
        counters.go_on(2)
        worker.pause()
        counters.stand_still(2)
        worker.resume()
        counters.go_on(2)
        worker.pause()
        counters.stand_still(2)


def test_what_a_worker_process_has_started_stands_still_with_it(path: str, counters: Counters) -> None:
    with th.spawn(counting.count_with_a_grandchild, path, backend="forkserver") as worker:
        counters.go_on(2)
        worker.pause()
        counters.stand_still(2)
        worker.resume()
        counters.go_on(2)


@pytest.mark.parametrize("backend", ["subint", "forkserver"])
def test_a_worker_can_pause_its_own(path: str, counters: Counters, backend: str) -> None:
    with th.spawn(counting.pause_another, path, backend=backend):
        until(lambda: counters[2] > 0)
        until(lambda: counters[1] > 0)
        seen = counters[1]
        counters.stand_still(2)
        assert counters[1] >= seen
        counters.up(3)
        counters.go_on(2)


def test_one_that_is_paused_before_it_runs_does_not_run(path: str, counters: Counters) -> None:
    with th.spawn(counting.count, path, backend="subint") as worker:
        worker.pause()
        counters.stand_still()
        worker.resume()
        counters.go_on()


@pytest.mark.parametrize("backend", ["fork", "forkserver"])
def test_processes_are_made_beside_a_paused_interpreter(path: str, counters: Counters, backend: str) -> None:
    with th.spawn(counting.count_in_threads, path, 3, backend="subint") as worker:
        counters.go_on(3)
        worker.pause()
        counters.stand_still(3)
        assert th.spawn(sum, [1, 2], backend=backend).result(30) == 3
        if backend == "fork":
            pid = os.fork()
            if not pid:
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        worker.resume()
        counters.go_on(3)


def test_a_program_ends_with_paused_workers(tmp_path: Path) -> None:
    program = """
        import sys, counting, tractor_host as th
        if __name__ == "__main__":
            workers = []
            for number, backend in enumerate(["subint", "forkserver", "fork", "exec", "subint_forkserver"]):
                with counting.Counters(path := f"{sys.argv[1]}/{number}") as counters:
                    workers.append(th.spawn(counting.count, path, backend=backend))
                    counters.go_on()
                    workers[-1].pause()
            print("paused", all(worker.paused for worker in workers))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py", str(tmp_path)],
        cwd=tmp_path, env=importable(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "paused True\n", "")
