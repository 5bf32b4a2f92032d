"""`tractor_host.Executor`: what `concurrent.futures` promises, and that nothing a task does reaches further."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import dis
import functools
import gc
import itertools
import logging
import operator
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, BrokenExecutor, CancelledError, wait
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

import helpers
import targets
import tractor_host as th
from conftest import Program
from helpers import PATIENCE, importable, until
from tractor_host.executor import RemoteTraceback

pytestmark = pytest.mark.outside


def running(future: concurrent.futures.Future[Any], pool: th.Executor) -> th.Worker:
    """The worker that has been sent this task."""
    slots = pool._pool._slots

    def found() -> th.Worker | None:
        its = (slot.worker for slot in list(slots.values()) if slot.task and slot.task.future is future)
        return next(its, None)

    worker: th.Worker = until(found, "its worker")
    assert future.running()
    return worker


def hold_up_the_thread(
    pool: th.Executor, sign: Path
) -> tuple[concurrent.futures.Future[Any], threading.Event]:
    """Has the pool's thread be in a done-callback until the event is set; the future is of that."""
    entered, leave = threading.Event(), threading.Event()

    def hold_up(_: object) -> None:
        entered.set()
        leave.wait(PATIENCE)

    holds = pool.submit(targets.return_when_there, str(sign), 1)
    holds.add_done_callback(hold_up)
    sign.touch()
    assert entered.wait(PATIENCE)
    return holds, leave


# -- calls ---------------------------------------------------------------------------------------------------


def test_calls_are_carried_out(backend: str) -> None:
    with th.Executor(2, backend) as pool:
        assert pool.submit(divmod, 7, 2).result(PATIENCE) == (3, 1)
        assert pool.submit(targets.echo, 1, self=2, fn=3).result(PATIENCE) == ((1,), {"self": 2, "fn": 3})
        assert list(pool.map(operator.add, range(20), range(20), timeout=PATIENCE)) == list(range(0, 40, 2))
        assert list(pool.map(abs, range(-5, 5), chunksize=3)) == list(map(abs, range(-5, 5)))
        assert list(pool.map(str, range(5), buffersize=2)) == list("01234")
        assert len(pool.workers()) <= 2
    assert pool.workers() == []


def test_workers_are_started_when_they_are_needed_and_used_again() -> None:
    with th.Executor(3) as pool:
        assert pool.workers() == []
        pids = {pool.submit(os.getpid).result(PATIENCE) for _ in range(10)}
        assert pids == {worker.pid for worker in pool.workers()}
        assert len(pids) == 1
        # As many at a time as may be, and no more.
        list(pool.map(time.sleep, [0.01] * 30))
        assert len(pool.workers()) == 3


def test_what_a_task_raises_is_raised_with_where_it_did(backend: str) -> None:
    with th.Executor(1, backend) as pool:
        future = pool.submit(targets.raise_with_notes)
        with pytest.raises(ValueError, match="noted") as caught:
            future.result(PATIENCE)
        assert caught.value.__notes__ == ["first note", "second note"]
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in raise_with_notes" in str(caught.value.__cause__)
        # A cause of its own stays.
        error = pool.submit(targets.raise_from_cause).exception(PATIENCE)
        assert error is not None
        assert type(error.__cause__) is KeyError
        assert "in raise_from_cause" in error.__notes__[-1]
        for target, kind in (
            (targets.sys_exit, SystemExit),
            (targets.raise_keyboard_interrupt, KeyboardInterrupt),
        ):
            args = (3,) if kind is SystemExit else ()
            assert type(pool.submit(target, *args).exception(PATIENCE)) is kind
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3
        assert len(pool.workers()) == 1


def test_what_can_not_be_sent_is_told_and_the_worker_goes_on(backend: str) -> None:
    with th.Executor(1, backend) as pool:
        pool.submit(targets.nothing).result(PATIENCE)
        (worker,) = pool.workers()
        error = pool.submit(targets.give, threading.Lock()).exception(PATIENCE)
        assert isinstance(error, TypeError)
        assert error.__notes__[-1].startswith("argument 1 of type lock cannot be pickled")
        error = pool.submit(targets.unpicklable).exception(PATIENCE)
        assert error is not None
        assert "cannot be pickled" in error.__notes__[-1]
        # There, and here.
        for call in (functools.partial(targets.give, targets.grenade()), targets.grenade):
            error = pool.submit(call).exception(PATIENCE)
            assert type(error) is ValueError
            assert any("unpickled" in note for note in error.__notes__)
        error = pool.submit(targets.grenade, "SystemExit").exception(PATIENCE)
        assert isinstance(error, RuntimeError)
        with pytest.raises(AttributeError):
            pool.submit(_MovedAway()).result(PATIENCE)
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3
        assert [one.id for one in pool.workers()] == [worker.id]


class _MovedAway:
    def __call__(self) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (os, "no_such_function")


