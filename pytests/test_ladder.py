"""The kill ladder of subinterpreters: every shape of stuck code really ends, under either GIL.

The autouse leak check is half of each of these tests: the thread, the interpreter, its fds and its
child processes are gone afterwards.
"""

from __future__ import annotations

import signal

import pytest

import tractor_host as th
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
        backend="subint",
        stdio="pipe",
        **options,  # type: ignore[arg-type]
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
    # The end itself says nothing; a program that is interrupted over and over may warn of itself.
    assert b"SystemExit" not in worker.stderr
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
    assert sigcgt() == caught


def sigcgt() -> str:
    """The signals that this process has handlers for, as the kernel knows them."""
    with open("/proc/self/status") as status:
        return next(line for line in status if line.startswith("SigCgt"))
