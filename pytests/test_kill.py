"""Ending workers: every stuck shape is ended by the rung that it should take, within its bound; and
`cancel`, `kill`, `wait`, `result`, time limits and dropped handles do what they say."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone
from helpers import blocked, children_of, importable, kill_all, ready, thread_of, together, until
from tractor_host import _native, _worker

#: What `kill` may take beyond its budgets. Seconds.
MARGIN = 1.0
#: The bound on SIGKILL's rung, however short `kill_timeout` is. Seconds.
SIGKILL_BUDGET = 1.0
#: What ends a subinterpreter that does not stop when it is asked to.
FORCE = ("interrupt", "unwind", "unblock", "destroy")

Shape = Callable[..., Any]


def budgets(rung: str) -> dict[str, float]:
    """Time enough for the rung that is expected, and little for those before it."""
    match rung:
        case "cancel":
            return {"cancel_timeout": 20.0, "kill_timeout": 3.0}
        case "interrupt":
            return {"cancel_timeout": 0.2, "kill_timeout": 45.0}
        case "sigterm":
            return {"cancel_timeout": 0.1, "kill_timeout": 1.5}
        case _:
            return {"cancel_timeout": 0.1, "kill_timeout": 0.3}


def killed(worker: th.Worker) -> th.Exit:
    """Kills it, and holds the end against what else is known of it."""
    found = worker.kill()
    assert worker.state == "ended"
    assert found.elapsed is None or found.elapsed <= found.lifetime
    if worker.pid is not None:
        assert not Path(f"/proc/{worker.pid}").exists(), "reaped"
    return found


# -- the stuck shapes in processes -----------------------------------------------------------------------

#: Number in adversaries.md, shape, arguments, the rung that ends it in a process.
SHAPES: list[tuple[int, Shape, tuple[Any, ...], str]] = [
    (1, targets.spin, (), "cancel"),
    (2, targets.spin_and_swallow, (), "sigterm"),
    (3, targets.spin_in_finally, (), "interrupt"),
    (4, targets.sleep, (), "cancel"),
    (4, targets.sleep_and_swallow, (), "sigterm"),
    (5, targets.wait_for_event, (), "cancel"),
    (5, targets.wait_for_condition, (), "cancel"),
    (5, targets.get_from_queue, (), "cancel"),
    (5, targets.get_from_simple_queue, (), "cancel"),
    (6, targets.wait_again_and_again, (), "cancel"),
    (7, targets.lock_twice, (), "cancel"),
    (7, targets.lock_cycle, (), "interrupt"),
    (8, targets.join_spinning_thread, (True,), "cancel"),
    (8, targets.join_spinning_thread, (False,), "interrupt"),
    (8, targets.many_threads, (), "interrupt"),
    (9, targets.receive, (), "cancel"),
    (9, targets.accept, (), "cancel"),
    (9, targets.use_select, (), "cancel"),
    (9, targets.use_poll, (), "cancel"),
    (9, targets.use_epoll, (), "cancel"),
    (10, targets.read_empty_pipe, (), "cancel"),
    (10, targets.write_full_pipe, (), "cancel"),
    (11, targets.run_subprocess, (), "cancel"),
    (11, targets.wait_for_child, (), "cancel"),
    (13, targets.hog_in_c, (), "sigterm"),
    # It looks at signals, but asking it to stop needs the GIL.
    (13, targets.backtrack, (), "interrupt"),
    (14, targets.hash_for_ever, (), "sigterm"),
    (15, targets.ignore_signals, (), "sigkill"),
    (15, targets.block_signals, (), "sigkill"),
    (16, targets.stop_itself, (), "cancel"),
    (16, targets.ignore_and_stop_itself, (), "sigkill"),
    (17, targets.fork_many, (50,), "cancel"),
]


def shape_id(shape: tuple[int, Shape, tuple[Any, ...], str]) -> str:
    number, target, args, _ = shape
    return "-".join([str(number), target.__name__, *map(str, args)])


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_a_stuck_process_is_ended_by_the_rung_that_it_takes(
    signalled_backend: str, shape: tuple[int, Shape, tuple[Any, ...], str]
) -> None:
    _, target, args, rung = shape
    limits = budgets(rung)
    worker = ready(th.spawn(target, *args, backend=signalled_backend, stdio="pipe", **limits))
    if target is targets.stop_itself:
        until(lambda: "State:\tT" in Path(f"/proc/{worker.pid}/status").read_text(), "a stopped process")
    found = killed(worker)
    assert (found.rung, found.kind) == (rung, "cancelled" if rung == "cancel" else "killed")
    assert found.signal == {"sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}.get(rung)
    how = "killed, stopped when cancelled" if rung == "cancel" else f"killed, ended at `{rung}`"
    assert found.cause.startswith(how)
    for pid in children_of(worker):
        assert pid_is_gone(pid), "what it started went with it"
    assert found.elapsed is not None
    bound = limits["cancel_timeout"] + max(
        limits["kill_timeout"], limits["kill_timeout"] / 3 * 2 + SIGKILL_BUDGET
    )
    assert found.elapsed < bound + MARGIN
    with pytest.raises(th.WorkerCancelled if rung == "cancel" else th.WorkerKilled):
        worker.result()


@pytest.mark.parametrize(
    ("runtime", "target", "rung"),
    [
        ("trio", targets.trio_sleep, "cancel"),
        ("trio", targets.trio_shielded, "interrupt"),
        ("trio", targets.spin_soon, "interrupt"),
        ("asyncio", targets.asyncio_sleep, "cancel"),
        ("asyncio", targets.asyncio_swallow, "sigterm"),
    ],
)
def test_a_stuck_loop_in_a_process_is_ended_by_the_rung_that_it_takes(
    signalled_backend: str, runtime: Any, target: Shape, rung: str
) -> None:
    worker = th.spawn(target, backend=signalled_backend, runtime=runtime, stdio="pipe", **budgets(rung))
    found = killed(ready(worker))
    assert (found.rung, found.kind) == (rung, "cancelled" if rung == "cancel" else "killed")


# -- the stuck shapes in subinterpreters -------------------------------------------------------------------


@pytest.mark.parametrize("gil", ["shared", "own"])
@pytest.mark.parametrize(
    ("target", "args"),
    [
        (targets.spin, ()),
        (targets.wait_again_and_again, ()),
        (targets.sleep_then_clean_up, ()),
        (targets.trio_sleep, ()),
        (targets.asyncio_sleep, ()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_subinterpreter_that_can_be_cancelled_is(gil: Any, target: Shape, args: tuple[Any, ...]) -> None:
    runtime: Any = {"trio_sleep": "trio", "asyncio_sleep": "asyncio"}.get(target.__name__)
    worker = th.spawn(
        target, *args, backend="subint", gil=gil, runtime=runtime, stdio="pipe", **budgets("cancel")
    )
    found = killed(ready(worker))
    assert (found.kind, found.rung, found.signal, found.code) == ("cancelled", "cancel", None, None)


@pytest.mark.parametrize("gil", ["shared", "own"])
@pytest.mark.parametrize(
    ("target", "args"),
    [
        (targets.spin_in_finally, ()),
        (targets.join_spinning_thread, (True,)),
        (targets.join_spinning_thread, (False,)),
    ],
    ids=["3-spin_in_finally", "8-join-daemon", "8-join"],
)
def test_a_subinterpreter_that_runs_python_is_interrupted(
    gil: Any, target: Shape, args: tuple[Any, ...]
) -> None:
    worker = th.spawn(target, *args, backend="subint", gil=gil, stdio="pipe", **budgets("interrupt"))
    found = killed(ready(worker))
    # One that is asked just before it begins to join still listens.
    assert (found.kind, found.rung) == ("cancelled", "cancel") or (
        found.kind == "killed" and found.rung in FORCE
    )


#: Subinterpreters that can or can not be ended, by version: each in a program of its own, which must
#: end in any case, and tell the truth.
STUCK = """
import json, sys, time, threading
import targets, helpers, tractor_host as th
name, gil, runtime = sys.argv[1:4]
worker = th.spawn(getattr(targets, name), backend="subint", gil=gil, runtime=runtime or None,
                  stdio="pipe", cancel_timeout=0.1, kill_timeout=0.5)
