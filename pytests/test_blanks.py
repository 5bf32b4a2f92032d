"""Blanks: the idle processes that the fork server keeps ready. Who gets them, with what they begin, and that
nothing that happens to them, or to the fork server beside them, happens to a worker."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone
from helpers import blanks, importable, keeping, ready, until
from tractor_host import _native


def spawn(target: object, *args: object, **options: object) -> th.Worker:
    return th.spawn(target, *args, backend="forkserver", **options)  # type: ignore[arg-type]


def add() -> int:
    """The result of a worker that does next to nothing."""
    return int(spawn(targets.add, 1, 2).result(timeout=PATIENCE))


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def asleep(pid: int) -> None:
    """Waits until a blank has done all that it does without a task."""
    until(lambda: Path(f"/proc/{pid}/wchan").read_text().startswith("unix_stream"), "an idle blank")


def server() -> int:
    pid = _native.fork_server()
    assert pid is not None
    return pid


# -- who gets them -----------------------------------------------------------------------------------


def test_a_worker_is_a_blank_that_was_ready_and_another_one_takes_its_place() -> None:
    with keeping(1):
        (first,) = blanks()
        with spawn(targets.sleep, stdio="pipe") as worker:
            assert worker.pid == first
            (second,) = blanks()
            assert second != first
            with spawn(targets.sleep, stdio="pipe") as other:
                assert other.pid == second


@pytest.mark.parametrize("count", [0, 1, 5])
def test_there_are_so_many_as_were_asked_for(count: int) -> None:
    with keeping(count):
        assert len(blanks()) == th.statistics().blanks == count
        for _ in range(3):
            assert add() == 3
            assert len(blanks()) == th.statistics().blanks == count


def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACTOR_HOST_BLANKS", "3")
    with keeping(0):
        assert blanks() == []
    th.preload([])
    assert len(blanks()) == 3
    monkeypatch.setenv("TRACTOR_HOST_BLANKS", "0")
    th.preload([])
    assert add() == 3
    assert blanks() == []
    monkeypatch.delenv("TRACTOR_HOST_BLANKS")
    th.preload([])
    assert len(blanks()) == 1


@pytest.mark.parametrize("text", ["garbage", "-1", "1.5", "65", "9" * 5000, "٣"])
def test_a_number_in_the_environment_that_is_none_is_an_error(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACTOR_HOST_BLANKS", text)
    with pytest.raises(ValueError, match="TRACTOR_HOST_BLANKS must be a number from 0 to 64, not"):
        spawn(targets.nothing)
    with pytest.raises(ValueError, match="TRACTOR_HOST_BLANKS"):
        th.preload([])
    # Who asks for a number does not ask the environment; nor does who has no fork server.
    assert th.spawn(targets.add, 1, 2, backend="exec").result(timeout=PATIENCE) == 3


@pytest.mark.parametrize(
    ("count", "error"),
    [(-1, ValueError), (65, ValueError), ("1", TypeError), (True, TypeError), (1.0, TypeError)],
)
def test_a_number_that_is_none_is_an_error(count: object, error: type[Exception]) -> None:
    before = server()
    with pytest.raises(error, match="blanks must be"):
        th.preload([], blanks=count)  # type: ignore[arg-type]
    assert server() == before


@pytest.mark.parametrize("gil", ["shared", "own"])
def test_those_with_a_subinterpreter_are_made_once_one_was_wanted(gil: str) -> None:
    with keeping(2):
        plain = blanks()
        assert len(plain) == 2
        for _ in range(3):
            found = th.spawn(targets.add, 1, 2, backend="subint_forkserver", gil=gil)  # type: ignore[arg-type]
            assert found.result(timeout=PATIENCE) == 3
            assert found.pid not in plain
            assert len(blanks()) == 4
        assert add() == 3


def test_a_worker_s_own_fork_server_keeps_none() -> None:
    nested = th.Source(
        "import tractor_host as th\nfrom tractor_host import _native\n"
        "th.preload([])\n[th.spawn('math:factorial', 3).result(30), len(_native.fork_server_owns()['processes'])]"
    )
    assert spawn(nested).result(timeout=PATIENCE) == [6, 1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_many_are_spawned_at_once_by_one(count: int) -> None:
    """Faster than they can be made: orders that nobody waits for, and those that somebody does, come together."""
    with keeping(count):
        for _ in range(3):
            workers = [spawn(targets.give, index) for index in range(25)]
            assert [worker.result(timeout=PATIENCE) for worker in workers] == list(range(25))


def test_many_spawn_at_once() -> None:
    results: list[object] = []

    def spawn_some() -> None:
        try:
            results.extend(spawn(targets.give, index).result(timeout=PATIENCE) for index in range(13))
        except Exception as error:  # told to the main thread below
            results.append(error)

    with keeping(4):
        threads = [threading.Thread(target=spawn_some) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == sorted(list(range(13)) * 16)  # type: ignore[type-var]
        assert len(blanks()) == 4


# -- what a worker that was one begins with ----------------------------------------------------------


def test_it_has_the_limits_and_the_nice_value_of_the_moment(program: Callable[..., Program]) -> None:
    """Not those of when the blank was made, nor of when another order was."""
    ended = program(
        """
        import os, resource
        import tractor_host as th
        from helpers import blanks

        LOOK = th.Source("import os, resource; (resource.getrlimit(resource.RLIMIT_NOFILE), os.nice(0))")
        th.preload([], blanks=3)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for number in (100, 101, 100, 102, 103):
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
            os.nice(1)
            found = th.spawn(LOOK).result(30)
            assert found == ((number, hard), os.nice(0)), found
            assert len(blanks()) == 3
        print("good")
        """
    ).run(env=importable())
    assert (ended.stdout, ended.stderr) == ("good\n", "")


def test_its_name_is_its_own_only_as_a_worker() -> None:
    with keeping(1):
        (pid,) = blanks()
        until(lambda: Path(f"/proc/{pid}/comm").read_text() == "th-blank\n")
        with spawn(targets.sleep, stdio="pipe", name="mine") as worker:
            assert ready(worker).pid == pid
            assert Path(f"/proc/{pid}/comm").read_text() == "th:mine\n"


def test_no_two_draw_the_same_random_numbers() -> None:
    """Each is forked for itself, and what has to be sown anew in a child is."""
    draw = th.Source(
        "import os, random, tempfile, uuid; (random.random(), uuid.uuid4(), tempfile.mktemp(), os.getpid())"
    )
    with keeping(6, ["random", "tempfile", "uuid"]):
        workers = [spawn(draw) for _ in range(6)]
        drawn = [worker.result(timeout=PATIENCE) for worker in workers]
    assert [len(set(column)) for column in zip(*drawn, strict=True)] == [6] * 4
    assert [pid for *_, pid in drawn] == [worker.pid for worker in workers]


def test_what_a_preloaded_module_does_to_the_environment_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meddler.py").write_text("import os\nos.environ['MEDDLED'] = 'x'\ndel os.environ['GIVEN']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GIVEN", "1")
    with keeping(1, ["meddler"]):
        look = th.Source("import os; [os.environ.get('GIVEN'), os.environ.get('MEDDLED')]")
        assert spawn(look).result(timeout=PATIENCE) == ["1", None]
        assert spawn(look, env={"A": "\n=\n", "B": ""}).result(timeout=PATIENCE) == [None, None]
        environment = th.Source("import os; dict(os.environ)")
        assert spawn(environment, env={"A": "\n=\n", "B": ""}).result(timeout=PATIENCE) == {
            "A": "\n=\n",
            "B": "",
        }
        assert spawn(environment, env={}).result(timeout=PATIENCE) == {}


def test_hooks_of_a_fork_run_in_each_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooked.py").write_text(
        "import os\nran = []\nos.register_at_fork(after_in_child=lambda: ran.append(os.getpid()))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with keeping(1, ["hooked"]):
        for _ in range(2):
            found = spawn(th.Source("import hooked; hooked.ran"))
            assert found.result(timeout=PATIENCE) == [found.pid]


def test_its_output_is_what_the_host_gave_it(tmp_path: Path) -> None:
    look = th.Source(
        "import os, sys; print('x', end=''); (sys.stdout.tell(), sys.stdout.isatty(), sys.stdin.read())"
    )
    with keeping(1):
        path = tmp_path / "out"
        path.write_text("12345")
        assert spawn(look, stdio=path).result(timeout=PATIENCE) == (6, False, "")
        assert path.read_text() == "12345x"
        primary, secondary = os.openpty()
        try:
            worker = spawn(
                th.Source("import sys; print('line'); (sys.stdout.isatty(), sys.stdout.line_buffering)"),
                stdio=os.ttyname(secondary),
            )
            assert worker.result(timeout=PATIENCE) == (True, True)
        finally:
            os.close(primary)
            os.close(secondary)


# -- what happens to them ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_those_that_were_ended_are_passed_over(number: int) -> None:
    with keeping(3):
        ended = blanks()
        for pid in ended:
            asleep(pid)
            os.kill(pid, number)
        for pid in ended:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # of all its threads
        found = spawn(targets.add, 1, 2)
        assert found.result(timeout=PATIENCE) == 3
        assert found.pid not in ended
        assert not set(blanks()) & set(ended)
        # They have been waited for.
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ended)


def test_one_that_was_stopped_goes_on() -> None:
    with keeping(1):
        (pid,) = blanks()
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state(pid) == "T", "a stopped blank")
        found = spawn(targets.add, 1, 2)
        assert (found.result(timeout=PATIENCE), found.pid) == (3, pid)


def test_garbage_from_one_is_its_worker_s_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "babbler.py").write_text(
        "import os, stat\n"
        "def babble():\n"
        "    fds = [fd for fd in range(3, 50) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "    os.write(max(fd for fd in fds if stat.S_ISSOCK(os.fstat(fd).st_mode)), b'garbage' * 9)\n"
        "os.register_at_fork(after_in_child=babble)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with keeping(1, ["babbler"]):
        found = spawn(targets.sleep, stdio="null", kill_timeout=2).wait(timeout=PATIENCE)
        assert found.kind == "killed"
        assert "it broke the protocol of its channel" in found.cause
    assert add() == 3


def test_one_that_nobody_waits_for_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server can fork once, and then no more."""
    (tmp_path / "barren.py").write_text(
        f"import os, refusing\nos.register_at_fork(after_in_parent=lambda: refusing.forks({errno.EAGAIN}))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with keeping(2, ["barren"]):
        if len(blanks()) == 2:
            pytest.skip("this machine takes no seccomp filter")
        assert len(blanks()) == 1
        assert add() == 3
        assert blanks() == []
        # Who finds none is told.
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)) as refused:
                spawn(targets.nothing)
            assert refused.value.errno == errno.EAGAIN
    assert add() == 3


