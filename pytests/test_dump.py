"""Dumps: they are taken while everything is stuck, and say what it is stuck in."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import blocked, importable, ready, thread_of, together, until
from tractor_host import _native

HOG = """
import os, sys, time
import tractor_host as th

def hog():
    sum(range(10**12))  # the hog

if __name__ == "__main__":
    if sys.argv[1] == "main":
        hog()
    th.spawn(hog, backend="subint", gil=sys.argv[1], name="greedy").wait()
"""


def line_of(source: str, mark: str) -> int:
    lines = [number for number, line in enumerate(source.splitlines(), 1) if line.endswith(mark)]
    assert len(lines) == 1, lines
    return lines[0]


def outside(launcher: Path, pid: int, *options: str) -> Any:
    """What `tractor-host dump --json` tells of a process."""
    command = [launcher, "dump", "--json", *options, str(pid)]

    def told() -> str:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        # What has just been started has none of Python's yet.
        assert ran.returncode == 0 or "there is no Python in it" in ran.stderr, ran.stderr
        return ran.stdout

    return json.loads(until(told, "a Python"))


def own(**options: Any) -> Any:
    """What `dump` tells of this process."""
    file = io.StringIO()
    th.dump(file, format="json", **options)
    return json.loads(file.getvalue())


def threads_of(process: Any) -> list[Any]:
    inside = [thread for interpreter in process["interpreters"] for thread in interpreter["threads"]]
    return [*inside, *process["threads"]]


def functions(thread: Any) -> list[str]:
    return [frame["function"] for frame in thread["frames"]]


@contextmanager
def running(program: Program, *args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that is killed in the end, whatever it is stuck in."""
    process = program.start(*args, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def holder(launcher: Path, pid: int, function: str) -> tuple[Any, Any]:
    """Waits until a GIL is held in that function: the GIL, and the dump's first process."""

    def seen() -> tuple[Any, Any] | None:
        process = outside(launcher, pid, "--no-tree")["processes"][0]
        held = [gil for gil in process["gils"] if gil["at"] and gil["at"]["function"] == function]
        return (held[0], process) if held else None

    found: tuple[Any, Any] = until(seen, f"a GIL held in {function}()")
    return found


# -- while everything is stuck -----------------------------------------------------------------------


@pytest.mark.parametrize("runs", ["python", "tractor-host"])
@pytest.mark.parametrize(
    ("place", "held_in", "own_gil"), [("main", 0, [0]), ("shared", 1, [0, 1]), ("own", 1, [1])]
)
def test_who_holds_a_gil_in_c_code_is_named(
    program: Callable[..., Program], launcher: Path, place: str, held_in: int, own_gil: list[int], runs: str
) -> None:
    source = program(HOG, launcher=runs)
    with running(source, place) as process:
        gil, dumped = holder(launcher, process.pid, "hog")
        assert gil["at"] == {
            "file": str(source.path),
            "line": line_of(source.path.read_text(), "# the hog"),
            "function": "hog",
        }
        assert gil["held_in"] == held_in
        assert gil["interpreters"] == own_gil
        [thread] = [
            thread for thread in threads_of(dumped) if thread["holds_gil"] and "hog" in functions(thread)
        ]
        assert thread["id"] == gil["holder"]
        assert thread["state"] == "R"
        assert thread["syscall"] is None
        assert thread["kernel_name"] == (
            "th:greedy" if place != "main" else Path(f"/proc/{process.pid}/comm").read_text().strip()
        )
        text = subprocess.run(
            [launcher, "dump", str(process.pid)], capture_output=True, text=True, check=True, timeout=PATIENCE
        ).stdout
        assert re.search(
            rf"^GIL of interpreter .*: held by thread {gil['holder']} `.* in interpreter {held_in}, at .*:\d+ in hog$",
            text,
            re.MULTILINE,
        )


def test_a_thread_without_the_gil_dumps_a_process_whose_main_thread_keeps_it(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    path = tmp_path / "dump.json"
    source = """
        import json, os, sys, time
        import tractor_host as th

        def watch(path):
            import json, os, tractor_host as th
            th.dump(path + ".new", format="json")  # all that it needs is imported
            print("watching", flush=True)
            while True:
                th.dump(path + ".new", format="json")
                with open(path + ".new") as file:
                    found = json.load(file)
                if any(gil["at"] and gil["at"]["function"] == "hog" for gil in found["processes"][0]["gils"]):
                    os.rename(path + ".new", path)
                    return

        def hog():
            sum(range(10**12))

        if __name__ == "__main__":
            worker = th.spawn(watch, sys.argv[1], backend="subint", gil="own", stdio="pipe")
            while b"watching" not in worker.stdout:
                time.sleep(0.01)
            hog()
        """
    with running(program(source), str(path)):
        until(path.exists, "a dump")
    found = json.loads(path.read_text())
    [gil] = [gil for gil in found["processes"][0]["gils"] if gil["at"] and gil["at"]["function"] == "hog"]
    assert gil["held_in"] == 0
    assert [worker["target"] for worker in found["workers"]] == ["__main__:watch"]


def test_who_waits_for_whose_lock_is_told(program: Callable[..., Program], launcher: Path) -> None:
    source = """
        import threading

        one, two, plain = threading.RLock(), threading.RLock(), threading.Lock()
        meet = threading.Barrier(2)

        def cross(mine, other):
            with mine:
                meet.wait()
                other.acquire()

        plain.acquire()
        threading.Thread(target=cross, args=(one, two), name="the first of the two").start()
        threading.Thread(target=cross, args=(two, one), name="the second of the two").start()
        threading.Thread(target=plain.acquire, name="a third").start()
        """

    def seen() -> dict[str, Any] | None:
        threads = threads_of(outside(launcher, process.pid)["processes"][0])
        waiting = {thread["name"]: thread for thread in threads if "ock at 0x" in (thread["waits_for"] or "")}
        # The barrier is made of locks too, and so is the start of a thread.
        crossed = [waiting.get(f"the {which} of the two", {"waits_for": ""}) for which in ("first", "second")]
        done = all(thread["waits_for"].startswith("an RLock") for thread in crossed) and "a third" in waiting
        return waiting if done else None

    with running(program(source)) as process:
        waiting = until(seen, "three threads that wait for locks")
        first, second = waiting["the first of the two"], waiting["the second of the two"]
        assert "an RLock at 0x" in first["waits_for"]
        assert first["waits_for"].endswith(f", which thread {second['id']} holds")
        assert second["waits_for"].endswith(f", which thread {first['id']} holds")
        assert first["syscall"] == "futex"
        assert functions(first)[0] == "cross"
        assert re.fullmatch("a Lock at 0x[0-9a-f]+", waiting["a third"]["waits_for"])


def test_who_waits_for_the_gil_is_told(program: Callable[..., Program], launcher: Path) -> None:
    source = """
        import threading

        def hog():
            sum(range(10**12))

        threading.Thread(target=hog).start()
        while True:
            pass
        """
    with running(program(source)) as process:
        gil, _ = holder(launcher, process.pid, "hog")

        def seen() -> bool:
            threads = threads_of(outside(launcher, process.pid)["processes"][0])
            [main] = [thread for thread in threads if thread["name"] == "MainThread"]
            return main["waits_for"] == f"the GIL, which thread {gil['holder']} holds"

        until(seen, "a main thread that waits for the GIL")


LOOPS = """
    import asyncio, threading
    import trio

    async def nap(sleep):
        await sleep(1000)  # the nap

    async def with_asyncio():
        async with asyncio.TaskGroup() as group:
            group.create_task(nap(asyncio.sleep), name="one")
            group.create_task(nap(asyncio.sleep))
            meet.wait()

    async def with_trio():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nap, trio.sleep, name="deep")
            meet.wait()

    def hog():
        import time
        time.sleep(0.2)  # they get to sleep
        sum(range(10**12))

    meet = threading.Barrier(3)
    threading.Thread(target=asyncio.run, args=(with_asyncio(),)).start()
    threading.Thread(target=trio.run, args=(with_trio,)).start()
    meet.wait()
    hog()
    """


def test_the_tasks_of_loops_that_cannot_be_asked_are_told(
    program: Callable[..., Program], launcher: Path
) -> None:
    source = program(LOOPS)
    with running(source) as process:
        _, dumped = holder(launcher, process.pid, "hog")
        loops = {loop["kind"]: loop["tasks"] for thread in threads_of(dumped) for loop in thread["loops"]}
        place = {
            "file": str(source.path),
            "line": line_of(source.path.read_text(), "# the nap"),
            "function": "nap",
        }
        tasks = {task["name"]: task for task in loops["asyncio"]}
        assert len(tasks) == 3
        assert tasks["one"]["parent"] == tasks["Task-1"]["id"]
        assert tasks["Task-1"]["parent"] is None
        assert place in tasks["one"]["frames"]
        assert tasks["Task-1"]["frames"][-1]["function"] == "with_asyncio"
        tasks = {task["name"]: task for task in loops["trio"]}
        assert tasks["deep"]["parent"] == tasks["__main__.with_trio"]["id"]
        assert tasks["__main__.with_trio"]["parent"] == tasks["<init>"]["id"]
        assert (tasks["<init>"]["depth"], tasks["deep"]["depth"]) == (0, 2)
        assert tasks["deep"]["frames"][-1] == place
        text = subprocess.run(
            [launcher, "dump", str(process.pid)], capture_output=True, text=True, check=True, timeout=PATIENCE
        ).stdout
        assert re.search(r"^    trio tasks: 4\n      `<init>`$", text, re.MULTILINE)


# -- the workers -------------------------------------------------------------------------------------


def test_the_workers_are_told_with_their_states_pids_and_stacks(backend: str) -> None:
    with together() as spawn:
        worker = ready(spawn(targets.sleep, backend=backend, stdio="pipe", name="dumped"))
        blocked(thread_of(worker))
        found = own()
        [line] = [line for line in found["workers"] if line["id"] == worker.id]
        assert line["age"] > 0
        assert {key: line[key] for key in ("name", "parent", "backend", "state", "pid", "quarantined")} == {
            "name": "dumped",
            "parent": None,
            "backend": backend,
            "state": "running",
            "pid": worker.pid,
            "quarantined": False,
        }
        home = worker.pid or os.getpid()
        [process] = [process for process in found["processes"] if process["pid"] == home]
        assert process["obstacle"] is None
        [thread] = [thread for thread in threads_of(process) if "sleep" in functions(thread)]
        assert thread["kernel_name"] == "th:dumped"
        assert thread["state"] == "S"


def test_25_workers_are_all_told() -> None:
    with together() as spawn:
        kinds = ("subint", "forkserver", "fork", "subint_forkserver", "subint")
        workers = [spawn(time.sleep, 1000, backend=kinds[index % 5], name=f"w{index}") for index in range(25)]
        for worker in workers:
            until(lambda worker=worker: worker.state == "running", f"{worker} runs")
            blocked(thread_of(worker))
        found = own()
        assert [line["name"] for line in found["workers"]] == [f"w{index}" for index in range(25)]
        seen = {
            thread["kernel_name"]
            for process in found["processes"]
            for thread in threads_of(process)
            if "_work" in functions(thread)
        }
        assert seen == {f"th:w{index}" for index in range(25)}
        assert not found["unread"]


def test_a_host_tells_from_outside_of_its_workers_and_of_what_happened(
    program: Callable[..., Program], launcher: Path
) -> None:
    """While C code keeps its GIL."""
    source = """
import tractor_host as th
worker = th.spawn("time:sleep", 1000, name="asleep")
helpers.until(lambda: worker.state == "running")
print("ready", flush=True)
sum(range(10**12))
"""
    with program("import helpers\n" + source).start(env=importable()) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            command = [launcher, "dump", "--json", "--no-tree", str(running.pid)]
            found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
            text = subprocess.run(
                command[:2] + command[3:], capture_output=True, check=True, timeout=60
            ).stdout
        finally:
            running.kill()
    assert [(worker["name"], worker["state"]) for worker in found["workers"]] == [("asleep", "running")]
    kinds = [event["kind"] for event in found["events"] if event["name"] == "asleep"]
    assert kinds == ["spawn", "started"]
    assert found["unread"] == []
    assert b"1 `asleep` [forkserver, pid" in text
    assert (
        re.search(rb"Last events\n.* s before  INFO  zygote_start", text) or b"spawn: worker `asleep`" in text
    )


def test_workers_of_workers_are_told_below_their_parents(launcher: Path) -> None:
    with together() as spawn:
        spawn(targets.hang_in_a_chain, ["forkserver", "subint"], backend="fork", name="top")
        until(lambda: sum(info["state"] == "running" for info in _native.workers()) == 3, "three workers")
        found = own()["workers"]
        assert [line["backend"] for line in found] == ["fork", "forkserver", "subint"]
        assert [line["parent"] for line in found] == [None, found[0]["id"], found[1]["id"]]
        file = io.StringIO()
        th.dump(file)
        tree = re.findall(r"^( +)(\d+) `", file.getvalue(), re.MULTILINE)
        assert tree == [("  " * (depth + 1), str(line["id"])) for depth, line in enumerate(found)]
        # From outside it is the same registry, and the processes are a tree.
        seen = outside(launcher, os.getpid())
        assert [line["id"] for line in seen["workers"]] == [line["id"] for line in found]
        assert {line["pid"] for line in found if line["pid"]} <= {
            process["pid"] for process in seen["processes"]
        }


def test_what_a_worker_was_stuck_in_is_told_with_its_end(backend: str) -> None:
    with th.spawn(
        targets.resist, backend=backend, stdio="pipe", cancel_timeout=0.1, kill_timeout=0.5
    ) as worker:
        ready(worker)
        found = worker.kill()
    assert found.rung == ("sigkill" if backend in ("forkserver", "fork", "exec") else "unblock")
    stacks = [[frame.function for frame in thread.frames] for thread in found.stuck]
    assert any("sleep_and_swallow" in stack for stack in stacks), stacks


def test_who_listens_or_is_killed_at_once_was_stuck_in_nothing(signalled_backend: str) -> None:
    with th.spawn(targets.sleep, backend=signalled_backend, stdio="pipe") as worker:
        assert ready(worker).kill().stuck == ()
    with th.spawn(targets.sleep, backend=signalled_backend, stdio="pipe", ladder={"sigkill": 5}) as worker:
        found = ready(worker).kill()
    assert (found.rung, found.stuck) == ("sigkill", ())


# -- while everything changes ------------------------------------------------------------------------


@pytest.mark.parametrize("gil", ["own", "shared"])
def test_1000_dumps_while_subinterpreters_come_and_go(gil: str) -> None:
    over = threading.Event()
    ended: list[str] = []

    def storm() -> None:
        while not over.is_set():
            ended.append(th.spawn("os:getpid", backend="subint", gil=gil).wait(timeout=PATIENCE).kind)

    threads = [threading.Thread(target=storm) for _ in range(3)]
    for thread in threads:
        thread.start()
    taken = 0
    try:
        deadline = time.monotonic() + 120
        # Many of each, however slow the machine is.
        while taken < 1000 or (len(ended) < 100 and time.monotonic() < deadline):
            found = own(tree=False)
            main = [thread for thread in threads_of(found["processes"][0]) if thread["id"] == os.getpid()]
            assert "own" in [name for thread in main for name in functions(thread)]
            taken += 1
            time.sleep(0)  # lets the others have the GIL
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(ended) >= 100
    assert set(ended) == {"returned"}


def test_a_program_that_starts_and_ends_processes_is_read_from_outside(
    program: Callable[..., Program], launcher: Path
) -> None:
    source = """
        import tractor_host as th

        if __name__ == "__main__":
            while True:
                workers = [th.spawn("os:getpid", backend=name) for name in ("forkserver", "fork", "subint", "exec")]
                for worker in workers:
                    worker.result(timeout=60)
                print("round", flush=True)
        """
    with running(program(source)) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline() == "round\n"
            for _ in range(8):
                found = outside(launcher, process.pid)
                assert found["processes"][0]["interpreters"][0]["id"] == 0


# -- from outside ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", ["python", "tractor-host"])
def test_any_python_can_be_read(program: Callable[..., Program], launcher: Path, runs: str) -> None:
    source = program("import time\ntime.sleep(1000)  # sleeps\n", launcher=runs)
    with running(source) as process:

        def seen() -> Any:
            found = outside(launcher, process.pid)
            threads = threads_of(found["processes"][0])
            at = [frame["file"] for thread in threads for frame in thread["frames"]]
            return found if at == [str(source.path)] else None

        found = until(seen, "the program's stack")
        assert found["workers"] is None
        assert found["pid"] == process.pid
        [dumped] = found["processes"]
        assert dumped["python"] == sys.version.split()[0]
        assert dumped["parent"] == os.getpid()
        [thread] = [thread for thread in threads_of(dumped) if thread["name"] == "MainThread"]
        assert thread["frames"] == [{"file": str(source.path), "line": 2, "function": "<module>"}]
        assert thread["syscall"] == "clock_nanosleep"


def test_a_worker_of_ours_can_be_read_by_its_pid(process_backend: str, launcher: Path) -> None:
    with together() as spawn:
        worker = ready(spawn(targets.sleep, backend=process_backend, stdio="pipe"))
        blocked(thread_of(worker))
        assert worker.pid is not None
        [dumped] = outside(launcher, worker.pid)["processes"]
        assert any("sleep" in functions(thread) for thread in threads_of(dumped))


def refused(launcher: Path, *words: str) -> tuple[int, str]:
    ran = subprocess.run(
        [launcher, "dump", *words], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert ran.stdout == ""
    return ran.returncode, ran.stderr


def test_what_cannot_be_read_is_said(launcher: Path) -> None:
    assert refused(launcher, "4194305") == (
        1,
        "tractor-host: no dump of process 4194305: there is no such process\n",
    )
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            # Until it has become that, it is a copy of this Python.
            until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
            expected = f"tractor-host: no dump of process {process.pid}: there is no Python in it\n"
            assert refused(launcher, str(process.pid)) == (1, expected)
        finally:
            process.kill()
    for words in ([], ["x"], ["0"], ["-5"], ["1", "2"], ["--nonsense", "1"]):
        code, error = refused(launcher, *words)
        assert (code, error.startswith("tractor-host: ")) == (2, True), error


def test_another_version_is_no_python_that_can_be_read(launcher: Path) -> None:
    others = [f"python3.{minor}" for minor in (8, 9, 10, 11, 12, 13, 15)]
    found = next(
        (path for name in others if (path := shutil.which(name, path="/usr/bin:/usr/local/bin"))), None
    )
    if found is None:
        pytest.skip("there is no other Python on this machine")
    code = "import time; print('up', flush=True); time.sleep(1000)"
    with subprocess.Popen([found, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            status, error = refused(launcher, str(process.pid))
            assert status == 1
            assert re.search(
                r"its Python is (older than 3\.13|3\.\d+).*, and only that of CPython 3\.14", error
            )
        finally:
            process.kill()


# -- what it looks like, and where it goes -----------------------------------------------------------


def test_the_json_has_the_keys_that_the_readme_documents() -> None:
    found = own()
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.partition("## Dumps")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([a-z_]+)`", section))
    assert found["schema"] == 1
    [process] = [process for process in found["processes"] if process["pid"] == os.getpid()]
    main = process["interpreters"][0]["threads"]
    with together() as spawn:
        spawn(time.sleep, 1000)
        [line] = own()["workers"]
    task = {"id", "parent", "depth", "name", "running", "frames"}
    frame = {"file", "line", "function"}
    used = {
        *found,
        *process,
        *process["gils"][0],
        *process["interpreters"][0],
        *main[0],
        *line,
        *task,
        *frame,
    }
    assert used - documented == set()


def test_it_is_written_where_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    for _ in range(2):
        th.dump(path, tree=False)
    text = path.read_text()
    assert text.count("==== tractor-host dump of process") == 1
    assert text.endswith(f"==== end of the dump of process {os.getpid()}\n")
    assert "in test_it_is_written_where_it_is_told_to" in text
    with path.open("w") as file:
        th.dump(file.fileno(), tree=False, format="json")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(ValueError, match="format must be"):
        th.dump(path, format="xml")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No such file"):
        th.dump(tmp_path / "none" / "dump")


CAPTURED = """
    import tractor_host as th

    def test_it():
        print("captured")
        th.dump(tree=False)
    """


@pytest.mark.parametrize("capture", ["fd", "sys", "no"])
@pytest.mark.parametrize("place", ["file", "directory"])
def test_pytest_does_not_capture_what_goes_to_a_named_place(tmp_path: Path, capture: str, place: str) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(CAPTURED))
    out = tmp_path / "out"
    if place == "directory":
        out.mkdir()
    environment = {**importable(), "TRACTOR_HOST_DUMP": str(out)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--capture={capture}",
        "-p",
        "no:randomly",
        "test_it.py",
    ]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "==== tractor-host dump" not in ran.stdout + ran.stderr
    [file] = out.iterdir() if place == "directory" else [out]
    assert "in test_it" in file.read_text()


@pytest.mark.parametrize("capture", ["fd", "sys"])
def test_under_the_launcher_pytest_captures_no_dump(tmp_path: Path, capture: str, launcher: Path) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(CAPTURED))
    environment = {name: value for name, value in importable().items() if name != "TRACTOR_HOST_DUMP"}
    command = [launcher, "pytest", "-q", f"--capture={capture}", "-p", "no:randomly", "test_it.py"]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "in test_it" in ran.stderr
    assert "captured" not in ran.stdout


def test_sigquit_writes_one_while_the_gil_is_held(
    program: Callable[..., Program], launcher: Path, tmp_path: Path
) -> None:
    path = tmp_path / "dump"
    environment = {**os.environ, "TRACTOR_HOST_SIGNALS": "SIGQUIT", "TRACTOR_HOST_DUMP": str(path)}
    with running(program(HOG, launcher="tractor-host"), "main", env=environment) as process:
        gil, _ = holder(launcher, process.pid, "hog")
        process.send_signal(signal.SIGQUIT)
        end = f"==== end of the dump of process {process.pid}\n"
        until(lambda: path.exists() and path.read_text().endswith(end), "a dump")
        assert process.poll() is None
    assert "SIGQUIT" in path.read_text().splitlines()[0]
    assert f"held by thread {gil['holder']} " in path.read_text()


def test_a_stderr_that_nobody_reads_holds_nobody_up(program: Callable[..., Program]) -> None:
    source = """
        import os, time
        import tractor_host as th

        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, b"x" * 4096)
        except BlockingIOError:
            pass
        os.set_blocking(2, True)
        try:
            th.dump(tree=False)
        except OSError as error:
            print(type(error).__name__, error, flush=True)
        """
    environment = {name: value for name, value in os.environ.items() if name != "TRACTOR_HOST_DUMP"}
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "wb") as err:
        process = program(source).start(stderr=err, env=environment)
        out, _ = process.communicate(timeout=PATIENCE)
    assert "nobody reads it" in out