helpers.ready(worker)
if name not in ("spin_and_swallow", "sleep_and_swallow", "hash_for_ever"):
    helpers.blocked(helpers.thread_of(worker))
start = time.monotonic()
found = worker.kill()
took = time.monotonic() - start
error = None
try:
    worker.result()
except th.WorkerError as caught:
    error = type(caught).__name__
counts = th.statistics()
print(json.dumps([found.kind, found.rung, found.cause, took, error, counts.quarantined, counts.live]), flush=True)
"""

BLOCKED = [
    (2, targets.spin_and_swallow),
    (4, targets.sleep),
    (4, targets.sleep_and_swallow),
    (5, targets.wait_for_event),
    (5, targets.wait_for_condition),
    (5, targets.get_from_queue),
    (5, targets.get_from_simple_queue),
    (7, targets.lock_twice),
    (7, targets.lock_cycle),
    (8, targets.many_threads),
    (9, targets.receive),
    (9, targets.accept),
    (9, targets.use_select),
    (9, targets.use_poll),
    (9, targets.use_epoll),
    (10, targets.read_empty_pipe),
    (10, targets.write_full_pipe),
    (11, targets.run_subprocess),
    (11, targets.wait_for_child),
    (12, targets.trio_shielded),
    (12, targets.asyncio_swallow),
    (14, targets.hash_for_ever),
]


# Each with one of the two GILs: test_ladder.py has all with both, in one process.
@pytest.mark.parametrize(
    ("number", "target", "gil"),
    [(number, target, ("shared", "own")[index % 2]) for index, (number, target) in enumerate(BLOCKED)],
    ids=[f"{number}-{target.__name__}" for number, target in BLOCKED],
)
def test_a_blocked_subinterpreter_is_ended_or_abandoned_and_its_program_ends(
    number: int, target: Shape, gil: str, program: Callable[..., Program]
) -> None:
    name = target.__name__
    runtime = name.partition("_")[0] if name.startswith(("trio", "asyncio")) else ""
    start = time.monotonic()
    ended = program(STUCK).run(name, gil, runtime, env=importable(), timeout=20)
    took_all = time.monotonic() - start
    assert ended.returncode == 0, ended.stderr
    kind, rung, cause, took, error, quarantined, live = json.loads(ended.stdout.splitlines()[-1])
    assert took < 0.6 + MARGIN
    assert live == 0
    if kind == "abandoned":
        assert (rung, error, quarantined) == ("abandoned", "WorkerAbandoned", 1)
        assert cause.startswith("killed, and still there after `")
        (line, *more) = ended.stderr.splitlines()
        assert line == f"tractor-host: worker `{name}-1` (subint) could not be ended and is abandoned"
        assert all(text.startswith("tractor-host: ") for text in more), ended.stderr
    else:
        assert number != 14, "nothing ends that"
        assert (kind, error, quarantined) == ("killed", "WorkerKilled", 0)
        assert rung in FORCE
        assert ended.stderr == ""
    assert took_all < 10


def test_an_abandoned_worker_that_ends_after_all_is_reclaimed(program: Callable[..., Program]) -> None:
    found = program(
        """
        import helpers, tractor_host as th
        worker = helpers.stuck_for_a_while(name="busy")
        found = worker.kill()
        print(found.kind, found.rung, th.statistics().quarantined)
        helpers.until(lambda: th.statistics().reclaimed, "the end of an abandoned worker")
        print(th.statistics().quarantined, th.statistics().abandoned, worker.wait().kind)
        """
    ).run(env=importable())
    assert found.returncode == 0, found.stderr
    assert found.stdout == "abandoned abandoned 1\n0 1 abandoned\n"
    assert found.stderr == (
        "tractor-host: worker `busy` (subint) could not be ended and is abandoned\n"
        "tractor-host: worker `busy` has ended after all\n"
    )


def test_a_target_that_had_to_be_abandoned_is_promoted_to_a_process(program: Callable[..., Program]) -> None:
    found = program(
        """
        import helpers, targets, tractor_host as th
        limits = dict(stdio="pipe", cancel_timeout=0.05, kill_timeout=0.05)
        first = th.spawn(targets.hash_for_ever, backend="subint", promote=True, **limits)
        print(first.backend, helpers.ready(first).kill().kind)
        with th.spawn(targets.hash_for_ever, backend="subint", **limits) as same:
            print(same.backend)
        with th.spawn(targets.nothing, backend="subint", promote=True, **limits) as other:
            print(other.backend)
        second = th.spawn(targets.hash_for_ever, backend="subint", promote=True, **limits)
        print(second.backend, second.pid is not None, helpers.ready(second).kill().kind)
        """
    ).run(env=importable(), timeout=20)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "subint abandoned\nsubint\nsubint\nfork True killed\n"


# -- cancel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "runtime"),
    [
        (targets.sleep_then_clean_up, "sync"),
        (targets.trio_clean_up, "trio"),
        (targets.asyncio_clean_up, "asyncio"),
    ],
)
def test_a_cancelled_target_cleans_up(backend: str, target: Shape, runtime: Any) -> None:
    worker = ready(th.spawn(target, backend=backend, runtime=runtime, stdio="pipe"))
    worker.cancel()
    found = worker.wait(timeout=PATIENCE)
    assert worker.stdout.decode().split("\n") == ["ready", "cancelled", "cleaned up", ""]
    assert (found.kind, found.rung, found.signal) == ("cancelled", "cancel", None)
    assert found.cause == "cancelled"
    assert found.code == (None if backend == "subint" else 0)
    with pytest.raises(th.WorkerCancelled, match="cancelled") as caught:
        worker.result()
    assert caught.value.exit == found
    assert isinstance(caught.value, th.WorkerKilled)


def test_cancel_does_not_wait(backend: str) -> None:
    with th.spawn(targets.spin_in_finally, backend=backend, stdio="pipe", **budgets("interrupt")) as worker:
        ready(worker)
        worker.cancel()
        ready(worker, "cleaning up")
        assert worker.state == "cancelling"
        assert worker.exit is None


def test_a_target_may_return_when_it_is_cancelled(backend: str) -> None:
    worker = ready(th.spawn(targets.return_when_cancelled, 42, backend=backend, stdio="pipe"))
    worker.cancel()
    assert worker.result(timeout=PATIENCE) == 42
    assert worker.wait().kind == "returned"


def test_what_a_target_raises_when_it_is_cancelled_comes_back(backend: str) -> None:
    code = """
    import time, tractor_host
    print("ready", flush=True)
    try:
        while True: time.sleep(0.01)
    except tractor_host.Cancelled:
        raise ValueError("in cleanup")
    """
    worker = ready(th.spawn(_source(code), backend=backend, stdio="pipe"))
    worker.cancel()
    with pytest.raises(th.RemoteError) as caught:
        worker.result(timeout=PATIENCE)
    assert repr(caught.value.__cause__) == "ValueError('in cleanup')"
    assert isinstance(caught.value.__cause__.__context__, th.Cancelled)


def test_cancelled_is_no_exception_that_a_target_catches_by_accident(backend: str) -> None:
    code = """
    import time
    print("ready", flush=True)
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass
    """
    worker = ready(th.spawn(_source(code), backend=backend, stdio="pipe"))
    worker.cancel()
    assert worker.wait(timeout=PATIENCE).kind == "cancelled"


def test_a_target_that_raises_cancelled_by_itself_was_not_cancelled(backend: str) -> None:
    worker = th.spawn(th.Source("import tractor_host; raise tractor_host.Cancelled('mine')"), backend=backend)
    found = worker.wait(timeout=PATIENCE)
    assert (found.kind, found.cause) == ("raised", "raised Cancelled: mine")
    with pytest.raises(th.RemoteError) as caught:
        worker.result()
    assert isinstance(caught.value.__cause__, th.Cancelled)


def test_a_worker_can_be_cancelled_before_it_has_started(backend: str) -> None:
    for _ in range(5):
        worker = th.spawn(targets.sleep_then_clean_up, backend=backend, stdio="pipe")
        worker.cancel()
        found = worker.wait(timeout=PATIENCE)
        assert (found.kind, found.rung) == ("cancelled", "cancel")
        written = worker.stdout.decode()
        # Its target did not begin, or it was told properly.
        assert "ready" not in written or written.endswith("cleaned up\n")


@pytest.mark.parametrize("runtime", ["trio", "asyncio"])
def test_a_loop_can_be_cancelled_before_it_has_started(backend: str, runtime: Any) -> None:
    target = targets.trio_sleep if runtime == "trio" else targets.asyncio_sleep
    for _ in range(3):
        worker = th.spawn(target, backend=backend, runtime=runtime, stdio="null")
        worker.cancel()
        found = worker.wait(timeout=PATIENCE)
        assert (found.kind, found.rung) == ("cancelled", "cancel")


def test_a_worker_that_was_cancelled_twice_is_told_once(backend: str) -> None:
    worker = ready(th.spawn(targets.count_cancellations, backend=backend, stdio="pipe"))
    for _ in range(10):
        worker.cancel()
    assert worker.result(timeout=PATIENCE) == 1


def test_a_worker_that_was_cancelled_can_still_be_killed(backend: str) -> None:
    worker = th.spawn(targets.spin_in_finally, backend=backend, stdio="pipe", **budgets("interrupt"))
    ready(worker)
    worker.cancel()
    ready(worker, "cleaning up")
    found = killed(worker)
    assert found.kind == "killed"
    assert found.rung in FORCE


def test_cancelling_a_worker_that_has_ended_changes_nothing(backend: str) -> None:
    worker = th.spawn(targets.add, 1, 2, backend=backend)
    found = worker.wait(timeout=PATIENCE)
    worker.cancel()
    assert worker.kill() is not None
    assert worker.wait() == found
    assert worker.result() == 3


def test_a_cancellation_while_an_exception_is_reported_loses_nothing(backend: str) -> None:
    """It comes when the target is over: too late to change what happened."""
    worker = ready(th.spawn(targets.raise_slow_to_pickle, backend=backend, stdio="pipe"), "reporting")
    worker.cancel()
    found = worker.wait(timeout=PATIENCE)
    assert found.kind in ("raised", "cancelled"), found
    if found.kind == "raised":
        assert found.cause == "raised SlowToPickle"


def test_cancelling_at_any_moment_gives_an_honest_end(backend: str) -> None:
    """From before its birth to after its death: it returned its value, or was cancelled."""
    ends = set()
    for step in range(20):
        worker = th.spawn(targets.add, 1, 2, backend=backend)
        until_time = time.monotonic() + step * 0.002
        while time.monotonic() < until_time:
            pass
        worker.cancel()
        found = worker.wait(timeout=PATIENCE)
        ends.add(found.kind)
        assert found.kind in ("returned", "cancelled"), found
        if found.kind == "returned":
            assert worker.result() == 3
    assert ends


def test_cancelling_trio_at_any_moment_gives_an_honest_end(backend: str) -> None:
    for step in range(8):
        worker = th.spawn(targets.add_soon, 1, 2, backend=backend, runtime="trio")
        until_time = time.monotonic() + step * (0.04 if backend == "subint" else 0.02)
        while time.monotonic() < until_time:
            time.sleep(0.001)
        worker.cancel()
        assert worker.wait(timeout=PATIENCE).kind in ("returned", "cancelled"), worker.exit


# -- kill ---------------------------------------------------------------------------------------------------------


def test_killing_at_any_moment_ends_it(backend: str) -> None:
    """Also while it boots: then it is not asked first, and nobody waits for a time limit."""
    for step in range(15):
        worker = th.spawn(targets.spin, backend=backend, stdio="null")
        until_time = time.monotonic() + step * 0.004
        while time.monotonic() < until_time:
            pass
        found = killed(worker)
        assert found.kind in ("killed", "cancelled"), found
        assert found.elapsed is not None
        assert found.elapsed < 2, found


def test_a_worker_that_is_seen_to_run_is_asked_first(backend: str) -> None:
    """Whatever the supervisor is busy with when it is told to kill."""
    stop = threading.Event()

    def keep_supervisor_busy() -> None:
        while not stop.is_set():
            th.spawn(targets.nothing, backend="exec", stdio="null").wait(timeout=PATIENCE)

    thread = threading.Thread(target=keep_supervisor_busy)
    thread.start()
    try:
        for _ in range(15):
            worker = th.spawn(targets.spin, backend=backend, stdio="pipe")
            # Not `ready`: what it wrote is enough for a user to know that it runs.
            until(lambda worker=worker: b"ready" in worker.stdout, "its first words")
            assert killed(worker).rung == "cancel"
    finally:
        stop.set()
        thread.join()


def test_kill_can_be_called_again(backend: str) -> None:
    worker = ready(th.spawn(targets.spin, backend=backend, stdio="pipe"))
    assert worker.kill() == worker.kill() == worker.wait()


def test_kill_and_wait_from_many_threads_at_once(backend: str) -> None:
    worker = ready(th.spawn(targets.spin, backend=backend, stdio="pipe"))
    ends: list[th.Exit] = []
    threads = [
        threading.Thread(target=lambda call=call: ends.append(call()))
        for call in [worker.wait, worker.kill, worker.wait, worker.kill]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [found.kind for found in ends] == ["cancelled"] * 4
    assert len(set(ends)) == 1


def test_wait_from_two_threads(backend: str) -> None:
    with th.spawn(targets.spin, backend=backend, stdio="pipe") as worker:
        ready(worker)
        ends: list[th.Exit] = []
        threads = [threading.Thread(target=lambda: ends.append(worker.wait())) for _ in range(2)]
        for thread in threads:
            thread.start()
        worker.cancel()
        for thread in threads:
            thread.join(PATIENCE)
    assert [found.kind for found in ends] == ["cancelled"] * 2


def test_wait_has_a_bound_and_leaves_the_worker_alone(backend: str) -> None:
    with th.spawn(targets.spin, backend=backend, stdio="pipe", name="busy") as worker:
        ready(worker)
        for bound in (0, 0.01, 0.2):
            start = time.monotonic()
            with pytest.raises(
                TimeoutError, match=f"worker 'busy' has not ended within {bound} s; it runs on"
            ):
                worker.wait(bound)
            with pytest.raises(TimeoutError):
                worker.result(timeout=bound)
            assert 2 * bound <= time.monotonic() - start < 2 * bound + MARGIN
        assert worker.state == "running"


def test_the_result_of_a_killed_worker_says_so(backend: str) -> None:
    worker = th.spawn(targets.spin_in_finally, backend=backend, stdio="pipe", **budgets("interrupt"))
    killed(ready(worker))
    with pytest.raises(th.WorkerKilled, match="killed, ended at") as caught:
        worker.result()
    assert type(caught.value) is th.WorkerKilled
    assert caught.value.exit == worker.exit


def test_a_time_limit_kills_and_is_named(backend: str) -> None:
    worker = th.spawn(targets.spin, backend=backend, stdio="null", timeout=0.4)
    found = worker.wait(timeout=PATIENCE)
    assert found.kind == "cancelled"
    assert found.cause == "ran longer than its timeout of 0.4 s, stopped when cancelled"
    assert 0.4 <= found.lifetime < 0.4 + MARGIN
    with pytest.raises(th.WorkerCancelled, match="timeout of 0.4 s"):
        worker.result()


def test_a_time_limit_kills_what_does_not_stop(signalled_backend: str) -> None:
    worker = th.spawn(
        targets.spin_and_swallow, backend=signalled_backend, stdio="null", timeout=0.4, **budgets("sigterm")
    )
    found = worker.wait(timeout=PATIENCE)
    assert (found.kind, found.rung) == ("killed", "sigterm")
    assert found.cause.startswith("ran longer than its timeout of 0.4 s, ended at `sigterm`")


def test_a_time_limit_that_is_not_reached_does_nothing(backend: str) -> None:
    assert th.spawn(targets.add, 1, 2, backend=backend, timeout=1e9).result(timeout=PATIENCE) == 3
    assert th.spawn(targets.add, 1, 2, backend=backend, timeout=float("inf")).result(timeout=PATIENCE) == 3


def test_a_time_limit_of_zero_ends_it_at_once(backend: str) -> None:
    worker = th.spawn(targets.spin, backend=backend, stdio="null", timeout=0)
    found = worker.wait(timeout=PATIENCE)
    assert found.kind in ("killed", "cancelled")
    assert "timeout of 0 s" in found.cause
    assert found.lifetime < 2


def test_a_budget_of_zero_leaves_the_first_rung_out(backend: str) -> None:
    worker = th.spawn(
        targets.sleep_then_clean_up, backend=backend, stdio="pipe", cancel_timeout=0, kill_timeout=45
    )
    found = killed(ready(worker))
    assert found.kind == "killed"
    assert found.rung in FORCE
    assert b"cancelled" not in worker.stdout


def test_budgets_of_zero_leave_sigkill(process_backend: str) -> None:
    worker = th.spawn(targets.spin, backend=process_backend, stdio="pipe", cancel_timeout=0, kill_timeout=0)
    found = killed(ready(worker))
    assert (found.kind, found.rung, found.signal) == ("killed", "sigkill", signal.SIGKILL)


def test_budgets_of_zero_for_a_subinterpreter_are_honest(program: Callable[..., Program]) -> None:
    """There is no rung left, so all that can be said is that it is still there."""
    found = program(
        """
        import helpers, targets, tractor_host as th
        worker = th.spawn(targets.spin, backend="subint", stdio="pipe", cancel_timeout=0, kill_timeout=0)
        found = helpers.ready(worker).kill()
        assert found.kind in ("abandoned", "killed"), found
        """
    ).run(env=importable(), timeout=20)
    assert found.returncode == 0, found.stderr


def test_fifty_workers_are_killed_at_once_in_the_time_of_one(backend: str) -> None:
    # Those that spin take turns with all others in a subinterpreter, which is not what is tested here.
    apart = backend in ("subint", "subint_forkserver")
    stubborn = targets.sleep_and_swallow if apart else targets.ignore_signals
    with together() as spawn:
        gentle = [spawn(targets.sleep_then_clean_up, backend=backend, stdio="pipe") for _ in range(40)]
        limits = budgets("interrupt" if apart else "sigkill")
        others = [spawn(stubborn, backend=backend, stdio="pipe", **limits) for _ in range(10)]
        for worker in gentle + others:
            ready(worker)
        start = time.monotonic()
        ends = kill_all(gentle + others)
        took = time.monotonic() - start
    assert {found.kind for found in ends[:40]} == {"cancelled"}
    assert {found.kind for found in ends[40:]} == {"killed"}
    assert took < 3.0 + MARGIN


def test_a_hundred_interpreters_are_killed_at_once(program: Callable[..., Program]) -> None:
    """CPython's own locks have many waiters then, none of which may be told that its time is over."""
    found = program(
        """
        import time
        from collections import Counter
        import tractor_host as th
        from tractor_host import _native

        for _ in range(3):
            workers = [
                th.spawn(time.sleep, 1000, backend="subint", gil="own", cancel_timeout=0, kill_timeout=60)
                for _ in range(100)
            ]
            while any(worker.state == "booting" for worker in workers):
                time.sleep(0.001)
            for worker in workers:
                _native.kill(worker.id)
            print(Counter(worker.wait().kind for worker in workers))
        """
    ).run(timeout=100)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "Counter({'killed': 100})\n" * 3