# -- what happens beside them ------------------------------------------------------------------------


def test_when_the_server_dies_they_go_with_it() -> None:
    with keeping(3):
        before, old = server(), blanks()
        os.kill(before, signal.SIGKILL)
        assert pid_is_gone(before)
        found = spawn(targets.add, 1, 2)
        assert found.result(timeout=PATIENCE) == 3
        assert server() != before
        assert found.pid not in old
        assert not any(os.path.exists(f"/proc/{pid}") for pid in old)


def test_when_the_server_dies_with_orders_pending_nothing_is_left() -> None:
    with keeping(2):
        (before, stopped) = blanks(), server()
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: state(stopped) == "T", "a stopped fork server")
        # They do not depend on it; those that are ordered in their places do.
        workers = [spawn(targets.add, 1, 2) for _ in range(2)]
        assert [worker.pid for worker in workers] == before
        assert [worker.result(timeout=PATIENCE) for worker in workers] == [3, 3]
        os.kill(stopped, signal.SIGKILL)
        assert pid_is_gone(stopped)
        assert add() == 3
        assert server() != stopped
        assert len(blanks()) == 2


def test_a_server_that_is_stopped_is_replaced_once_one_is_wanted() -> None:
    with keeping(1):
        (before, old) = server(), blanks()
        os.kill(before, signal.SIGSTOP)
        worker = spawn(targets.add, 1, 2)
        assert ([worker.pid], worker.result(timeout=PATIENCE)) == (old, 3)
        assert add() == 3  # after FORK_BOUND
        assert server() != before


