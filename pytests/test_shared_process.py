"""Several workers in one process, each in a subinterpreter of its own: who lives where, that each is ended by
itself, and what becomes of the others where that can't be."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import helpers
import targets
import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone


@pytest.fixture(params=["shared", "own"])
def gil(request: pytest.FixtureRequest) -> Any:
    return request.param


#: Sleeps, and hears of a cancellation.
IDLE = th.Source("import time\nwhile True: time.sleep(0.01)")


def lodge(target: Any, *args: object, process: str = "house", **options: Any) -> th.Worker:
    return th.spawn(target, *args, backend="subint_forkserver", process=process, **options)


def running(worker: th.Worker) -> th.Worker:
    helpers.until(lambda: worker.state == "running" or worker.exit is not None)
    assert worker.exit is None, worker.exit
    return worker


# -- who lives where ---------------------------------------------------------------------------------


def test_those_that_name_the_same_live_in_one_process(gil: str) -> None:
    where = th.Source("import os, _interpreters\n(os.getpid(), os.getppid(), _interpreters.get_current()[0])")
    with lodge(IDLE, gil=gil) as first, lodge(IDLE, process="other") as other:
        found = [lodge(where, gil=gil).result(timeout=PATIENCE) for _ in range(3)]
        assert {(pid, parent) for pid, parent, _ in found} == {(first.pid, os.getpid())}
        assert len({interpreter for *_, interpreter in found} | {0}) == 4
        assert other.pid not in (first.pid, os.getpid())
        assert [worker.id for worker in th.workers()] == [first.id, other.id]


def test_the_process_ends_with_the_last(gil: str) -> None:
    first, second = running(lodge(IDLE, gil=gil)), running(lodge(IDLE, gil=gil))
    pid = first.pid
    assert pid is not None
    first.kill()
    os.kill(pid, 0)  # it is there
    second.kill()
    # Not a moment later.
    assert pid_is_gone(pid, timeout=0.5)
    with lodge("os:getpid", gil=gil) as third:
        assert third.result(timeout=PATIENCE) != pid


def test_each_has_its_results_its_errors_and_its_output(gil: str) -> None:
    with lodge(IDLE):
        talking = th.Source("import sys; print('out', *args); print('err', file=sys.stderr); args[0]")
        talkers = [lodge(talking, index, gil=gil, stdio="pipe") for index in range(4)]
        assert [talker.result(timeout=PATIENCE) for talker in talkers] == [0, 1, 2, 3]
        assert [talker.stdout for talker in talkers] == [b"out %d\n" % index for index in range(4)]
        assert {talker.stderr for talker in talkers} == {b"err\n"}
        with pytest.raises(th.RemoteError, match="JSONDecodeError"):
            lodge("json:loads", "{", gil=gil).result(timeout=PATIENCE)
        assert lodge(th.Source("import sys; sys.exit(7)"), gil=gil).wait(timeout=PATIENCE).code == 7
        assert len(lodge("operator:mul", b"x", 3 << 20, gil=gil).result(timeout=PATIENCE)) == 3 << 20


def test_large_things_and_descriptors_go_along(gil: str) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"hello")
    look = th.Source("import os\n(len(args[0]), os.read(args[1].fileno(), 5), b'x' * (3 << 20))")
    with running(lodge(IDLE)):
        size, text, back = lodge(look, b"a" * (4 << 20), th.Fd(reading), gil=gil).result(timeout=PATIENCE)
    assert (size, text, len(back)) == (4 << 20, b"hello", 3 << 20)
    os.close(reading)
    os.close(writing)


def test_many_from_many_threads() -> None:
    def one(index: int) -> int:
        gil = ("shared", "own", "auto")[index % 3]
        return lodge("operator:neg", index, process=f"house {index % 5}", gil=gil).result(timeout=PATIENCE)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(96))) == [-index for index in range(96)]


def test_its_workers_are_shown_as_its_own() -> None:
    with lodge(targets.hang_in_a_chain, ["forkserver"], name="top") as top, lodge(IDLE):
        helpers.until(lambda: len(th.workers()) == 3 and th.workers()[2].state == "running")
        below = th.workers()[2]
        assert (below.name, below.parent) == ("deep-1", top.id)
        top.kill()
        # They end with it, and not with its process.
        helpers.until(lambda: below.exit is not None)


def test_a_worker_s_process_is_its_own() -> None:
    code = """
import os, tractor_host as th
a, b = (th.spawn("os:getpid", backend="subint_forkserver", process="house") for _ in range(2))
with th.spawn("time:sleep", 1000, backend="subint_forkserver", process="house") as keeper:
    pid = th.spawn("os:getpid", backend="subint_forkserver", process="house").result(30)
    assert pid == keeper.pid