def test_what_is_in_the_worker_s_process_group_dies_with_it(signalled_backend: str) -> None:
    for swallow, rung in [(False, "cancel"), (True, "sigterm")]:
        worker = th.spawn(
            targets.grandchildren, swallow, backend=signalled_backend, stdio="pipe", **budgets(rung)
        )
        ready(worker)
        until(lambda worker=worker: len(children_of(worker)) == 2, "the grandchild")
        assert killed(worker).rung == rung


def test_what_a_worker_that_returned_left_in_its_process_group_dies_with_it(process_backend: str) -> None:
    code = th.Source("import subprocess; subprocess.Popen(['sleep', '1000']).pid")
    worker = th.spawn(code, backend=process_backend, stdio="null")
    assert pid_is_gone(worker.result(timeout=PATIENCE))


@pytest.mark.parametrize(
    ("then", "rung"), [("return", None), ("sleep", "cancel"), ("swallow", "sigterm"), ("ignore", "sigkill")]
)
def test_no_descendant_outlives_its_worker_wherever_it_went(
    signalled_backend: str, then: str, rung: str | None
) -> None:
    """Its session, its group and its parent are its own, and it is deaf."""
    limits = budgets(rung) if rung is not None else {}
    worker = th.spawn(targets.daemons, then, backend=signalled_backend, stdio="pipe", **limits)
    until(lambda: len(children_of(worker)) == 2, "the daemons")
    if rung is None:
        assert worker.wait(timeout=PATIENCE).kind == "returned"
    else:
        assert killed(worker).rung == rung
    assert all(pid_is_gone(pid, timeout=3.0) for pid in children_of(worker))