def test_a_new_server_has_new_ones() -> None:
    with keeping(3):
        before = blanks()
        th.preload(["decimal"], blanks=2)
        assert len(blanks()) == 2
        assert not set(before) & set(blanks())
        assert not any(os.path.exists(f"/proc/{pid}") for pid in before)
        assert spawn(th.Source("import sys; 'decimal' in sys.modules")).result(timeout=PATIENCE) is True


END = """
import os, signal, sys, threading
import targets, tractor_host as th
from tractor_host import _native
how = sys.argv[1]
th.preload([], blanks=8)  # they are ordered; this does not wait for them
if how != "pending":
    th.spawn("os:getpid").result(timeout=30)
    th.spawn("os:getpid", backend="subint_forkserver").result(timeout=30)
    print(*_native.fork_server_owns()["processes"], flush=True)
if how == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
if how == "_exit": os._exit(0)
if how == "raise": raise ValueError
if how == "shutdown":
    _native.shutdown()
    print("left", [pid for pid in _native.resources()["children"]], flush=True)
    try:
        th.spawn("os:getpid")
    except RuntimeError:
        print("refused", flush=True)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "_exit", "raise", "return", "shutdown", "pending"])
def test_they_end_with_the_host(how: str, program: Callable[..., Program]) -> None:
    process = program(END).start(how, env=importable())
    with process:
        out, err = process.communicate(timeout=PATIENCE)
    first, *rest = [*out.splitlines(), ""]
    pids = [int(word) for word in first.split()]
    assert len(pids) == (0 if how == "pending" else 1 + 8 + 8), err
    assert [pid_is_gone(pid, timeout=1.0) for pid in pids] == [True] * len(pids)
    if how == "shutdown":
        assert rest == ["left []", "refused", ""]
    # Also those that nobody has told of: its session is empty.
    until(lambda: not in_session(process.pid), "the end of all that it had started", timeout=1.0)


def in_session(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(session) == leader and status != "Z":
            found.append(int(folder.name))
    return found


def test_a_forked_copy_of_the_host_does_not_keep_them_alive(program: Callable[..., Program]) -> None:
    """It has copies of their channels."""
    process = program(
        """
        import os, sys, time
        import tractor_host as th
        from tractor_host import _native
        th.spawn("os:getpid").result(timeout=30)
        pids = _native.fork_server_owns()["processes"]
        if os.fork() == 0:
            print(os.getpid(), *pids, flush=True)
            time.sleep(1000)
        time.sleep(1000)
        """
    ).start(env=importable())
    with process:
        assert process.stdout is not None
        copy, *pids = map(int, process.stdout.readline().split())
        assert len(pids) == 2
        process.kill()
        process.wait()
        try:
            assert [pid_is_gone(pid, timeout=1.0) for pid in pids] == [True] * 2
        finally:
            os.kill(copy, signal.SIGKILL)