@pytest.mark.parametrize("size", [10, 1 << 16, (1 << 20) + 1, 30 << 20])
def test_large_values_go_both_ways(backend: str, size: int) -> None:
    with th.Executor(2, backend) as pool:
        data = os.urandom(1 << 10) * (size // (1 << 10) + 1)
        assert pool.submit(targets.give, data).result(PATIENCE) == data
        view = pool.submit(targets.give, memoryview(bytearray(data))).result(PATIENCE)
        assert view == data
        view[0] ^= 1
        del view
        assert list(pool.map(len, [data] * 5)) == [len(data)] * 5


def test_descriptors_and_shared_objects_can_be_passed(backend: str) -> None:
    ours, theirs = socket.socketpair()
    shared = th.share(memoryview(b"x" * 200_000))
    with th.Executor(1, backend) as pool, ours:
        with theirs:
            assert pool.submit(targets.send_over, theirs, b"socket").result(PATIENCE) is None
            assert ours.recv(10) == b"socket"
            assert pool.submit(targets.send_over, th.Fd(theirs), b"fd").result(PATIENCE) is None
        # Whoever had it has let go of it.
        assert ours.recv(10) == b"fd"
        assert ours.recv(10) == b""
        for _ in range(3):
            assert pool.submit(targets.size_of_shared, shared).result(PATIENCE) == 200_000
        with pytest.raises(ValueError, match="250 descriptors"):
            pool.submit(targets.nothing, *[th.Fd(1) for _ in range(251)]).result(PATIENCE)
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3


MAIN = """
    import os, sys
    import tractor_host as th

    def double(x):
        return 2 * x

    class Point:
        def __init__(self, x):
            self.x = x

    def move(point):
        return Point(point.x + 1)

    if __name__ == "__main__":
        with th.Executor(2, sys.argv[1]) as pool:
            print(pool.submit(double, 2).result(30), list(pool.map(double, [1, 2])))
            print(pool.submit(move, Point(1)).result(30).x)
            factor = 3
            print(pool.submit(lambda x: factor * x, 2).result(30))
            print(list(pool.map(lambda x: factor * x, range(4), chunksize=2)))
"""


def test_functions_of_main_and_closures(backend: str, program: Callable[..., Program]) -> None:
    pytest.importorskip("cloudpickle", reason="for closures")
    found = program(MAIN).run(backend)
    assert (found.stdout, found.stderr) == ("4 [2, 4]\n2\n6\n[0, 3, 6, 9]\n", "")


@pytest.mark.parametrize("options", [["-c"], ["-Bc"], ["-W", "ignore", "-Bsc"], ["-X", "utf8", "-sc"]])
def test_functions_of_a_main_module_on_the_command_line(options: list[str]) -> None:
    code = """if True:
        import tractor_host as th
        def double(x):
            return 2 * x
        if __name__ == "__main__":
            with th.Executor(1) as pool:
                print(pool.submit(double, 2).result(30))
    """
    command = [sys.executable, *options, code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("4\n", "", 0)


def test_a_program_without_a_guard_is_told_of_it(backend: str, program: Callable[..., Program]) -> None:
    source = """
        import sys
        import tractor_host as th
        def double(x):
            return 2 * x
        with th.Executor(1, sys.argv[1]) as pool:
            print(repr(pool.submit(double, 2).exception(30)))
    """
    found = program(source).run(backend)
    if backend == "fork":
        assert found.stdout == "None\n"
    else:
        assert "guard what only the program is to do by: if __name__ == '__main__':" in found.stdout
    assert found.stderr == ""


def test_closures_among_the_arguments(backend: str) -> None:
    pytest.importorskip("cloudpickle", reason="for closures")
    data = bytearray(200_000)
    with th.Executor(1, backend) as pool:
        assert pool.submit(operator.call, lambda: len(data) + 7).result(PATIENCE) == 200_007
        assert pool.submit(max, [1, -3], key=lambda number: -number).result(PATIENCE) == -3
        # What can't be sent so either is told as ever.
        error = pool.submit(targets.echo, lambda: 7, threading.Lock()).exception(PATIENCE)
        assert error is not None
        assert error.__notes__[-1].startswith("argument 1 of type function cannot be pickled")


def test_closures_without_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cloudpickle", None)
    with th.Executor(1) as pool, pytest.raises((pickle.PicklingError, AttributeError)) as caught:
        pool.submit(lambda: 1).result(PATIENCE)
    assert "use a function that can be imported by its name" in caught.value.__notes__[-1]


def test_many_threads_submit_at_once(backend: str) -> None:
    found: dict[int, list[int]] = {}

    def submit(number: int) -> None:
        futures = [pool.submit(divmod, number, index) for index in range(1, 51)]
        found[number] = [future.result(PATIENCE)[0] for future in futures]

    with th.Executor(3, backend) as pool:
        threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert found == {number: [number // index for index in range(1, 51)] for number in range(8)}


def test_callbacks_may_submit() -> None:
    last: list[int] = []
    over = threading.Event()

    def again(future: concurrent.futures.Future[int]) -> None:
        if (value := future.result()) < 50:
            pool.submit(targets.add, value, 1).add_done_callback(again)
        else:
            last.append(value)
            over.set()

    with th.Executor(1) as pool:
        pool.submit(targets.add, 0, 1).add_done_callback(again)
        assert over.wait(PATIENCE)
    assert last == [50]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, ValueError])
def test_what_a_callback_raises_is_logged(
    kind: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[Any] = []

    def fail(future: concurrent.futures.Future[Any]) -> None:
        called.append(threading.current_thread().name)
        raise kind("of a callback")

    with th.Executor(1) as pool:
        futures = [
            pool.submit(targets.return_when_there, str(tmp_path / "sign"), number) for number in range(4)
        ]
        for future in futures:
            future.add_done_callback(fail)
            future.add_done_callback(called.append)
        (tmp_path / "sign").touch()
        assert [future.result(PATIENCE) for future in futures] == list(range(4))
        assert pool.submit(abs, -7).result(PATIENCE) == 7
    assert called == [one for future in futures for one in ("th-pool", future)]
    assert caplog.text.count("exception calling callback for <Future") == 4
    caplog.clear()


def test_what_somebody_else_says_of_a_future_holds() -> None:
    with th.Executor(1) as pool:
        runs = pool.submit(targets.return_after, 0.1, 1)
        running(runs, pool)
        waits = [pool.submit(abs, -number) for number in range(4)]
        runs.set_result(5)
        waits[1].set_running_or_notify_cancel()
        waits[2].set_exception(ValueError("mine"))
        assert runs.result(0) == 5
        assert [waits[number].result(PATIENCE) for number in (0, 1, 3)] == [0, 1, 3]
        assert isinstance(waits[2].exception(PATIENCE), ValueError)
        assert pool.submit(abs, -7).result(PATIENCE) == 7


# -- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_child_of_a_task_that_forks_answers_nothing() -> None:
    with th.Executor(1, stdio="null") as pool:
        child, value = pool.submit(targets.fork_and_return, 7).result(PATIENCE)
        assert value == 7
        until(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its end")
        (worker,) = pool.workers()
        assert list(pool.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        assert pool.workers() == [worker]


@pytest.mark.parametrize(
    ("target", "args", "told"),
    [
        (targets.exit_now, (3,), "exit code 3"),
        (targets.kill_itself, (signal.SIGKILL,), "SIGKILL"),
        (targets.segfault, (), "SIGSEGV"),
        (targets.write_garbage, (), None),
        (targets.close_all_fds, (False,), None),
    ],
)
def test_a_death_fails_one_future(process_backend: str, target: Any, args: Any, told: str | None) -> None:
    with th.Executor(2, process_backend, stdio="null") as pool:
        other = pool.submit(time.sleep, 0.3)
        until(other.running)
        dies = pool.submit(target, *args)
        waits = [pool.submit(targets.add, number, 1) for number in range(10)]
        error = dies.exception(PATIENCE)
        assert isinstance(error, th.WorkerError), error
        assert told is None or told in str(error)
        assert f"({process_backend}, targets:{target.__name__})" in str(error)
        assert error.__notes__[0] == f"It was carrying out targets:{target.__name__}."
        assert [future.result(PATIENCE) for future in waits] == list(range(1, 11))
        assert other.result(PATIENCE) is None


@pytest.mark.parametrize("target", [targets.sleep, targets.sleep_and_swallow], ids=["asleep", "deaf"])
def test_a_ctrl_c_that_leaves_the_block_ends_its_tasks(backend: str, target: Any) -> None:
    begun = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        th.Executor(1, backend, cancel_timeout=0.3, stdio="null") as pool,
    ):
        assert pool.submit(abs, -1).result() == 1
        runs, waits = pool.submit(target), pool.submit(abs, -1)
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 10
    assert isinstance(runs.exception(0), th.WorkerKilled)
    assert waits.cancelled()
    assert th.workers() == []


def test_a_worker_that_lets_go_of_its_socket_is_ended() -> None:
    with th.Executor(1) as pool:
        begun = time.monotonic()
        error = pool.submit(targets.close_calls_and_sleep).exception(PATIENCE)
        assert isinstance(error, th.WorkerError)
        assert time.monotonic() - begun < 15
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3


def test_a_worker_that_dies_while_it_waits_takes_no_task_along(process_backend: str) -> None:
    with th.Executor(1, process_backend) as pool:
        pid = pool.submit(os.getpid).result(PATIENCE)
        # It is sent one while it can't read.
        os.kill(pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        future = pool.submit(os.getpid)
        assert future.running()
        os.kill(pid, signal.SIGKILL)
        assert future.result(PATIENCE) != pid


@pytest.mark.parametrize("stuck", [targets.spin, targets.sleep, targets.spin_and_swallow, targets.resist])
def test_a_running_task_can_be_cancelled(backend: str, stuck: Any) -> None:
    with th.Executor(2, backend, cancel_timeout=0.1) as pool:
        future = pool.submit(stuck)
        worker = running(future, pool)
        other = pool.submit(targets.return_after, 0.2, "other")
        called: list[bool] = []
        future.add_done_callback(lambda one: called.append(one.cancelled()))
        assert future.cancel()
        assert future.cancelled()
        assert called == [True]
        with pytest.raises(CancelledError):
            future.result(0)
        # Who waits for several is told when the worker is gone.
        assert wait([future], timeout=PATIENCE).done == {future}
        assert worker.exit is not None
        assert other.result(PATIENCE) == "other"
        assert list(pool.map(abs, range(5))) == list(range(5))
        assert not other.cancel()


def test_tasks_that_wait_can_be_cancelled() -> None:
    with th.Executor(1) as pool:
        first = pool.submit(targets.sleep)
        running(first, pool)
        futures = [pool.submit(targets.add, number, 1) for number in range(5)]
        assert [future.cancel() for future in futures[::2]] == [True] * 3
        assert first.cancel()
        assert [future.result(PATIENCE) for future in futures[1::2]] == [2, 4]
        assert all(future.cancelled() for future in futures[::2])


def test_many_that_wait_can_be_cancelled_in_any_order() -> None:
    with th.Executor(1, cancel_timeout=0.1) as pool:
        stuck = pool.submit(targets.sleep)
        running(stuck, pool)
        futures = [pool.submit(targets.add, number, 1) for number in range(20_000)]
        begun = time.monotonic()
        assert all(future.cancel() for future in futures[:0:-1])
        assert not wait(futures[1:], PATIENCE).not_done
        # A search through all that wait, for each, takes a minute.
        assert time.monotonic() - begun < PATIENCE / 3
        assert list(pool._pool._waiting) == futures[:1]
        assert stuck.cancel()
        assert futures[0].result(PATIENCE) == 1


def test_cancelling_at_any_moment_loses_nothing(backend: str) -> None:
    with th.Executor(2, backend, cancel_timeout=0.05) as pool:
        for delay in range(12):
            future = pool.submit(targets.return_after, 0.01, "value")
            deadline = time.perf_counter() + delay * 0.002
            while time.perf_counter() < deadline:
                pass
            if future.cancel():
                assert future.cancelled()
                with pytest.raises(CancelledError):
                    future.result(0)
                assert wait([future], PATIENCE).done
            else:
                assert future.result(PATIENCE) == "value"
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3
        assert len(pool.workers()) <= 4


def test_a_task_that_takes_too_long(backend: str) -> None:
    with th.Executor(1, backend, task_timeout=0.3, cancel_timeout=0.1) as pool:
        late = pool.submit(targets.spin_and_swallow)
        # Its time begins when it does.
        patient = pool.with_timeout(PATIENCE).submit(targets.return_after, 0.5, "value")
        error = late.exception(PATIENCE)
        assert isinstance(error, th.TaskTimeout)
        assert isinstance(error, TimeoutError)
        assert isinstance(error, th.WorkerKilled)
        assert error.exit.kind == "killed"
        assert "targets:spin_and_swallow took longer than 0.3 s" in str(error)
        assert pickle.loads(pickle.dumps(error)).exit == error.exit
        assert patient.result(PATIENCE) == "value"
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3
        assert list(pool.with_timeout(None).map(abs, [-1])) == [1]


def test_each_task_has_its_time_limit_from_its_own_beginning(backend: str) -> None:
    with th.Executor(1, backend, task_timeout=0.6, cancel_timeout=0.1) as pool:
        pool.submit(targets.nothing).result(PATIENCE)
        (worker,) = pool.workers()
        begin = time.monotonic()
        while time.monotonic() < begin + 1.0:  # for longer than any of them may take
            pool.submit(targets.return_after, 0.05, 1).result(PATIENCE)
        pool.with_timeout(PATIENCE).submit(targets.return_after, 0.7, 1).result(PATIENCE)
        pool.with_timeout(None).submit(targets.return_after, 0.7, 1).result(PATIENCE)
        assert pool.workers() == [worker]
        # One that is shorter than the one that is being waited for.
        late = pool.with_timeout(0.2).submit(targets.spin_and_swallow)
        error = late.exception(PATIENCE)
        assert isinstance(error, th.TaskTimeout)
        assert "ran longer than its timeout of 0.2 s" in error.exit.cause


def test_time_limits_hold_in_pools_of_workers(backend: str) -> None:
    with th.Executor(1, backend) as pool:
        told = pool.submit(targets.be_late_below, "forkserver").result(PATIENCE)
    assert told == ("TaskTimeout", "targets:sleep took longer than 0.2 s", 3)


def test_time_limits_hold_while_the_gil_is_held() -> None:
    with th.Executor(1, task_timeout=0.2, cancel_timeout=0.1) as pool:
        late = pool.submit(targets.sleep)
        worker = running(late, pool)
        ctypes.PyDLL(None).usleep(900_000)
        assert isinstance(late.exception(PATIENCE), th.TaskTimeout)
        # Counted by the supervisor, which has seen its end meanwhile.
        assert worker.wait(PATIENCE).lifetime < 0.9


@pytest.mark.parametrize("seconds", [30 * 86400.0, float("inf")])
def test_limits_that_no_clock_of_the_kernel_reaches(seconds: float) -> None:
    with th.Executor(1, task_timeout=seconds, idle_timeout=seconds, cancel_timeout=0.1) as pool:
        assert pool.submit(targets.return_after, 0.05, 1).result(seconds) == 1
        # With nothing to do, it has slept meanwhile.
        future = pool.submit(targets.return_after, 0.05, 2)
        assert wait([future], seconds).done == {future}
        assert list(concurrent.futures.as_completed([future], seconds)) == [future]
        stuck = pool.with_timeout(seconds).submit(targets.sleep)
        running(stuck, pool)
        assert stuck.cancel()
        assert pool.submit(abs, -3).result(PATIENCE) == 3


def test_memory_that_may_not_be_had() -> None:
    with th.Executor(1, memory_limit=400 << 20) as pool:
        pid = pool.submit(os.getpid).result(PATIENCE)
        with pytest.raises(MemoryError):
            pool.submit(targets.zeros, 1 << 30).result(PATIENCE)
        assert pool.submit(os.getpid).result(PATIENCE) == pid
        # Arguments take some as well.
        error = pool.submit(len, bytes(1 << 29)).exception(PATIENCE)
        assert isinstance(error, MemoryError)
        assert error.__notes__ == ["raised while a call was received in its worker"]
        assert pool.submit(os.getpid).result(PATIENCE) == pid


@pytest.mark.parametrize("own", ["forkserver", "fork", "exec"])
def test_a_worker_without_descriptors_says_so_and_goes_on(own: str) -> None:
    with th.Executor(1, own) as pool:
        pool.submit(targets.use_up_fds).result(PATIENCE)
        (worker,) = pool.workers()
        with pytest.raises(OSError, match="Too many open files"):
            pool.submit(len, bytes(200_000)).result(PATIENCE)
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        with pytest.raises(OSError, match="Too many open files"):
            pool.submit(targets.zeros, 200_000).result(PATIENCE)
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        assert pool.workers() == [worker]


# -- workers ---------------------------------------------------------------------------------------------------


def test_the_initializer_is_called_once_in_each(backend: str) -> None:
    with th.Executor(1, backend, initializer=targets.remember, initargs=("value",)) as pool:
        assert [pool.submit(targets.remembered).result(PATIENCE) for _ in range(3)] == [["value"]] * 3


def test_the_initializer_can_be_a_closure(backend: str) -> None:
    pytest.importorskip("cloudpickle", reason="for closures")
    value = "value"
    with th.Executor(1, backend, initializer=lambda: targets.remember(value)) as pool:
        assert pool.submit(targets.remembered).result(PATIENCE) == ["value"]
    with th.Executor(
        1, backend, initializer=operator.call, initargs=(lambda: targets.remember(value),)
    ) as pool:
        assert pool.submit(targets.remembered).result(PATIENCE) == ["value"]


@pytest.mark.parametrize("initializer", [targets.raise_with_notes, targets.segfault])
def test_an_initializer_that_fails_breaks_the_pool(process_backend: str, initializer: Any) -> None:
    with th.Executor(2, process_backend, initializer=initializer, stdio="null") as pool:
        futures = [pool.submit(targets.add, 1, 2) for _ in range(5)]
        for future in futures:
            error = future.exception(PATIENCE)
            assert isinstance(error, BrokenExecutor)
            assert isinstance(error.__cause__, th.WorkerError)
        with pytest.raises(BrokenExecutor, match="can't be started"):
            pool.submit(targets.add, 1, 2)


def test_workers_are_replaced_after_so_many_tasks(backend: str) -> None:
    with th.Executor(1, backend, max_tasks_per_child=2, initializer=targets.remember, initargs=("",)) as pool:
        found = [pool.submit(targets.remember, number).result(PATIENCE) for number in range(6)]
    assert found == [2, 3] * 3


def test_workers_leave_when_there_is_nothing_to_do() -> None:
    with th.Executor(3, idle_timeout=0.05) as pool:
        list(pool.map(time.sleep, [0.01] * 6))
        until(lambda: pool.workers() == [], "their end")
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3


def test_no_room_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise BlockingIOError("no process can be had")

    spawn = th.executor.spawn  # type: ignore[attr-defined]
    with th.Executor(2) as pool:
        monkeypatch.setattr("tractor_host.executor.spawn", refuse)
        futures = [pool.submit(targets.add, 1, 2) for _ in range(3)]
        for future in futures:
            with pytest.raises(BlockingIOError, match="no process"):
                future.result(PATIENCE)
        monkeypatch.setattr("tractor_host.executor.spawn", spawn)
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3
        # One is enough.
        monkeypatch.setattr("tractor_host.executor.spawn", refuse)
        assert [pool.submit(targets.add, 1, 2).result(PATIENCE) for _ in range(3)] == [3] * 3


def test_no_descriptors_for_the_thread() -> None:
    with th.Executor(1) as pool:
        with helpers.no_descriptor_left():
            for _ in range(2):
                with pytest.raises(OSError, match="Too many open files"):
                    pool.submit(abs, -1)
        assert pool.submit(abs, -1).result(PATIENCE) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("is_unread", [False, True])
def test_a_thread_that_fails_leaves_nobody_waiting(is_unread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("of the thread")

    pool = th.Executor(1, cancel_timeout=0.1, kill_timeout=0.1)
    pid = pool.submit(os.getpid).result(PATIENCE)
    if is_unread:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    runs = pool.submit(targets.sleep)
    running(runs, pool)
    waits = [pool.submit(abs, -number) for number in range(3)]
    cancelled = pool.submit(abs, -1)
    assert cancelled.cancel()
    monkeypatch.setattr(pool._pool, "_tend", fail)
    pool._pool._ring()
    assert isinstance(runs.exception(PATIENCE), th.WorkerKilled)
    for future in waits:
        assert isinstance(future.exception(PATIENCE), BrokenExecutor)
    with pytest.raises(BrokenExecutor, match="the pool's thread has failed: of the thread") as caught:
        pool.submit(abs, -1)
    assert isinstance(caught.value.__cause__, LookupError)
    pool.shutdown()
    assert not wait([runs, cancelled, *waits], PATIENCE).not_done
    assert pool.workers() == []


def test_workers_are_ended_while_a_callback_holds_the_thread_up(backend: str, tmp_path: Path) -> None:
    with th.Executor(4, backend, cancel_timeout=0.1) as pool:
        stuck = [pool.submit(targets.sleep) for _ in range(2)]
        workers = [running(future, pool) for future in stuck]
        late = pool.with_timeout(1.0).submit(targets.sleep)
        workers.append(running(late, pool))
        holds, leave = hold_up_the_thread(pool, tmp_path / "sign")
        assert stuck[0].cancel()
        assert workers[0].wait(PATIENCE).rung is not None
        assert "its timeout of 1 s" in workers[2].wait(PATIENCE).cause
        threading.Thread(target=lambda: (workers[1].wait(PATIENCE), leave.set())).start()
        pool.kill_workers()
        assert isinstance(stuck[1].exception(PATIENCE), th.WorkerKilled)
        assert isinstance(late.exception(PATIENCE), th.TaskTimeout)
        assert not wait([*stuck, late, holds], PATIENCE).not_done


# -- what workers log ------------------------------------------------------------------------------------------


def test_what_workers_log_is_logged_here(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with th.Executor(1, backend, initializer=targets.log, initargs=("first",), log_level="INFO") as pool:
        assert pool.submit(targets.log, "this").result(PATIENCE) is None
        assert pool.submit(targets.log, "that", "more").result(PATIENCE) is None
        (worker,) = pool.workers()
    found = [record for record in caplog.records if record.name.startswith("targets")]
    # What was logged before the answer has come before the answer.
    assert [record.getMessage() for record in found] == ["said first", "said this", "said that", "said more"]
    assert {record.__dict__["worker"] for record in found} == {worker.name}
    assert {(record.levelname, record.__dict__["lost_before"]) for record in found} == {("WARNING", 0)}


def test_what_a_worker_logs_before_its_death_is_not_lost(
    process_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    with th.Executor(1, process_backend, log_level="INFO") as pool:
        assert isinstance(pool.submit(targets.log_and_die).exception(PATIENCE), th.WorkerDied)
        assert [record.getMessage() for record in caplog.records] == ["said this"]


def test_records_that_find_no_room_are_counted(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    with th.Executor(1, log_level="INFO") as pool:
        _, leave = hold_up_the_thread(pool, tmp_path / "sign")
        # Sent from here, to the worker that the thread has freed before.
        floods = pool.submit(targets.log_a_flood, 3000, str(tmp_path / "told"))
        until((tmp_path / "told").exists, "the end of a flood that nobody reads")
        leave.set()
        floods.result(PATIENCE)
    *read, last = [(record.name, record.getMessage().split()[0], record) for record in caplog.records]
    assert {name for name, *_ in read} == {"targets.flood"}
    numbers = [int(number) for _, number, _ in read]
    assert numbers == list(range(len(numbers)))
    lost = 3000 - len(numbers)
    assert 0 < lost < 3000
    assert (last[0], last[2].__dict__["lost_before"]) == ("tractor_host", lost)
    assert f"the last {lost} records" in last[2].getMessage()


def test_a_handler_that_leaves_the_thread_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    def leave(record: object) -> bool:
        sys.exit("from a filter")

    caplog.set_level("INFO")
    logger = logging.getLogger("targets.some")
    logger.addFilter(leave)
    try:
        with th.Executor(1, log_level="INFO") as pool:
            assert pool.submit(targets.log, "this").result(PATIENCE) is None
            assert pool.submit(abs, -1).result(PATIENCE) == 1
    finally:
        logger.removeFilter(leave)
    assert "SystemExit: from a filter" in caplog.text
    caplog.clear()  # by its traceback, that keeps the pool


# -- the end -----------------------------------------------------------------------------------------------------


def test_shutdown_ends_what_was_submitted(backend: str) -> None:
    pool = th.Executor(2, backend)
    futures = [pool.submit(targets.return_after, 0.02, number) for number in range(8)]
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(targets.add, 1, 2)
    pool.shutdown()
    assert [future.result(0) for future in futures] == list(range(8))
    assert pool.workers() == []


def test_shutdown_can_cancel_what_has_not_begun(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    pool = th.Executor(2)
    futures = [pool.submit(targets.return_when_there, str(sign), number) for number in range(20)]
    pool.shutdown(wait=False, cancel_futures=True)
    sign.touch()
    pool.shutdown()
    assert [future.result(0) for future in futures if not future.cancelled()] == [0, 1]
    assert all(future.done() for future in futures)


def test_workers_that_have_nothing_to_do_are_killed_at_once(backend: str) -> None:
    with th.Executor(2, backend, cancel_timeout=PATIENCE) as pool:
        list(pool.map(time.sleep, [0.05] * 4))
        assert len(pool.workers()) == 2
        start = time.monotonic()
        pool.terminate_workers()
        assert pool.workers() == []
        assert time.monotonic() - start < PATIENCE / 2


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_all_workers_can_be_killed(backend: str, how: str) -> None:
    pool = th.Executor(2, backend, cancel_timeout=0.1)
    stuck = [pool.submit(targets.spin_and_swallow) for _ in range(2)]
    waits = [pool.submit(targets.add, 1, 2) for _ in range(3)]
    until(lambda: len(pool.workers()) == 2)
    getattr(pool, how)()
    for future in stuck:
        assert isinstance(future.exception(0), th.WorkerKilled | BrokenExecutor)
    assert all(future.cancelled() for future in waits)
    assert pool.workers() == []
    getattr(pool, how)()


def test_a_pool_that_nobody_has_ends_with_its_last_task() -> None:
    pool = th.Executor(2)
    futures = [pool.submit(targets.add, number, number) for number in range(5)]
    workers = until(pool.workers)
    del pool
    gc.collect()
    assert [future.result(PATIENCE) for future in futures] == [0, 2, 4, 6, 8]
    for worker in workers:
        assert worker.wait(PATIENCE).kind == "returned"


class _NotToBeSent:
    def __reduce__(self) -> str:
        raise ValueError("not to be sent")


def test_neither_a_pool_nor_a_future_can_be_sent() -> None:
    with th.Executor(1) as pool:
        future = pool.submit(abs, -1)
        for value, what in ((pool, "an Executor"), (future, "the Future of an Executor")):
            error = pool.submit(id, value).exception(PATIENCE)
            assert isinstance(error, TypeError)
            assert str(error) == f"{what} cannot be pickled or copied: it is of this process"
            assert f"argument 1 of type {type(value).__name__} cannot" in error.__notes__[-1]


def test_what_can_not_be_sent_is_not_kept_alive() -> None:
    with th.Executor(1) as pool:
        value = _NotToBeSent()
        reference = weakref.ref(value)
        gc.disable()
        try:
            assert type(pool.submit(id, value).exception(0)) is ValueError
            del value
            assert reference() is None
        finally:
            gc.enable()


def test_a_task_keeps_nothing_alive() -> None:
    with th.Executor(1) as pool:
        shared = th.share(b"x" * 100_000)
        pool.submit(targets.size_of_shared, shared).result(PATIENCE)
        number = shared._fd
        del shared
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


@pytest.mark.parametrize("then", ["", "pool.shutdown(wait=False)"])
def test_the_program_waits_for_its_tasks(then: str, program: Callable[..., Program]) -> None:
    source = f"""
        import targets, tractor_host as th
        if __name__ == "__main__":
            pool = th.Executor(2)
            for number in range(4):
                pool.submit(targets.print_soon, number)
            {then}
    """
    found = program(source).run(env=importable())
    assert (sorted(found.stdout.split()), found.stderr, found.returncode) == (["0", "1", "2", "3"], "", 0)


def test_a_stuck_task_does_not_keep_the_program_from_ctrl_c(program: Callable[..., Program]) -> None:
    source = """
        import targets, tractor_host as th
        if __name__ == "__main__":
            with th.Executor(2, cancel_timeout=0.1, stdio="null") as pool:
                future = pool.submit(targets.spin_and_swallow)
                while not (future.running() and pool.workers()):
                    pass
                print("ready", flush=True)
                try:
                    future.result()
                except KeyboardInterrupt:
                    print(future.cancel(), flush=True)
    """
    with program(source).start(env=importable()) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        # An interrupt of that call, and of no other.
        until(lambda: Path(f"/proc/{running.pid}/wchan").read_text().startswith("futex"), "the wait")
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)
    assert (out, err, running.returncode) == ("True\n", "", 0)


def test_a_fork_can_not_use_it(program: Callable[..., Program]) -> None:
    source = """
        import os, time, warnings, tractor_host as th
        warnings.simplefilter("ignore")
        if __name__ == "__main__":
            with th.Executor(1) as pool:
                done = pool.submit(abs, -1)
                done.result()
                runs, results = pool.submit(time.sleep, 0.5), pool.map(abs, [-1])
                if not (child := os.fork()):
                    for ask in (lambda: pool.submit(abs, -1), runs.result, lambda: next(results)):
                        try:
                            ask()
                        except RuntimeError as error:
                            print(error, flush=True)
                    pool.shutdown()
                    os._exit(done.result() + 6)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pool.submit(abs, -2).result())
    """
    found = program(source).run()
    *told, last = found.stdout.splitlines()
    assert last == "7 2"
    assert len(told) == 3
    assert all("this one is a fork; and os.fork() makes processes that can have no" in text for text in told)
    assert found.stderr == ""


# -- with others -----------------------------------------------------------------------------------------------


def test_asyncio_can_run_calls_in_it_and_cancel_them(backend: str) -> None:
    async def main(pool: th.Executor) -> list[int]:
        loop = asyncio.get_running_loop()
        stuck = loop.run_in_executor(pool, targets.spin)
        values = await asyncio.gather(*[loop.run_in_executor(pool, operator.neg, n) for n in range(3)])
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        return values

    with th.Executor(2, backend) as pool:
        assert asyncio.run(main(pool)) == [0, -1, -2]
        until(lambda: len(pool.workers()) == 1, "the end of the stuck one")


def test_whoever_in_asyncio_stops_waiting_stops_the_task() -> None:
    """By a time limit of the loop's, the failure of a sibling, or the end of the loop."""

    async def limited(pool: th.Executor) -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await loop.run_in_executor(pool, targets.spin)
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_awaiting(loop.run_in_executor(pool, targets.spin)))
                tasks.create_task(_awaiting(loop.run_in_executor(pool, targets.raise_with_notes)))
        assert caught.group_contains(ValueError, match="noted")
        # Nobody waits for this one, but the loop.
        left = loop.create_task(_awaiting(loop.run_in_executor(pool, targets.spin)))
        await asyncio.sleep(0.05)
        assert not left.done()

    with th.Executor(2) as pool:
        asyncio.run(limited(pool))
        until(lambda: not any(slot.task for slot in list(pool._pool._slots.values())), "their end")
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3


async def _awaiting(future: asyncio.Future[Any]) -> Any:
    return await future


def test_asyncio_is_told_of_deaths_time_limits_and_the_end_of_the_pool() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with th.Executor(1, task_timeout=0.2, stdio="null") as pool:
            with pytest.raises(th.WorkerDied):
                await loop.run_in_executor(pool, targets.abort)
            with pytest.raises(th.TaskTimeout):
                await loop.run_in_executor(pool, targets.spin)
            assert await loop.run_in_executor(pool.with_timeout(None), targets.return_after, 0.3, 7) == 7
            queued = [loop.run_in_executor(pool, targets.spin) for _ in range(2)]
            await asyncio.sleep(0.05)
            queued[1].cancel()
            pool.kill_workers()
            with pytest.raises(th.WorkerKilled):
                await queued[0]
            with pytest.raises(asyncio.CancelledError):
                await queued[1]
            with pytest.raises(RuntimeError, match="after shutdown"):
                loop.run_in_executor(pool, abs, 1)

    asyncio.run(main())


def test_asyncio_takes_only_threads_as_its_default() -> None:
    async def main() -> None:
        with th.Executor(1) as pool, pytest.raises(TypeError, match="ThreadPoolExecutor"):
            asyncio.get_running_loop().set_default_executor(pool)  # type: ignore[arg-type]

    asyncio.run(main())


def test_workers_have_pools_of_their_own(backend: str) -> None:
    with th.Executor(1, backend) as pool:
        assert pool.submit(targets.map_in_pool, "forkserver", [1, 2, 3]).result(PATIENCE) == [1, 2, 3]


def test_as_completed_and_wait() -> None:
    with th.Executor(2) as pool:
        slow, fast = pool.submit(targets.return_after, 0.5, "slow"), pool.submit(targets.add, 1, 2)
        done, left = wait([slow, fast], PATIENCE, FIRST_COMPLETED)
        assert (done, left) == ({fast}, {slow})
        assert set(concurrent.futures.as_completed([slow, fast], PATIENCE)) == {slow, fast}


def test_waiting_for_many_while_they_finish() -> None:
    """With those of another executor among them, each is told of once, whenever it finishes."""
    with th.Executor(3) as pool, concurrent.futures.ThreadPoolExecutor(2) as threads:
        for turn in range(60):
            futures = [
                (threads if number % 3 == 0 else pool).submit(divmod, number, 2 if number % 5 else 0)
                for number in range(turn % 13 + 1)
            ]
            for how in (FIRST_COMPLETED, FIRST_EXCEPTION):
                done, left = wait(futures, PATIENCE, how)
                assert done
                assert len(done) + len(left) == len(futures)
            if turn % 2:
                completed = list(concurrent.futures.as_completed(futures, PATIENCE))
                assert len(completed) == len(futures)
                assert set(completed) == set(futures)
            else:
                assert wait(futures, PATIENCE).done == set(futures)
            assert sum(future.exception(0) is not None for future in futures) == (turn % 13) // 5 + 1


def test_waiting_for_too_long() -> None:
    with th.Executor(1, cancel_timeout=0.1) as pool:
        future = pool.submit(targets.sleep)
        for timeout in (0, -1, 0.01):
            with pytest.raises(TimeoutError):
                future.result(timeout)
            with pytest.raises(TimeoutError):
                future.exception(timeout)
            with pytest.raises(TimeoutError):
                next(concurrent.futures.as_completed([future], timeout))
            assert wait([future], timeout).not_done == {future}
        assert future._over._sleepers == []
        assert future._watchers().waiting == []
        assert future.cancel()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": 1.5}, TypeError, "max_workers must be an integer, not float"),
        ({"backend": "threads"}, ValueError, "unknown backend 'threads'; there are 'forkserver'"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be greater than 0"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"task_timeout": -1}, ValueError, "task_timeout must be a number of seconds"),
        ({"idle_timeout": "1"}, TypeError, "idle_timeout must be a number of seconds"),
        ({"env": {"a=b": "c"}}, ValueError, "env has a variable that cannot be called"),
        ({"gil": "x"}, ValueError, "gil must be 'shared', 'own' or 'auto', not 'x'"),
        ({"cancel_timeout": -1}, ValueError, "cancel_timeout must be a number of seconds"),
        ({"kill_timeout": None}, TypeError, "kill_timeout must be a number of seconds"),
        ({"ladder": {"no": 1}}, ValueError, "'forkserver' has no rung 'no'"),
        ({"name": 3}, TypeError, "name must be a str, not int"),
        ({"name": "a\0b"}, ValueError, "has a NUL"),
        ({"stdio": 3}, ValueError, "stdio must be 'inherit', 'null'"),
        ({"cwd": 3}, TypeError, "int"),
        ({"priority": "high"}, TypeError, "priority must be a number, not str"),
        ({"log_level": "LOUD"}, ValueError, "log_level must be a level of logging's, not 'LOUD'"),
        ({"cpu_quota": float("nan")}, ValueError, "cpu_quota must be a finite number"),
        (
            {"initializer": abs, "initargs": (threading.Lock(),)},
            TypeError,
            "the initializer or its arguments",
        ),
        ({"memory_limit": 0}, ValueError, "memory_limit must be greater than 0"),
        ({"memory_limit": 1 << 30, "backend": "subint"}, ValueError, "share this one's memory"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        th.Executor(**options)


def test_chunks_and_buffers_of_no_size() -> None:
    with th.Executor(1) as pool:
        for one in (pool, pool.with_timeout(PATIENCE)):
            with pytest.raises(ValueError, match="chunksize"):
                one.map(abs, [1], chunksize=0)
            with pytest.raises(ValueError, match="buffersize"):
                one.map(abs, [1], buffersize=0)
            with pytest.raises(TypeError, match="buffersize"):
                one.map(abs, [1], buffersize=1.5)  # type: ignore[arg-type]


def test_another_time_limit_has_the_same_map() -> None:
    with th.Executor(1) as pool:
        limited = pool.with_timeout(PATIENCE)
        assert list(limited.map(abs, range(-5, 1), chunksize=3)) == [5, 4, 3, 2, 1, 0]
        # Each chunk was one task.
        assert [slot.number for slot in pool._pool._slots.values()] == [3]
        assert list(pool.with_timeout(PATIENCE).map(abs, range(-5, 0), buffersize=2)) == [5, 4, 3, 2, 1]
        assert list(pool.map(abs, iter(range(-5, 0)), chunksize=2, buffersize=1)) == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize("how", ["raise", "close"])
def test_who_leaves_a_map_lets_what_runs_go_on(how: str, chunksize: int, tmp_path: Path) -> None:
    with th.Executor(2) as pool:
        values = [0] * chunksize + [tmp_path / "sign"] * 7 * chunksize
        results = pool.map(
            targets.divide_or_wait, [how] * len(values), values, chunksize=chunksize, timeout=None
        )
        assert isinstance(results, Generator)
        if how == "raise":
            with pytest.raises(ZeroDivisionError):
                next(results)
        else:
            assert next(results) == 0
        workers = until(lambda: len(pool.workers()) == 2 and pool.workers(), "two workers")
        until(lambda: any(slot.task is not None for slot in list(pool._pool._slots.values())))
        results.close()
        until(lambda: not pool._pool._waiting, "the end of what waited")
        (tmp_path / "sign").touch()
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        assert pool.workers() == workers
        assert list(results) == []


def test_an_interrupt_of_a_map_ends_what_runs() -> None:
    with th.Executor(1, cancel_timeout=0.1) as pool:
        results = pool.map(targets.sleep_for, [PATIENCE])
        assert isinstance(results, Generator)
        worker = until(lambda: [slot.worker for slot in list(pool._pool._slots.values()) if slot.task])[0]
        with Interrupts() as interrupts:
            assert interrupts.come({40}, lambda: next(results))
        assert worker.wait(PATIENCE).rung is not None


def test_what_a_worker_writes_is_as_for_spawn(tmp_path: Path) -> None:
    with th.Executor(1, stdio=tmp_path / "log") as pool:
        pool.submit(targets.print_line, "text").result(PATIENCE)
    assert (tmp_path / "log").read_text() == "text\n"


BROKEN_MAIN = """
    import os, sys
    import tractor_host as th

    def double(x):
        return 2 * x

    if __name__ == "__mp_main__" and os.path.exists(sys.argv[1]):
        raise LookupError("not yet")

    if __name__ == "__main__":
        with th.Executor(1) as pool:
            print(repr(pool.submit(double, 1).exception(30)))
            os.remove(sys.argv[1])
            print(pool.submit(double, 1).result(30), pool.submit(double, 2).result(30))
"""


def test_a_main_module_that_fails_is_told_each_time(program: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    found = program(BROKEN_MAIN).run(str(tmp_path / "marker"))
    assert (found.stdout, found.stderr) == ("LookupError('not yet')\n2 4\n", "")


def test_a_pool_that_its_own_thread_collects() -> None:
    pools = [th.Executor(1)]
    inner = pools[0]._pool
    future = pools[0].submit(targets.return_after, 0.1, 1)
    future.add_done_callback(lambda _: pools.clear())
    assert future.result(PATIENCE) == 1
    inner.join()
    assert not inner.workers()


def ready_ones(pool: th.Executor) -> list[th.Worker]:
    return [slot.worker for slot in list(pool._pool._slots.values()) if slot.ready]


def test_tasks_that_are_submitted_cancelled_and_killed_at_random(backend: str) -> None:
    """All futures come to an end, and so do all workers."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    futures = []
    with th.Executor(3, backend, cancel_timeout=0.05, task_timeout=PATIENCE) as pool:
        for number in range(120):
            futures.append(pool.submit(targets.return_after, chance.random() * 0.005, number))
            match chance.randrange(8):
                case 0:
                    chance.choice(futures).cancel()
                case 1 if (workers := ready_ones(pool)) and backend != "subint":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(workers).pid or 0, signal.SIGKILL)
                case 2:
                    wait([chance.choice(futures)], PATIENCE)
                case _:
                    pass
    for number, future in enumerate(futures):
        assert future.done(), f"seed {seed}"
        if not future.cancelled():
            error = future.exception(0)
            assert error is None or isinstance(error, th.WorkerDied), f"seed {seed}"
            assert error is not None or future.result(0) == number, f"seed {seed}"


def test_a_call_that_is_sent_twice_is_carried_out_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is if who sends it seems to have been interrupted, and was only slow."""
    pools = th.executor._Pool  # type: ignore[attr-defined]
    send = pools._send

    def send_twice(pool: Any, turn: Any, task: Any) -> None:
        send(pool, turn, task)
        send(pool, turn, task)

    monkeypatch.setattr(pools, "_send", send_twice)
    ours, theirs = socket.socketpair()
    with th.Executor(1, backend) as pool, ours:
        assert [pool.submit(targets.count_calls).result(PATIENCE) for _ in range(5)] == [1, 2, 3, 4, 5]
        with theirs:
            assert pool.submit(targets.send_over, theirs, b"once").result(PATIENCE) is None
        assert pool.submit(targets.count_calls).result(PATIENCE) == 6
        # What came beside the second one is closed.
        assert ours.recv(10) == b"once"
        assert ours.recv(10) == b""


# -- Ctrl-C ------------------------------------------------------------------------------------------------------


class Interrupts:
    """Raises `KeyboardInterrupt` between any two instructions of this thread's Python code, as a Ctrl-C does.

    CPython looks for signals at fewer places than that, but at those that there are after each call.
    """

    _TOOL = 4
    _SHUT = ("PUSH_EXC_INFO", "POP_EXCEPT", "COPY", "RERAISE")

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._count = 0
        self._marks: set[int] = set()

    def _passed(self, code: CodeType, offset: int) -> None:
        if threading.get_ident() != self._thread or not self._marks or code.co_filename == __file__:
            return
        # None comes out of a destructor, or between the steps of catching another one.
        if code.co_name == "__del__" or dis.opname[code.co_code[offset]] in self._SHUT:
            return
        self._count += 1
        if self._count in self._marks:
            self._marks.discard(self._count)
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        sys.monitoring.use_tool_id(self._TOOL, "interrupts")
        sys.monitoring.register_callback(self._TOOL, sys.monitoring.events.INSTRUCTION, self._passed)
        sys.monitoring.set_events(self._TOOL, sys.monitoring.events.INSTRUCTION)
        return self

    def __exit__(self, *_: object) -> None:
        sys.monitoring.set_events(self._TOOL, 0)
        sys.monitoring.free_tool_id(self._TOOL)

    def come(self, marks: set[int], during: Callable[[], object]) -> bool:
        """Whether as many instructions as these are were executed, so that there was one."""
        first = min(marks)
        self._count, self._marks = 0, marks
        try:
            during()
        except KeyboardInterrupt:
            return True
        finally:
            self._marks = set()
        return self._count >= first


def elsewhere[T](call: Callable[[], T]) -> T:
    """On another thread, which can't have what this one holds; in time."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found, "stuck"
    return found[0]


def answers(pool: th.Executor, kept: list[Any]) -> bool:
    """Whether it carries out what it is asked to, and has come to an end with these."""
    return pool.submit(divmod, 7, 2).result(PATIENCE) == (3, 1) and not wait(kept, PATIENCE).not_done


def at_rest(pool: th.Executor) -> bool:
    """Whether no task is left anywhere, and whoever is there can be called."""
    inner = pool._pool
    slots = list(inner._slots.values())
    idle = sum(slot.ready and slot.task is None and slot.turn in inner._idle for slot in slots)
    return not inner._inbox and not inner._waiting and not inner._requests and idle == len(slots)


def submits(pool: th.Executor, kept: list[Any]) -> None:
    for number in range(3):
        kept.append(pool.submit(abs, -number))
    for future in kept:
        future.result(PATIENCE)


def cancels(pool: th.Executor, kept: list[Any]) -> None:
    kept.append(pool.submit(targets.add, 1, 2))
    kept.append(pool.submit(targets.add, 3, 4))
    for future in kept:
        future.add_done_callback(lambda _: None)
        future.cancel()


def asks(pool: th.Executor, kept: list[Any]) -> None:
    future = pool.submit(abs, -1)
    kept.append(future)
    future.add_done_callback(lambda _: None)
    repr(future), future.running(), future.done(), future.cancelled()
    future.exception(PATIENCE)
    future.add_done_callback(lambda _: None)


def waits(pool: th.Executor, kept: list[Any]) -> None:
    kept.append(pool.submit(abs, -1))
    assert not wait(kept, PATIENCE).not_done
    kept.append(pool.submit(abs, -2))
    assert len(list(concurrent.futures.as_completed(kept, PATIENCE))) == 2


def limits(pool: th.Executor, kept: list[Any]) -> None:
    kept.append(pool.with_timeout(PATIENCE).submit(abs, -1))
    kept += [pool.submit(abs, -2)]
    assert list(pool.map(abs, range(-2, 0))) == [2, 1]


STRESS = pytest.mark.stress


@pytest.mark.parametrize(
    ("do", "again"),
    [
        (submits, None), (cancels, None), (asks, None), (waits, None), (submits, 1), (cancels, 1),
        *[pytest.param(do, 1, marks=STRESS) for do in (asks, waits, limits)],
        *[pytest.param(do, 30, marks=STRESS) for do in (submits, cancels, asks, waits, limits)],
    ],
)  # fmt: skip
def test_an_interrupt_at_any_instruction_leaves_a_pool_that_works(do: Any, again: int | None) -> None:
    """Nothing that was submitted is lost, and nothing is stuck; also if a second one comes soon after."""
    called: list[Any] = []
    with th.Executor(1, cancel_timeout=0.05) as pool, Interrupts() as interrupts:
        do(pool, [])
        for first in itertools.count(1):
            kept: list[Any] = []
            marks = {first} if again is None else {first, first + again}
            if not interrupts.come(marks, functools.partial(do, pool, kept)):
                break
            for future in kept:
                future.add_done_callback(called.append)
            assert elsewhere(functools.partial(answers, pool, kept)), first
            until(functools.partial(at_rest, pool), f"rest after an interrupt at {first}")
            assert all(future in called for future in kept), first
        assert first > 100


@pytest.mark.parametrize("end", ["shutdown", "terminate_workers"])
def test_an_interrupt_at_any_instruction_leaves_a_pool_that_can_be_ended(end: str) -> None:
    """From its making, by way of its first task, which starts its thread, to its end."""
    pools: list[th.Executor] = []

    def live() -> None:
        pools.append(th.Executor(1, cancel_timeout=0.05))
        pools[-1].submit(abs, -1)
        getattr(pools[-1], end)()

    with Interrupts() as interrupts:
        for first in itertools.count(1):
            if not interrupts.come({first}, live):
                break
            while pools:
                elsewhere(pools[-1].shutdown)
                assert pools.pop().workers() == [], first
        assert first > 100


STORM = """
    import random, signal, sys, time
    import tractor_host as th

    def come(*_):
        # A second one comes while the first one is dealt with.
        if seconds and chance.random() < 0.5:
            signal.setitimer(signal.ITIMER_REAL, chance.random() * seconds.pop() + 1e-6)
        raise KeyboardInterrupt

    def once(pool):
        future = None
        try:
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.random() * 4e-4 + 1e-6)
                    future = pool.submit(divmod, 7, 2)
                    assert future.result(30) == (3, 1)
                    pool.submit(abs, -1).cancel()
                finally:
                    seconds.clear()
                    signal.setitimer(signal.ITIMER_REAL, 0)
            finally:
                if future is not None:
                    futures.append(future)
        except KeyboardInterrupt:
            return True
        return False

    if __name__ == "__main__":
        chance = random.Random(sys.argv[2])
        futures, seconds, count, number = [], [], 0, 0
        signal.signal(signal.SIGALRM, come)
        until = time.monotonic() + float(sys.argv[1])
        with th.Executor(2, cancel_timeout=0.05) as pool:
            while time.monotonic() < until:
                seconds[:] = [1e-4]
                count += once(pool)
                number += 1
            assert pool.submit(divmod, 7, 2).result(30) == (3, 1)
            assert all(future.result(30) == (3, 1) for future in futures)
        print(count >= number // 10 > 10, pool.workers(), len(futures) > 10)
"""


def test_a_storm_of_interrupts(program: Callable[..., Program]) -> None:
    seed = random.randrange(1 << 32)
    found = program(STORM).run("3", str(seed))
    assert (found.stdout, found.stderr) == ("True [] True\n", ""), f"seed {seed}"