@pytest.mark.parametrize("rung", ["cancel", "sigterm", "sigkill"])
def test_a_tree_that_grows_while_it_is_killed_ends(signalled_backend: str, rung: str) -> None:
    name = f"{rung[:4]}{next(_COUNTER)}-{os.getpid()}"[:12]
    ladder = {"cancel": 5.0, "sigkill": 5.0} if rung == "cancel" else {rung: 5.0, "sigkill": 1.0}
    if rung == "sigkill":
        ladder = {"sigkill": 5.0}
    worker = th.spawn(
        targets.grow, 200, "sleep", backend=signalled_backend, stdio="pipe", name=name, ladder=ladder
    )
    ready(worker)
    until(lambda: len(named(f"th:{name}")) > 20, "some of them")
    assert worker.kill().rung == rung
    until(lambda: not named(f"th:{name}"), "the end of all of them", timeout=3.0)


_COUNTER = itertools.count()


def named(name: str) -> list[int]:
    """The processes of that name that have not ended; forks have their parent's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:  # it ended just now
            continue
        if stat[stat.index("(") + 1 : stat.rindex(")")] == name and ") Z" not in stat:
            found.append(int(folder.name))
    return found


def test_a_process_that_was_stopped_from_outside_is_ended_and_cleans_up(process_backend: str) -> None:
    worker = th.spawn(
        targets.sleep_then_clean_up, backend=process_backend, stdio="pipe", **budgets("interrupt")
    )
    pid = ready(worker).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    until(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text(), "a stopped process")
    found = killed(worker)
    assert (found.kind, found.rung) in [("cancelled", "cancel"), ("killed", "interrupt")]
    assert worker.stdout.endswith(b"cleaned up\n")


def test_an_interrupt_and_a_cancellation_at_once_do_not_cut_a_clean_up_short(signalled_backend: str) -> None:
    worker = th.spawn(targets.clean_up_after_both, backend=signalled_backend, stdio="pipe")
    pid = ready(worker).pid
    assert pid is not None
    worker.cancel()
    os.kill(pid, signal.SIGINT)
    found = worker.wait(timeout=PATIENCE)
    assert worker.stdout == b"ready\ncleaned up\n", found
    assert (found.kind, found.cause) == ("raised", "raised KeyboardInterrupt")


@pytest.mark.parametrize("how", ["returns", "exits", "dies"])
def test_a_worker_that_ends_by_itself_while_it_is_being_killed(process_backend: str, how: str) -> None:
    """Both happen within the same moment, over and over: whoever came first, the end fits together."""
    target: dict[str, tuple[Any, ...]] = {
        "returns": (targets.give, 42),
        "exits": (targets.exit_now, 7),
        "dies": (targets.kill_itself, signal.SIGKILL),
    }
    for step in range(15):
        worker = th.spawn(*target[how], backend=process_backend, stdio="null", cancel_timeout=1)
        until_time = time.monotonic() + step * (0.003 if process_backend == "exec" else 0.0007)
        while time.monotonic() < until_time:
            pass
        found = killed(worker)
        allowed = {"returns": "returned", "exits": "exited", "dies": "signalled"}[how]
        assert found.kind in (allowed, "killed", "cancelled"), found
        if found.kind == "returned":
            assert worker.result() == 42
        if found.kind == "exited":
            assert found.code == 7, found


def test_a_subinterpreter_that_ends_by_itself_while_it_is_being_killed() -> None:
    for step in range(15):
        worker = th.spawn(targets.give, 42, backend="subint", cancel_timeout=1)
        until_time = time.monotonic() + step * 0.002
        while time.monotonic() < until_time:
            pass
        found = killed(worker)
        assert found.kind in ("returned", "killed", "cancelled"), found


# -- handles that are dropped ----------------------------------------------------------------------------------------


def test_a_handle_can_outlive_the_names_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the interpreter's end, where they are set to None."""
    failures: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    worker = th.spawn("time:sleep", 0)
    worker.wait(timeout=PATIENCE)
    number = worker.id
    for name in ("os", "_native", "warnings"):
        monkeypatch.setattr(_worker, name, None)
    del worker
    monkeypatch.undo()
    assert not failures
    with pytest.raises(LookupError):
        _native.exit(number)


