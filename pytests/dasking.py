"""A program that uses dask with our plugin: `dasking.py SCENARIO FOLDER [SCHEDULER]` prints what it found, as JSON.

Without the address of a scheduler it has a cluster of its own, of two processes with nannies.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
from distributed import Client, LocalCluster, Scheduler, Worker, fire_and_forget

import tractor_host
import tractor_host.dask
from helpers import until

FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


class Own(Exception):
    """In __main__, where no worker finds it."""


class Stubborn(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not me")


def square(number: int) -> int:
    return number * number


def mark(name: str) -> None:
    path = FOLDER / name
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)


def stuck(name: str) -> int:
    """Says where it is, and can't be interrupted."""
    mark(name)
    return sum(range(10**12))


def asleep(name: str) -> None:
    """Says where it is, and can be interrupted."""
    mark(name)
    time.sleep(1000)


def loop(name: str) -> None:
    """The same, without a wait."""
    mark(name)
    while True:
        pass


def asleep_once(name: str) -> str:
    if not (FOLDER / name).exists():
        asleep(name)
    return name


def leave() -> None:
    raise GeneratorExit("left")


def stuck_once(name: str) -> str:
    if not (FOLDER / name).exists():
        stuck(name)
    return name


def crash() -> None:
    ctypes.string_at(0)


def fail(kind: type[Exception]) -> None:
    raise kind("failed")


def where() -> tuple[int, str]:
    return os.getpid(), threading.current_thread().name


def pid_of(name: str) -> int:
    path = FOLDER / name
    until(path.exists, name)
    return int(path.read_text())


def is_gone(pid: int) -> bool:
    def has_ended() -> bool:
        try:
            return " Z " in Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True

    until(has_ended, f"the end of {pid}")
    return True


def error_of(future: Any) -> list[str]:
    error = future.exception(timeout=30)
    return [type(error).__name__, str(error).splitlines()[0]]


def calls(client: Client) -> Any:
    """What goes well."""
    offset = 10
    parts = client.map(lambda number: number + offset, range(20))
    total = client.submit(sum, parts)
    array = client.submit(np.arange, 300_000)
    lazy = dask.delayed(square)(dask.delayed(square)(2))
    pids = {pid for pid, _ in client.gather([client.submit(where, pure=False) for _ in range(8)])}
    return [
        total.result(), int(client.submit(np.sum, array).result()), lazy.compute(),
        sorted(client.gather(client.map(square, range(50)))) == [number * number for number in range(50)],
        len(pids) <= 2, not pids & {os.getpid(), *client.run(os.getpid).values()},
    ]  # fmt: skip


def failures(client: Client) -> Any:
    """What goes wrong, and costs no worker of dask's."""
    before = client.run(os.getpid)
    with dask.annotate(task_timeout=30):
        crashed = client.submit(crash)
    errors = [error_of(crashed)]
    errors += [error_of(client.submit(fail, kind)) for kind in (LookupError, Own, Stubborn)]
    errors += [error_of(client.submit(sys.exit, 3)), error_of(client.submit(threading.Lock))]
    start = time.monotonic()
    late = client.submit(stuck, "late")
    errors.append(error_of(late))
    seconds = time.monotonic() - start
    with dask.annotate(task_timeout=0.1):
        errors.append(error_of(client.submit(stuck, "early")))
    with dask.annotate(task_timeout="soon"):
        errors.append(error_of(client.submit(square, 5)))
    exit = late.exception().exit
    return [
        errors, seconds, [exit.kind, exit.rung], crashed.exception().__notes__[0][:32],
        is_gone(pid_of("late")), client.run(os.getpid) == before, client.submit(square, 3).result(),
    ]  # fmt: skip


def interrupted(client: Client) -> Any:
    """What a task that listens is told by the end of its time, and what is left with no `Exception`."""
    found: list[Any] = []
    for function in (asleep, loop):
        with dask.annotate(task_timeout=0.5):
            late = client.submit(function, function.__name__)
        try:
            late.result(timeout=30)
        except tractor_host.TaskTimeout as error:
            found += [late.status, error.exit.rung, is_gone(pid_of(function.__name__))]
    found.append(error_of(client.submit(leave)))
    return found


def cancelled(client: Client) -> Any:
    """What nobody wants any more."""
    found = []
    beside = client.submit(time.sleep, 1, pure=False)
    # By whoever asks for it, by whoever drops it; both wait for no time limit.
    future = client.submit(stuck, "first")
    pid = pid_of("first")
    start = time.monotonic()
    future.cancel()
    found.append(is_gone(pid))
    future = client.submit(stuck, "second")
    pid = pid_of("second")
    del future
    found.append(is_gone(pid))
    found.append(time.monotonic() - start < 10)
    found.append(beside.result() is None)
    # One that is asked for again as soon as the scheduler has forgotten it is carried out again.
    for turn in range(3):
        future = client.submit(stuck_once, f"again-{turn}")
        pid = pid_of(f"again-{turn}")
        future.cancel()
        until(lambda key=future.key: not client.run_on_scheduler(knows, key), "that it is forgotten")
        # By another client: this one may hear only now that the first one is cancelled.
        with Client(client.scheduler.address) as other:
            found.append(other.submit(stuck_once, f"again-{turn}").result(timeout=30))
        found.append(is_gone(pid))
    return found