a.result(30), b.result(30)
pid
"""
    with running(lodge(IDLE)) as ours:
        assert th.spawn(th.Source(code)).result(timeout=PATIENCE) != ours.pid


# -- each by itself ----------------------------------------------------------------------------------


def test_one_is_ended_and_the_others_live_on(gil: str) -> None:
    with running(lodge(IDLE)) as neighbour:
        for target in (targets.spin_and_swallow, targets.spin, targets.sleep):
            worker = running(lodge(target, gil=gil, cancel_timeout=0, stdio="null"))
            ended = worker.kill()
            assert ended.kind == "killed", ended
            assert ended.rung in ("interrupt", "unwind", "unblock"), ended
        assert neighbour.state == "running"


def test_cancellation_and_time_limits(gil: str) -> None:
    with running(lodge(IDLE)):
        slices = th.Source("import time\nwhile True: time.sleep(0.01)")
        asked = running(lodge(slices, gil=gil))
        asked.cancel()
        assert asked.wait(timeout=PATIENCE).kind == "cancelled"
        late = lodge(slices, gil=gil, timeout=0.3).wait(timeout=PATIENCE)
        assert late.kind == "cancelled"
        assert "ran longer than its timeout of 0.3 s" in late.cause


# -- what they share ---------------------------------------------------------------------------------


def test_a_crash_is_everybody_s(gil: str) -> None:
    with running(lodge(IDLE)) as neighbour:
        # In its own thread: one that is sent to the process may be another thread's, a moment later.
        crashing = lodge(th.Source("import signal; signal.raise_signal(signal.SIGSEGV)"), gil=gil)
        for worker in (crashing, neighbour):
            ended = worker.wait(timeout=PATIENCE)
            assert (ended.kind, ended.signal) == ("signalled", signal.SIGSEGV)
            assert "Segmentation fault" in ended.stderr


def test_one_that_cannot_be_ended_takes_the_others_along() -> None:
    """C code that never gives its GIL back."""
    hog = th.Source("sum(range(10**12))")
    with (
        running(lodge(IDLE)) as neighbour,
        lodge(hog, gil="own", cancel_timeout=0, kill_timeout=0.5) as worker,
    ):
        ended = running(worker).kill()
        assert (ended.kind, ended.rung) == ("killed", "sigkill"), ended
        other = neighbour.wait(timeout=PATIENCE)
        assert (other.kind, other.rung) == ("killed", "sigkill")
        assert f"killed with worker {worker.id}, which shared its process" in other.cause


def test_a_process_that_was_stopped_is_no_hiding_place() -> None:
    with running(lodge(IDLE, cancel_timeout=0)) as worker:
        os.kill(worker.pid or 0, signal.SIGSTOP)
        assert worker.kill().kind == "killed"


def test_the_end_of_the_program_ends_all(program: Callable[..., Program]) -> None:
    ended = program(
        """
        import tractor_host as th
        if __name__ == "__main__":
            workers = [th.spawn("time:sleep", 1000, backend="subint_forkserver", process=name, cancel_timeout=0.2)
                       for name in "aab"]
            for worker in workers:
                while worker.state != "running":
                    pass
            print(*(worker.pid for worker in workers))
        """
    ).run()
    assert ended.returncode == 0, ended.stderr
    pids = list(map(int, ended.stdout.split()))
    assert len(set(pids)) == 2
    assert all(pid_is_gone(pid, timeout=0.1) for pid in pids)


# -- what can't be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"backend": "forkserver", "process": "x"}, ValueError, "subint_forkserver"),
        ({"process": ""}, ValueError, "must not be empty"),
        ({"process": 1}, TypeError, "must be a str"),
        ({"process": "a\0b"}, ValueError, "NUL"),
        ({"process": "x", "cwd": "/"}, ValueError, "belong to a process"),
        ({"process": "x", "env": {}}, ValueError, "belong to a process"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        th.spawn("os:getpid", **{"backend": "subint_forkserver", **options})


def test_garbage_from_such_a_process_ends_it() -> None:
    code = """
import os, socket
for fd in range(3, 64):
    try:
        channel = socket.socket(fileno=os.dup(fd))
        channel.send(b"garbage")
    except OSError:
        continue
"""
    with running(lodge(IDLE)) as neighbour:
        worker = lodge(th.Source(code))
        for one in (worker, neighbour):
            ended = one.wait(timeout=PATIENCE)
            assert ended.kind in ("killed", "returned"), ended
        assert "broke the protocol" in neighbour.wait().cause
