"""Turns for subinterpreters that share a GIL, priorities and quotas. What it comes to in milliseconds is measured by
`tractor-host bench fairness`; here: that it is done at all, and disturbs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import counting
import tractor_host as th
from counting import Counters
from helpers import importable, thread_names, until


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    with Counters(counting.path_of(tmp_path)) as found:
        yield found
    for worker in th.workers():  # of a test that has failed
        worker.kill()


@pytest.fixture
def path(tmp_path: Path, counters: Counters) -> str:
    return counting.path_of(tmp_path)


def schedules() -> bool:
    return "th-scheduler" in thread_names()


def start(
    path: str, count: int, target: Callable[..., Any] = counting.count, **asked: Any
) -> list[th.Worker]:
    return [
        th.spawn(target, path, slot, backend="subint", cancel_timeout=0, **asked) for slot in range(count)
    ]


def kill(workers: list[th.Worker]) -> list[th.Exit]:
    return [worker.kill() for worker in workers]


def cpu_of(slot_seconds: Callable[[], float], seconds: float) -> float:
    """What part of a processor somebody has, over a while."""
    begun, before = time.monotonic(), slot_seconds()
    until(lambda: time.monotonic() - begun > seconds)
    return (slot_seconds() - before) / (time.monotonic() - begun)


def test_there_is_no_scheduler_while_one_is_busy(path: str, counters: Counters) -> None:
    busy, idle = th.spawn(counting.count, path, backend="subint"), th.spawn(time.sleep, 1e5, backend="subint")
    try:
        counters.go_on()
        until(lambda: not schedules())
        for _ in range(20):
            assert not schedules()
            counters.go_on()
    finally:
        kill([busy, idle])


def test_busy_ones_take_turns_and_all_of_them_get_on(path: str, counters: Counters) -> None:
    workers = start(path, 5)
    counters.go_on(5)
    until(schedules)
    until(lambda: sys.getswitchinterval() == pytest.approx(0.001))
    for _ in range(3):
        counters.go_on(5)
    kill(workers[1:])
    until(lambda: not schedules())
    assert sys.getswitchinterval() == pytest.approx(0.005)
    counters.go_on()
    kill(workers[:1])


def test_an_interval_that_the_program_has_chosen_stays(path: str, counters: Counters) -> None:
    sys.setswitchinterval(0.004)
    try:
        workers = start(path, 2)
        counters.go_on(2)
        until(schedules)
        counters.go_on(2)
        assert sys.getswitchinterval() == pytest.approx(0.004)
        kill(workers)
        until(lambda: not schedules())
        assert sys.getswitchinterval() == pytest.approx(0.004)
    finally:
        sys.setswitchinterval(0.005)


def test_busy_ones_can_be_paused_and_the_rest_gets_on(path: str, counters: Counters) -> None:
    workers = start(path, 4)
    counters.go_on(4)
    for worker in workers[:2]:
        worker.pause()
    counters.stand_still(2)
    before = counters.all(4)
    until(lambda: counters[2] > before[2] and counters[3] > before[3])
    assert counters.all(2) == before[:2]
    for worker in workers[:2]:
        worker.resume()
    counters.go_on(4)
    kill(workers)


def test_two_dozen_that_take_turns_are_killed_within_their_bounds(path: str, counters: Counters) -> None:
    workers = [
        th.spawn(counting.count_in_threads, path, 1, backend="subint", cancel_timeout=0) for _ in range(25)
    ]
    until(schedules)
    counters.go_on()
    until(lambda: all(worker.state == "running" for worker in workers))
    for number, worker in enumerate(workers):
        if number % 3 == 0:
            worker.pause()
    exits = kill(workers)
    assert {exit.kind for exit in exits} == {"killed"}
    assert all(exit.elapsed is not None and exit.elapsed < 3.0 for exit in exits)


def test_one_that_resists_with_many_threads_is_killed_out_of_turn(path: str, counters: Counters) -> None:
    others = start(path, 3)
    resists = th.spawn(counting.count_in_threads, path, 8, backend="subint", cancel_timeout=0)
    counters.go_on(8)
    assert resists.kill().kind == "killed"
    counters.go_on(3)
    kill(others)


def test_workers_start_beside_busy_ones(path: str, counters: Counters) -> None:
    workers = start(path, 10)
    until(schedules)
    for _ in range(5):
        assert th.spawn(sum, [1, 2], backend="subint").result(30) == 3
    counters.go_on(10)
    kill(workers)


@pytest.mark.parametrize("backend", ["fork", "forkserver"])
def test_a_process_that_is_forked_beside_turns_is_as_any_other(
    path: str, counters: Counters, backend: str
) -> None:
    workers = start(path, 4)
    until(lambda: sys.getswitchinterval() == pytest.approx(0.001))
    assert th.spawn(sys.getswitchinterval, backend=backend).result(30) == pytest.approx(0.005)
    nested = th.spawn(counting.count_with_a_child, path, "subint", backend=backend)
    counters.go_on(4)
    kill([nested, *workers])


def test_priorities_decide_who_gets_on(path: str, counters: Counters) -> None:
    low, high = [
        th.spawn(_busy, path, slot, backend="subint", priority=priority)
        for slot, priority in enumerate((1, 20))
    ]
    counters.go_on(2)
    until(schedules)
    parts = [_used(counters, slot) for slot in range(2)]
    until(lambda: _used(counters, 1) - parts[1] > 3.0)
    # By now: on a busy machine that may be long afterwards.
    used = [_used(counters, slot) - parts[slot] for slot in range(2)]
    assert used[0] < used[1] / 4, used
    kill([low, high])


def _busy(path: str, slot: int) -> None:
    """Counts milliseconds of its own processor time."""
    counters = Counters(path)
    while True:
        while counters[slot] < time.thread_time() * 1000:
            counters.up(slot)


def _used(counters: Counters, slot: int) -> float:
    return counters[slot] / 1000


@pytest.mark.parametrize("gil", ["shared", "own"])
@pytest.mark.parametrize("wall", ["subint", "subint_forkserver"])
def test_a_quota_is_kept(path: str, counters: Counters, wall: str, gil: Any) -> None:
    asked = {"process": "house"} if wall == "subint_forkserver" else {}
    with th.spawn(_busy, path, 0, backend=wall, gil=gil, cpu_quota=0.05, **asked) as worker:
        counters.go_on()
        # It would have all of one, or what a busy machine leaves.
        assert cpu_of(lambda: _used(counters, 0), 2.0) < 0.2
        worker.pause()
        counters.stand_still()
        worker.resume()
        counters.go_on()


def test_a_quota_alone_keeps_nobody_from_being_killed(path: str, counters: Counters) -> None:
    worker = th.spawn(counting.count_in_threads, path, 4, backend="subint", gil="own", cpu_quota=0.02)
    counters.go_on(4)
    assert schedules()
    assert worker.kill().kind in ("cancelled", "killed")
    until(lambda: not schedules())


@pytest.mark.parametrize("backend", ["fork", "forkserver", "exec", "subint_forkserver"])
def test_a_process_has_a_nice_value_by_its_priority(backend: str) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert th.spawn(os.getpriority, os.PRIO_PROCESS, 0, backend=backend, priority=0.5).result(30) == own + 3
    assert th.spawn(os.getpriority, os.PRIO_PROCESS, 0, backend=backend).result(30) == own


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ({"priority": 0}, ValueError, "priority must be from 0.01 to 100"),
        ({"priority": -1}, ValueError, "priority must be from"),
        ({"priority": 101}, ValueError, "priority must be from"),
        ({"priority": float("nan")}, ValueError, "finite"),
        ({"priority": "high"}, TypeError, "priority must be a number, not str"),
        ({"priority": True}, TypeError, "not bool"),
        ({"cpu_quota": 0}, ValueError, "above 0"),
        ({"cpu_quota": -0.5}, ValueError, "above 0"),
        ({"cpu_quota": float("inf")}, ValueError, "finite"),
        ({"cpu_quota": "half"}, TypeError, "cpu_quota must be a number"),
        ({"cpu_quota": 0.5, "backend": "forkserver"}, ValueError, "control group"),
        ({"cpu_quota": 0.5, "backend": "subint_forkserver"}, ValueError, "with process="),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        th.spawn(sum, [1], **{"backend": "subint", **asked})


def test_what_was_abandoned_gets_only_what_is_left(tmp_path: Path) -> None:
    program = """
        import sys, time, counting, tractor_host as th

        # C code without the GIL that takes longer than the ladder waits, and then Python that resists.
        RESISTS = '''
        import hashlib, counting
        counters = counting.Counters({path!r})
        counters.up(3)
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 3_000_000)
        '''

        def main(path):
            with counting.Counters(path) as counters:
                busy = [th.spawn(counting.count, path, slot, backend="subint") for slot in range(2)]
                counters.go_on(2)
                kind = None
                while kind != "abandoned":
                    seen = counters[3]
                    lost = th.spawn(th.Source(RESISTS.format(path=path).replace("\\n        ", "\\n")),
                                    backend="subint", cancel_timeout=0, kill_timeout=0.05)
                    while counters[3] == seen:
                        time.sleep(0.001)
                    lost.pause()
                    kind = lost.kill().kind
                assert not lost.paused
                lost.pause()
                lost.resume()
                counters.go_on(2)
                for worker in busy:
                    worker.kill()
                deadline = time.monotonic() + 60
                while th.statistics().quarantined:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                print("reclaimed")

        if __name__ == "__main__":
            main(sys.argv[1])
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, "program.py", counting.path_of(tmp_path)],
        cwd=tmp_path, env=importable(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "reclaimed\n"), done.stderr


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    program = """
        import sys, counting, helpers, tractor_host as th
        if __name__ == "__main__":
            path = sys.argv[1]
            with counting.Counters(path) as counters:
                workers = [th.spawn(counting.count, path, slot, backend="subint") for slot in range(3)]
                for _ in range(3):
                    counters.go_on(3)
                print("th-scheduler" in helpers.thread_names(), sys.getswitchinterval())
                for worker in workers:
                    worker.kill()
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, "program.py", counting.path_of(tmp_path)],
        cwd=tmp_path, env={**importable(), "TRACTOR_HOST_SCHEDULER": "0"}, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False 0.005\n"), done.stderr
