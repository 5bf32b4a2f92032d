"""Kills by the hundred: nothing adds up, and nobody else notices.

Hosts are killed by the dozen: nobody survives them.

Each has a short form that always runs and a long one, marked `stress`, that runs with
`pytest -m stress`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import bystanders
import helpers
import tractor_host as th
from conftest import Program
from tractor_host import _native, testing

ENDABLE = [name for name, shape in testing.SHAPES.items() if shape.can_be_ended]


def stuck_worker(name: str, gil: str) -> th.Worker:
    return th.spawn(
        "tractor_host.testing:stuck",
        name,
        backend="subint",
        gil=gil,  # type: ignore[arg-type]
        stdio="pipe",
        cancel_timeout=0,
        kill_timeout=20,
    )


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.stress)])
def test_bystanders_see_nothing_of_the_kills_beside_them(seconds: int) -> None:
    innocent = {
        kind: th.spawn(bystanders.work, kind, seconds, backend="subint", name=kind, stdio="pipe")
        for kind in bystanders.KINDS
    }
    for worker in innocent.values():
        testing.wait_ready(worker)
    kills: Counter[str | None] = Counter()
    choice = random.Random(0)
    deadline = time.monotonic() + seconds * 0.9
    while time.monotonic() < deadline:
        condemned = [stuck_worker(choice.choice(ENDABLE), choice.choice(["shared", "own"])) for _ in range(8)]
        for worker in condemned:
            _native.kill(worker.id)
        kills.update(worker.wait(60).rung for worker in condemned)
    counts = {kind: worker.result(timeout=60) for kind, worker in innocent.items()}
    print(f"operations {counts}, kills {dict(kills)}")
    assert all(count > 0 for count in counts.values()), counts
    assert kills.total() >= 8


@pytest.mark.parametrize("gil", ["shared", "own"])
@pytest.mark.parametrize("cycles", [50, pytest.param(2000, marks=pytest.mark.stress)])
def test_a_soak_of_kills_leaves_memory_flat(cycles: int, gil: str) -> None:
    choice = random.Random(0)
    slow = {"trio-forever", "trio-shielded", "asyncio-swallow"}
    names = [name for name in ENDABLE if name not in slow]
    resident = []
    for cycle in range(cycles):
        worker = stuck_worker(choice.choice(names), gil)
        if choice.random() < 0.75:  # the others are killed while they start
            testing.wait_ready(worker)
        assert worker.kill().kind in ("killed", "returned")
        if cycle % 10 == 9:
            resident.append(_native.resources()["resident"])
    warm = resident[len(resident) // 2 :]
    first, middle, last = (size >> 20 for size in (resident[0], warm[0], warm[-1]))
    print(f"{cycles} cycles: {first} MB at first, {middle} MB half way, {last} MB at last")
    if cycles >= 1000:
        assert warm[-1] - warm[0] < 8 << 20, [size >> 20 for size in resident]


HOST = """
import itertools, os, sys
import targets, tractor_host as th
if __name__ == "__main__":
    kept = []
    print("runs", flush=True)
    for index in itertools.count():
        backend = ("forkserver", "fork", "exec", "subint", "subint_forkserver")[index % 5]
        target, args = [
            (targets.daemons, ("ignore",)),
            (targets.spin_and_swallow, ()),
            (targets.hang_in_a_chain, (["forkserver", "exec"],)),
            (targets.add, (1, 2)),
        ][index % 4]
        options = {"process": "house"} if backend == "subint_forkserver" else {}
        if backend == "subint":
            target, args = targets.sleep, ()
        kept.append(
            th.spawn(target, *args, backend=backend, stdio="null", cancel_timeout=0.01, kill_timeout=0.2, **options)
        )
        if len(kept) > 6:
            kept.pop(0).kill()
"""


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.stress)])
def test_nobody_survives_a_host_that_is_killed_at_any_moment(
    kills: int, program: Callable[..., Program]
) -> None:
    """Workers and theirs, the fork server, daemons of workers: all of them inherit a variable, by which they are found."""
    choice = random.Random(0)
    host = program(HOST)
    found = slowest = 0
    for index in range(kills):
        mark = f"TH_TEST_MARK={os.getpid()}-{index}"
        process = host.start(env={**helpers.importable(), **dict([mark.split("=")])})
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n"
            time.sleep(choice.uniform(0, 1.5))  # the moment is what is tested
            found += len(marked(mark))
            process.kill()
            process.wait()
        dead = time.monotonic()
        bound = 1.0 if kills >= 100 else 5.0  # the short form runs on machines that do much else
        helpers.until(lambda mark=mark: not marked(mark), "the end of all that it had started", timeout=bound)
        slowest = max(slowest, time.monotonic() - dead)
    print(f"{kills} hosts killed with {found} processes below them; the last was gone after {slowest:.2f} s")
    assert found > kills


def marked(mark: str) -> list[int]:
    """The processes with that variable in their first environment, but for zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended just now; a zombie has none
            continue
    return found