def test_a_dropped_worker_warns_and_runs_on_and_is_reaped(backend: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    code = th.Source("open(args[0]).read()")
    worker = th.spawn(code, str(gate), backend=backend, name="dropped", stdio="null")
    pid, number = worker.pid, worker.id
    with pytest.warns(ResourceWarning, match="worker 'dropped' is still running and nobody waits for it"):
        del worker
        gc.collect()
    (known,) = th.workers()
    assert (known.id, known.name, known.pid) == (number, "dropped", pid)
    # Opening it for writing waits until it is open for reading: the worker is there, and running.
    with open(gate, "w"):
        assert known.exit is None
    assert known.wait(timeout=PATIENCE).kind == "returned"
    assert th.workers() == []
    if pid is not None:
        assert not Path(f"/proc/{pid}").exists()


def test_a_dropped_worker_that_ends_leaves_nothing(backend: str) -> None:
    before = th.statistics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.spawn(targets.nothing, backend=backend)
        gc.collect()
        until(lambda: th.statistics().returned == before.returned + 1, "the end of a dropped worker")
    assert th.workers() == []


def test_dropping_a_worker_that_has_ended_does_not_warn(backend: str) -> None:
    worker = th.spawn(targets.nothing, backend=backend)
    worker.wait(timeout=PATIENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del worker
        gc.collect()


def _source(code: str) -> th.Source:
    return th.Source(textwrap.dedent(code))


def test_a_blocked_subinterpreter_wakes_to_its_cancellation() -> None:
    """Its thread is in a wait of one second at a time: the cancellation is there when that is over."""
    worker = ready(th.spawn(targets.wait_again_and_again, backend="subint", stdio="pipe"))
    blocked(thread_of(worker))
    found = killed(worker)
    assert (found.kind, found.rung) == ("cancelled", "cancel")
