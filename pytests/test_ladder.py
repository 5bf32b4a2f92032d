"""The kill ladder of subinterpreters: every shape of stuck code really ends, under either GIL.

The autouse leak check is half of each of these tests: the thread, the interpreter, its fds and its
child processes are gone afterwards.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from collections.abc import Callable

import pytest

import helpers
import targets
import tractor_host as th
from conftest import Program
from tractor_host import testing

CASES = [
    (name, variant)
    for name, shape in testing.SHAPES.items()
    if shape.can_be_ended
    for variant in shape.variants
]
#: Rungs after `cancel`, in order.
RUNGS = ("interrupt", "unwind", "unblock", "destroy")


@pytest.fixture(params=["shared", "own"])
def gil(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spawn_stuck(name: str, variant: str, **options: object) -> th.Worker:
    worker = th.spawn(
        "tractor_host.testing:stuck",
        name,
        variant,
        stdio="pipe",
        **{"backend": "subint", **options},  # type: ignore[arg-type]
    )
    testing.wait_ready(worker)
    return worker


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{name}-{variant}" for name, variant in CASES])
def test_stuck_code_ends_and_leaves_nothing(name: str, variant: str, gil: str) -> None:
    worker = spawn_stuck(name, variant, gil=gil, cancel_timeout=0, kill_timeout=10)
    found = worker.kill()
    if name in ("finaliser-loop", "finaliser-sleep", "atexit-loop"):
        # The target itself returns, if it gets there; only its interpreter will not go.
        assert found.kind in ("returned", "killed"), found
    else:
        assert found.kind == "killed", found
        assert found.rung in RUNGS, found
    assert found.elapsed is not None
    assert found.elapsed < 5, found
    # The end itself says nothing; a program that is interrupted over and over may warn of itself, and that
    # names what it was interrupted by.
    assert not re.search(rb"^SystemExit\b.*\n(?!\nDuring handling)", worker.stderr, re.MULTILINE)
    assert b"Exception ignored" not in worker.stderr


def test_cancel_is_enough_for_code_that_listens(gil: str) -> None:
    worker = spawn_stuck("spin", "plain", gil=gil)
    found = worker.kill()
    assert (found.kind, found.rung) == ("cancelled", "cancel")


def test_nothing_of_it_stays_in_the_process(gil: str) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    caught = sigcgt()
    spawn_stuck("sleep", "threads", gil=gil, cancel_timeout=0).kill()
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    # Who presses gives its signal back a moment after the worker's end has been told.
    helpers.until_same(sigcgt, caught)


def sigcgt() -> str:
    """The signals that this process has handlers for, as the kernel knows them."""
    with open("/proc/self/status") as status:
        return next(line for line in status if line.startswith("SigCgt"))


# -- a ladder of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ladder", "rungs"),
    [
        ("spin", {"interrupt": 30}, {"interrupt"}),
        ("spin", {"cancel": 30, "unwind": 1}, {"cancel"}),
        ("swallow", {"unwind": 30}, {"unwind"}),
        # It can be on its way into the loop that swallows all.
        ("swallow", {"cancel": 0, "interrupt": 0.001, "unwind": 30}, {"interrupt", "unwind"}),
        ("sleep", {"unblock": 30}, {"unblock"}),
        # Pressed so hard it may be stopped before its interpreter's end has begun.
        ("finaliser-loop", {"destroy": 30}, {"unblock", "destroy", None}),
    ],
)
def test_a_ladder_can_be_replaced(
    name: str, ladder: dict[str, float], rungs: set[str | None], gil: str
) -> None:
    worker = spawn_stuck(name, "plain", gil=gil, ladder=ladder)
    assert worker.ladder == ladder
    found = worker.kill()
    assert found.rung in rungs, found
    assert found.elapsed is not None
    assert found.elapsed < 10


@pytest.mark.parametrize("rung", ["interrupt", "sigterm", "sigkill"])
def test_a_ladder_of_a_process_can_be_replaced(rung: str, signalled_backend: str) -> None:
    ladder = {"sigkill": 30.0} if rung == "sigkill" else {rung: 30.0, "sigkill": 1.0}
    with spawn_stuck("spin", "plain", backend=signalled_backend, ladder=ladder) as worker:
        assert worker.ladder == ladder
        assert worker.kill().rung == rung


def test_the_default_ladder_holds_its_budgets(backend: str) -> None:
    with th.spawn("time:sleep", 1000, backend=backend, cancel_timeout=0.5, kill_timeout=9) as worker:
        ladder = worker.ladder
        assert list(ladder) == list(th.rungs(backend))
        assert ladder.pop("cancel") == 0.5
        assert sum(ladder.values()) == pytest.approx(9)


def test_what_a_ladder_leaves_out_is_not_done(gil: str) -> None:
    """Without `unblock` a read is waited for: its worker is given up, and taken back when it returns."""
    reading, writing = os.pipe()
    try:
        before = th.statistics()
        worker = th.spawn(
            targets.read_a_byte,
            reading,
            backend="subint",
            gil=gil,  # type: ignore[arg-type]
            stdio="pipe",
            ladder={"interrupt": 0.05, "unwind": 0.05},
        )
        helpers.ready(worker)
        helpers.blocked(helpers.thread_of(worker))
        assert worker.kill().kind == "abandoned"
        assert th.statistics().quarantined == before.quarantined + 1
        os.write(writing, b"x")
        helpers.until(lambda: th.statistics().reclaimed == before.reclaimed + 1)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("backend", "ladder", "complaint"),
    [
        ("subint", {}, "the last rung of a subinterpreter's ladder must be one after `cancel`"),
        ("subint", {"cancel": 1}, "the last rung of a subinterpreter's ladder must be one after `cancel`"),
        ("subint", {"unblock": 0}, "the last rung of a subinterpreter's ladder must be one after `cancel`"),
        ("subint", {"unwind": 1, "interrupt": 1}, "`interrupt` is out of it"),
        ("subint", {"sigkill": 1}, '"subint" has the rungs `cancel`, `interrupt`, `unwind`, `unblock`'),
        ("fork", {"unwind": 1, "sigkill": 1}, '"fork" has the rungs `cancel`, `interrupt`, `sigterm`'),
        ("exec", {"sigterm": 1}, "the last rung of a process's ladder must be `sigkill`"),
        ("exec", {"sigkill": 0}, "the last rung of a process's ladder must be `sigkill`"),
        ("exec", {"sigkill": -1}, "the budget of 'sigkill' must be a number of seconds, at least 0, not -1"),
        ("exec", {"abandoned": 1}, 'not "abandoned"'),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(backend: str, ladder: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        th.spawn("os:getpid", backend=backend, ladder=ladder)


@pytest.mark.parametrize("ladder", [[("sigkill", 1)], "sigkill", {"sigkill": "1"}, {"sigkill": True}, {1: 1}])
def test_a_ladder_of_another_type_is_refused(ladder: object) -> None:
    with pytest.raises(TypeError, match="ladder|budget"):
        th.spawn("os:getpid", ladder=ladder)  # type: ignore[arg-type]


def test_a_ladder_and_budgets_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give either a ladder or cancel_timeout and kill_timeout"):
        th.spawn("os:getpid", ladder={"sigkill": 1}, kill_timeout=1)


# -- where rungs are missing -------------------------------------------------------------------------


def test_all_rungs_are_here() -> None:
    assert th.rungs("subint") == dict.fromkeys(("cancel", *RUNGS))
    assert th.rungs("fork") == dict.fromkeys(("cancel", "interrupt", "sigterm", "sigkill"))


def test_without_proc_it_goes_as_far_as_it_can(program: Callable[..., Program]) -> None:
    """In a mount namespace of its own, which takes privileges."""
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$0" "$@"']
    if subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    hidden = program(
        """
        import sys
        import tractor_host as th
        from tractor_host import testing

        if __name__ == "__main__":
            reason = th.rungs("subint")["unblock"]
            assert "/proc/thread-self/syscall cannot be read" in reason, reason
            try:
                th.spawn("os:getpid", backend="subint", ladder={"unblock": 1})
            except ValueError as error:
                assert reason in str(error), error
            else:
                sys.exit("a ladder with a rung that is missing was taken")
            for shape, backend in [("swallow", "subint"), ("swallow", "fork"), ("swallow", "exec"), ("sleep", "subint")]:
                worker = th.spawn("tractor_host.testing:stuck", shape, backend=backend, stdio="pipe",
                                  cancel_timeout=0, kill_timeout=1, name=f"{backend}-{shape}")
                testing.wait_ready(worker)
                if shape == "sleep":
                    print("Does it sleep?", flush=True)
                    sys.stdin.readline()
                print(worker.name, worker.kill().kind)
            sys.exit(7)
        """
    )
    hidden.command = [*hide, *hidden.command]
    with hidden.start(stdin=subprocess.PIPE) as running:
        assert running.stdout is not None
        told = list(itertools.takewhile(lambda line: line != "Does it sleep?\n", running.stdout))
        helpers.blocked(helpers.thread_named("th:subint-sleep", running.pid))
        out, err = running.communicate("yes\n", timeout=helpers.PATIENCE)
    # The first two are told by different threads.
    assert sorted(err.splitlines()) == [
        "tractor-host: `tractor-host ps` will not see this program: /proc/self/stat cannot be read",
        "tractor-host: the kill ladder of subinterpreters lacks `unblock` here: "
        "/proc/thread-self/syscall cannot be read: No such file or directory (os error 2)",
        "tractor-host: worker `subint-sleep` (subint) could not be ended and is abandoned",
    ]
    assert [*map(str.strip, told), *out.splitlines()] == [
        "subint-swallow killed",
        "fork-swallow killed",
        "exec-swallow killed",
        "subint-sleep abandoned",
    ]
    assert running.returncode == 7
