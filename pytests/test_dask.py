"""dask with workers that can be killed: the real schedulers, and processes of its own on loopback.

A process that imports distributed has threads and event loops from then on, so it is programs that do.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import PATIENCE, Program, kill_session, pid_is_gone
from helpers import importable, until

pytestmark = pytest.mark.outside

PROGRAM = Path(__file__).with_name("dasking.py")
#: A cluster on a loaded machine.
LIMIT = 2 * PATIENCE


def members(session: int) -> list[str]:
    """The processes of a session that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (folder / "stat").read_text().rpartition(")")
            if int(rest.split()[3]) == session and rest.split()[0] != "Z":
                found.append(name)
    return found


@contextlib.contextmanager
def started(*command: str | Path, cwd: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        command, cwd=cwd, env=importable(), stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill_session(process.pid)
        process.communicate()


def run(scenario: str, folder: Path, *args: str) -> Any:
    """What the program has found; when it has ended, all that it started has, too."""
    command = (sys.executable, PROGRAM, scenario, folder, *args)
    with started(*command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
        until(lambda: not members(process.pid), "the end of all its processes")
    return json.loads(out.splitlines()[-1])


def test_tasks_are_carried_out(tmp_path: Path) -> None:
    assert run("calls", tmp_path) == [390, 44999850000, 16, True, True, True]


def test_a_failure_costs_no_worker_of_dask_s(tmp_path: Path) -> None:
    errors, seconds, ended, note, is_gone, are_same, nine = run("failures", tmp_path)
    assert [kind for kind, _ in errors] == [
        "WorkerDied", "LookupError", "Own", "Exception", "RuntimeError", "TypeError", "TaskTimeout",
        "TaskTimeout", "TypeError",
    ]  # fmt: skip
    texts = [text for _, text in errors]
    assert "SIGSEGV" in texts[0]
    assert texts[4] == "the task was left with SystemExit: 3"
    assert "took longer than 1.0 s" in texts[6]
    assert "took longer than 0.1 s" in texts[7]
    assert "task_timeout must be" in texts[8]
    assert ended[0] == "killed"
    assert note.startswith("It was carrying out crash-")
    assert seconds < PATIENCE / 2
    assert (is_gone, are_same, nine) == (True, True, 9)


def test_a_task_that_listens_is_told_of_as_late_nonetheless(tmp_path: Path) -> None:
    left = ["RuntimeError", "the task was left with GeneratorExit: left"]
    assert run("interrupted", tmp_path) == [*2 * ["error", "cancel", True], left]


def test_a_task_that_nobody_wants_is_ended(tmp_path: Path) -> None:
    found = run("cancelled", tmp_path)
    assert found == [True, True, True, True, "again-0", True, "again-1", True, "again-2", True]


def test_the_plugin_can_go_and_come_again(tmp_path: Path) -> None:
    assert run("removed", tmp_path) == [
        [True, True], ["one", "two"], True, 2 * [["actor", "default", "offload"]], False, True,
    ]  # fmt: skip


def test_a_plugin_for_those_tasks_that_ask_for_it(tmp_path: Path) -> None:
    assert run("named", tmp_path) == [True, False, "TaskTimeout"]


def test_a_worker_of_dask_s_that_is_killed_takes_its_task_along(tmp_path: Path) -> None:
    assert run("killed", tmp_path) == [True, 16]


def test_a_cluster_closes_while_tasks_are_stuck(tmp_path: Path) -> None:
    assert all(pid_is_gone(pid) for pid in run("closed", tmp_path))


def test_an_executor_can_be_handed_to_a_worker_without_the_plugin(tmp_path: Path) -> None:
    assert run("bare", tmp_path) == 2 * [[0, 1, 4, 9, 16], True, "WorkerDied", "TaskTimeout", 2, []]


def test_a_scheduler_and_workers_that_were_started_by_their_commands(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    common = ("--scheduler-file", str(file), "--no-dashboard")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))

        def start(name: str, *args: str) -> subprocess.Popen[str]:
            command = (sys.executable, "-m", f"distributed.cli.dask_{name}", *common, *args)
            return stack.enter_context(started(*command, cwd=tmp_path, stdout=log, stderr=log))

        scheduler = start("scheduler", "--host", "127.0.0.1", "--port", "0")
        workers = [
            start("worker", "--host", "127.0.0.1", "--nthreads", "1", nanny)
            for nanny in ("--nanny", "--no-nanny")
        ]
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"), "the scheduler", LIMIT)
        address = json.loads(file.read_text())["address"]
        run("two_workers", tmp_path, address)
        run("cancelled", tmp_path, address)
        # They are stopped while tasks are carried out. (One by one: a worker of dask's may hang by itself when
        # its scheduler goes at the same time.)
        pids = run("left", tmp_path, address)
        for process in (*workers, scheduler):
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT)
            until(lambda leader=process.pid: not members(leader), "the end of all its processes")
        assert all(pid_is_gone(pid) for pid in pids)


def test_an_executor_is_a_scheduler_of_dask_s_own(program: Callable[..., Program]) -> None:
    source = """
        import dask, os, tractor_host as th

        def square(number):
            return number * number

        def crash(number):
            os.abort()

        if __name__ == "__main__":
            with th.Executor(2, stdio="null", cancel_timeout=0.1) as pool:
                total = dask.delayed(sum)([dask.delayed(square)(number) for number in range(20)])
                print(total.compute(scheduler=pool))
                with dask.config.set(scheduler=pool):
                    print(dask.compute(dask.delayed(lambda: os.getpid())())[0] in {w.pid for w in pool.workers()})
                    try:
                        dask.delayed(crash)(1).compute()
                    except th.WorkerDied as error:
                        print(error.exit.kind)
                    print(total.compute())
                try:
                    dask.delayed(sum)(range(10**12)).compute(scheduler=pool.with_timeout(0.2))
                except th.TaskTimeout as error:
                    print(error.exit.kind)
    """
    found = program(source).run()
    assert (found.stdout.splitlines(), found.stderr) == (["2470", "True", "signalled", "2470", "killed"], "")


REFUSED = """
import tractor_host.dask
for options in (
    {"executor": 3}, {"preload": "dask"}, {"task_timeout": -1}, {"max_workers": 0}, {"backend": "none"},
    {"nonsense": 1}, {"memory_limit": "much"},
):
    try:
        tractor_host.dask.Plugin(**options)
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_what_can_not_be_right_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "TypeError: executor must be a name, not int",
        "TypeError: preload takes a list of module names, not one name",
    ]
    for line, word in zip(
        lines[2:], ("task_timeout", "max_workers", "none", "nonsense", "memory_limit"), strict=True
    ):
        assert word in line


@pytest.mark.parametrize("missing", ["dask", "distributed"])
def test_without_dask_it_says_what_it_needs(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try:\n    import tractor_host.dask\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "tractor_host.dask is for programs that use dask.distributed: pip install 'tractor-host[dask]'\n"
    )