def knows(key: str, dask_scheduler: Any) -> bool:
    return key in dask_scheduler.tasks


def removed(client: Client) -> Any:
    """The plugin goes while a task is carried out, and comes again."""
    futures = [client.submit(stuck_once, "one"), client.submit(asleep_once, "two")]
    pids = [pid_of("one"), pid_of("two")]
    client.unregister_worker_plugin("tractor_host")
    found: list[Any] = [[is_gone(pid) for pid in pids]]
    # They are carried out again, by what there is now.
    found.append(client.gather(futures))
    own = client.run(os.getpid).values()
    found.append(client.submit(where, pure=False).result()[0] in own)
    found.append([sorted(names) for names in client.run(executors_of).values()])
    client.register_plugin(tractor_host.dask.Plugin())
    found.append(client.submit(where, pure=False).result()[0] in client.run(os.getpid).values())
    with dask.annotate(executor="threads"):
        found.append(client.submit(where, pure=False).result()[0] in client.run(os.getpid).values())
    return found


def executors_of(dask_worker: Any) -> list[str]:
    return list(dask_worker.executors)


def named(client: Client) -> Any:
    """Beside the threads, and for those tasks alone that ask for it."""
    client.unregister_worker_plugin("tractor_host")
    client.register_plugin(
        tractor_host.dask.Plugin(executor="killable", cancel_timeout=0.1, task_timeout=0.5)
    )
    own = client.run(os.getpid).values()
    found: list[Any] = [client.submit(where, pure=False).result()[0] in own]
    with dask.annotate(executor="killable"):
        found.append(client.submit(where, pure=False).result()[0] in own)
        found.append(error_of(client.submit(stuck, "named"))[0])
    return found


def killed(client: Client) -> Any:
    """A worker of dask's is ended by force, and what it had a worker carry out goes with it."""
    future = client.submit(stuck, "task", retries=0)
    pid = pid_of("task")
    workers = client.run(os.getpid)
    [address] = [place for place, keys in client.processing().items() if keys]
    os.kill(workers[address], signal.SIGKILL)
    gone = is_gone(pid)
    future.cancel()
    until(lambda: len(client.run(os.getpid)) == 2, "the nanny's new worker")
    return [gone, client.submit(square, 4).result(timeout=30)]


def closed(client: Client) -> Any:
    """All is closed while tasks are carried out."""
    futures = [client.submit(stuck, "one"), client.submit(asleep, "two")]
    pids = [pid_of("one"), pid_of("two")]
    assert len(futures) == 2
    return pids


def left(client: Client) -> Any:
    """They are not waited for, and not cancelled, when this program ends."""
    fire_and_forget([client.submit(stuck, name) for name in ("three", "four")])
    return [pid_of("three"), pid_of("four")]


def two_workers(client: Client) -> Any:
    client.wait_for_workers(2)
    return calls(client)


async def bare() -> Any:
    """Without the plugin: an Executor as a worker's executor, by a name and for all."""
    found: list[Any] = []
    offset = 1
    for name in ("default", "killable"):
        pool = tractor_host.Executor(2, task_timeout=5, cancel_timeout=0.1, stdio="null")
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler,
            Worker(scheduler.address, executor={name: pool}, nthreads=2) as worker,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            with dask.annotate(executor=name):
                futures = client.map(square, range(5))
                found.append(await client.gather(futures))
                found.append((await client.submit(where, pure=False))[0] != os.getpid())
                for function in (crash, stuck):
                    args = (name,) if function is stuck else ()
                    error = await client.submit(function, *args, pure=False).exception()
                    found.append(type(error).__name__)
                found.append(await client.submit(lambda number: number + offset, 1))
            assert worker.executors[name] is pool
        found.append(pool.workers())
    return found


def main() -> None:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if sys.argv[1] == "bare":
        print(json.dumps(asyncio.run(bare())))
        return
    scenario: Callable[[Client], Any] = globals()[sys.argv[1]]
    options: dict[str, Any] = {"cancel_timeout": 0.1, "kill_timeout": 0.6, "stdio": "null"}
    if scenario in (interrupted, removed, closed):
        options["cancel_timeout"] = 2
    if scenario is failures:
        options["task_timeout"] = 1
    if len(sys.argv) == 3:
        # Nannies see to it that numpy starts no threads.
        options["preload"] = ["distributed.worker"]

    def run(client: Client) -> Any:
        client.register_plugin(tractor_host.dask.Plugin(**options))
        return scenario(client)

    if len(sys.argv) > 3:
        with Client(sys.argv[3]) as client:
            found = run(client)
    else:
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL,
                host="127.0.0.1",
            ) as cluster,
            Client(cluster) as client,
        ):  # fmt: skip
            found = run(client)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
