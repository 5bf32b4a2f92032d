"""The fork server: whose children workers are, what they start with, what it preloads, and that nothing
that happens to it happens to them. What all process backends promise is in the other files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import helpers
import targets
import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone
from helpers import importable
from tractor_host import _native


def server() -> int:
    """The pid of the fork server, which is there since the first test."""
    pid = _native.fork_server()
    assert pid is not None
    return pid


def spawn(target: object, *args: object, **options: object) -> th.Worker:
    return th.spawn(target, *args, backend="forkserver", **options)  # type: ignore[arg-type]


@pytest.fixture
def preloads_nothing_afterwards() -> Iterator[None]:
    yield
    th.preload([])


# -- what a worker is --------------------------------------------------------------------------------


def test_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACTOR_HOST_BACKEND", raising=False)
    with th.spawn("time:sleep", 1000) as worker:
        assert worker.backend == "forkserver"


def test_workers_are_children_of_the_host_and_not_of_the_server() -> None:
    assert spawn("os:getppid").result(timeout=PATIENCE) == os.getpid()
    # Whoever asks the kernel for a child's exit status is told that of a worker.
    with spawn("time:sleep", 1000) as worker:
        assert worker.pid in _native.resources()["children"]


def test_the_host_s_memory_is_not_in_it(program: Callable[..., Program]) -> None:
    found = program(
        """
        import decimal, sys
        import tractor_host as th
        print(th.spawn(th.Source("import sys; 'decimal' in sys.modules")).result(30))
        """
    ).run()
    assert (found.stdout, found.stderr) == ("False\n", "")


def test_a_worker_is_a_process_like_any_other() -> None:
    """In particular for glibc, which keeps the id of a thread in more than one place."""
    found = spawn(
        th.Source(
            """
import os, signal, subprocess, sys, threading, time
caught = []
signal.signal(signal.SIGUSR1, lambda *_: caught.append("signal"))
signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
threading.Thread(target=lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)).start()
while len(caught) < 2:
    time.sleep(0.001)
assert threading.get_native_id() == os.getpid()
assert threading.current_thread() is threading.main_thread()
assert time.clock_gettime(time.pthread_getcpuclockid(threading.get_ident())) >= 0
if (pid := os.fork()) == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
subprocess.run(["true"], check=True)
from concurrent import interpreters
made = interpreters.create()
made.exec("import threading; t = threading.Thread(target=print); t.start(); t.join()")
made.close()
import multiprocessing
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.map(abs, [-1]) == [1]
"good"
"""
        ),
        stdio="pipe",
    )
    assert found.result(timeout=PATIENCE) == "good", found.stderr


def test_no_two_workers_draw_the_same_random_numbers(preloads_nothing_afterwards: None) -> None:
    th.preload(["random", "uuid"])
    draw = th.Source("import random, uuid; (random.random(), uuid.uuid4())")
    drawn = [spawn(draw).result(timeout=PATIENCE) for _ in range(5)]
    assert len({number for number, _ in drawn}) == len({uuid for _, uuid in drawn}) == 5


# -- what it starts with -----------------------------------------------------------------------------


def test_it_starts_as_if_the_host_had_started_it(program: Callable[..., Program], tmp_path: Path) -> None:
    """With what the host is now, not with what it was when the fork server was started."""
    found = program(
        """
        import os, resource, sys, time
        import tractor_host as th

        LOOK = th.Source('''
        import os, resource, sys, time
        mask = os.umask(0)
        (os.getcwd(), mask, os.environ.get("COLOUR"), os.environ.get("GONE"), time.tzname[0], sys.argv,
         resource.getrlimit(resource.RLIMIT_NOFILE), os.nice(0), os.sched_getaffinity(0), "new entry" in sys.path)
        ''')
        os.environ["GONE"] = "x"
        th.preload([])
        del os.environ["GONE"]
        os.environ.update(COLOUR="red", TZ="XYZ-3")
        os.chdir(sys.argv[1])
        os.umask(0o027)
        sys.argv[1:] = ["changed"]
        sys.path.append("new entry")
        limits = (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.nice(3)
        processor = {max(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, processor)
        wanted = (os.getcwd(), 0o027, "red", None, "XYZ", sys.argv, limits, os.nice(0), processor, True)
        found = th.spawn(LOOK).result(30)
        assert found == wanted, (found, wanted)
        os.rmdir(os.getcwd())  # it can start in a directory that is there no more, too
        assert th.spawn(LOOK, cwd="/").result(30)[0] == "/"
        assert th.spawn("os:getpid").result(30) > 0
        print("good")
        """
    )
    there = tmp_path / "there"
    there.mkdir()
    ended = found.run(str(there))
    assert (ended.stdout, ended.stderr) == ("good\n", "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_host_that_becomes_another_user_gets_workers_of_that_user(program: Callable[..., Program]) -> None:
    ended = program(
        """
        import os, tractor_host as th
        assert th.spawn("os:getuid").result(30) == 0
        th.preload(["tractor_host._remote"])
        os.setresuid(0, 54321, 0)
        os.seteuid(0)
        os.setresgid(54321, 54321, 54321)
        print(th.spawn("os:getresgid").result(30))
        """
    ).run()
    assert ended.stdout == "(54321, 54321, 54321)\n", ended.stderr


def test_it_has_nothing_open_but_what_it_was_given() -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        with spawn(targets.sleep, stdio="pipe") as worker:
            helpers.ready(worker)
            links = [os.readlink(path) for path in Path(f"/proc/{worker.pid}/fd").iterdir()]
            ours = os.readlink(f"/proc/self/fd/{writing}")
            assert ours not in links
            kinds = sorted(link.partition(":")[0] for link in links)
            # stdin, what collects stdout and stderr, the record of a crash, the channel, the host's pidfd.
            assert set(kinds) <= {"/dev/null", "/memfd", "socket", "anon_inode"}, links
            assert kinds.count("anon_inode") == 1, links
            assert kinds.count("socket") == 2, links
    finally:
        os.close(reading)
        os.close(writing)


def test_what_a_preloaded_module_holds_open_is_useless_in_workers(
    tmp_path: Path, preloads_nothing_afterwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "holder.py").write_text(
        f"log = open({str(tmp_path / 'log')!r}, 'w')\ndef use():\n    log.write('x')\n    log.flush()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    th.preload(["holder"])
    found = spawn("holder:use")
    with pytest.raises(th.RemoteError) as raised:
        found.result(timeout=PATIENCE)
    assert isinstance(raised.value.__cause__, OSError)
    assert (tmp_path / "log").read_text() == ""


# -- preloading --------------------------------------------------------------------------------------

LOADED = th.Source("import sys; sorted(name for name in args if name in sys.modules)")


def test_modules_are_imported_once_for_all_workers(preloads_nothing_afterwards: None) -> None:
    assert spawn(LOADED, "decimal", "fractions").result(timeout=PATIENCE) == []
    before = server()
    th.preload(["decimal", "fractions"])
    assert pid_is_gone(before)
    assert spawn(LOADED, "decimal", "fractions").result(timeout=PATIENCE) == ["decimal", "fractions"]
    th.preload([])
    assert spawn(LOADED, "decimal", "fractions").result(timeout=PATIENCE) == []


def test_workers_live_on_when_something_else_is_preloaded(preloads_nothing_afterwards: None) -> None:
    with spawn(targets.sleep, stdio="pipe") as worker:
        helpers.ready(worker)
        th.preload(["decimal"])
        assert worker.state == "running"


def test_a_module_that_cannot_be_preloaded_is_told_with_its_traceback(
    tmp_path: Path, preloads_nothing_afterwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def inner():\n    raise ZeroDivisionError('so it is')\ninner()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError) as raised:
        th.preload(["decimal", "broken", "not_there"])
    text = str(raised.value)
    assert text.startswith("failed to preload 'broken', 'not_there'\n")
    assert 'broken.py", line 2, in inner' in text
    assert "ZeroDivisionError: so it is" in text
    assert "ModuleNotFoundError: No module named 'not_there'" in text
    assert raised.value.name == "broken"
    # The others are there, and it works.
    assert spawn(LOADED, "decimal", "broken").result(timeout=PATIENCE) == ["decimal"]


def test_the_environment_names_modules_too(program: Callable[..., Program]) -> None:
    ended = program(
        """
        import warnings
        import tractor_host as th
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = th.spawn(th.Source("import sys; 'decimal' in sys.modules")).result(30)
            th.spawn("os:getpid").result(30)
        (warning,) = caught
        print(found, warning.category.__name__, str(warning.message).splitlines()[0], warning.filename == __file__)
        """
    ).run(env={**os.environ, "TRACTOR_HOST_PRELOAD": "decimal, not_there,"})
    expected = (
        "True RuntimeWarning 'not_there' could not be preloaded; workers will import it themselves True\n"
    )
    assert (ended.stdout, ended.stderr) == (expected, "")


def test_a_module_that_starts_a_thread_is_refused_by_name(
    tmp_path: Path, preloads_nothing_afterwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, name='lingers', daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"starts threads \(there are th-zygote, lingers then\)"):
        th.preload(["threaded"])
    # Nothing has changed.
    assert spawn("os:getpid").result(timeout=PATIENCE)
    monkeypatch.setenv("TRACTOR_HOST_PRELOAD", "threaded")
    before = server()
    os.kill(before, signal.SIGKILL)
    assert pid_is_gone(before)
    with pytest.raises(RuntimeError, match=r"the fork server has 2 threads \(th-zygote, lingers\)"):
        spawn("os:getpid")


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        ("decimal", TypeError),
        ([3], TypeError),
        (["not a name"], ValueError),
        ([""], ValueError),
        (3, TypeError),
    ],
)
def test_what_is_no_list_of_modules_is_refused(modules: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        th.preload(modules)  # type: ignore[arg-type]


def test_a_module_that_ends_the_server_is_told(
    tmp_path: Path, preloads_nothing_afterwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text("import os\nos.write(2, b'last words')\nos._exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="(?s)the fork server did not start: .*last words"):
        th.preload(["deadly"])


# -- what happens to the server ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_server_that_dies_is_replaced_and_no_worker_notices(number: int) -> None:
    with spawn(targets.sleep, stdio="pipe") as worker:
        helpers.ready(worker)
        before = server()
        os.kill(before, number)
        assert pid_is_gone(before)
        assert spawn(targets.add, 1, 2).result(timeout=PATIENCE) == 3
        assert server() != before
        assert worker.state == "running"


def test_signals_that_can_be_caught_do_not_concern_it() -> None:
    before = server()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(before, number)
    assert spawn(targets.add, 1, 2).result(timeout=PATIENCE) == 3
    assert server() == before


def test_a_server_that_is_stopped_is_replaced() -> None:
    with helpers.keeping(0):
        before = server()
        os.kill(before, signal.SIGSTOP)
        assert spawn(targets.add, 1, 2).result(timeout=PATIENCE) == 3
        assert server() != before
        assert not os.path.exists(f"/proc/{before}")


def test_it_dies_again_and_again_while_many_spawn() -> None:
    over = threading.Event()
    results: list[object] = []

    def spawn_some() -> None:
        for index in range(25):
            try:
                results.append(
                    spawn(targets.add, index, 1, stdio="null").result(timeout=PATIENCE) == index + 1
                )
            except Exception as error:  # told to the main thread below
                results.append(error)

    threads = [threading.Thread(target=spawn_some) for _ in range(8)]
    for thread in threads:
        thread.start()

    def kill_it() -> None:
        for _ in range(20):
            if over.wait(0.05):
                return
            if (pid := _native.fork_server()) is not None:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    for thread in threads:
        thread.join()
    over.set()
    killer.join()
    assert len(results) == 200
    # A spawn is tried twice; who was hit both times is told so. None is lost, and none is made up.
    told = [result for result in results if result is not True]
    assert all("fork server" in str(error) for error in told), told
    assert len(told) <= 40, told
    assert spawn(targets.add, 1, 2).result(timeout=PATIENCE) == 3


def test_many_spawn_at_once() -> None:
    results: list[object] = []

    def spawn_some() -> None:
        results.extend(spawn(targets.add, index, 1).result(timeout=PATIENCE) for index in range(13))

    threads = [threading.Thread(target=spawn_some) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(list(range(1, 14)) * 16)  # type: ignore[type-var]


@pytest.mark.parametrize("how", ["SIGKILL", "exit", "raise"])
def test_it_ends_with_the_host(how: str, program: Callable[..., Program]) -> None:
    process = program(
        """
        import os, signal, sys
        import helpers, targets, tractor_host as th
        from tractor_host import _native
        worker = helpers.ready(th.spawn(targets.ignore_signals, stdio="pipe", cancel_timeout=0.1, kill_timeout=1))
        print(_native.fork_server(), worker.pid, flush=True)
        if sys.argv[1] == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "raise": raise ValueError
        """
    ).start(how, env=importable())
    with process:
        out, _ = process.communicate(timeout=PATIENCE)
    for pid in map(int, out.split()):
        assert pid_is_gone(pid, timeout=3.0)


# -- where calls are refused -------------------------------------------------------------------------

#: Makes the kernel refuse calls from now on, in this process and all that it starts.
REFUSE = """
import ctypes, struct, sys
import tractor_host as th

def refuse(numbers, errno):
    libc = ctypes.CDLL(None, use_errno=True)
    code = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the call's number
    for index, number in enumerate(numbers):
        code.append(struct.pack("HBBI", 0x15, len(numbers) - index, 0, number))
    code.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
    code.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | errno))
    text = ctypes.create_string_buffer(b"".join(code))
    filter = struct.pack("HxxxxxxP", len(code), ctypes.addressof(text))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    if libc.prctl(22, 2, filter, 0, 0) != 0:
        sys.exit(99)

def main():
    refuse(list(map(int, sys.argv[2].split(","))), int(sys.argv[1]))
    if sys.argv[2] == "434":
        for backend in ("forkserver", "fork", "exec"):
            try:
                th.spawn("math:sqrt", 16, backend=backend)
            except OSError as error:
                print(backend, error.errno, str(error).partition(" of ")[0].partition("] ")[2])
        print(th.spawn("math:sqrt", 16, backend="subint").result(30), th.workers())
        return
    print(th.spawn("math:sqrt", 16).result(30))
    print(th.spawn("time:sleep", 1000, cancel_timeout=0, ladder=None).kill().kind)

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")
@pytest.mark.parametrize(
    ("errno", "numbers"),
    # glibc itself makes no thread where clone3 is refused with EPERM.
    [("38", "435"), ("38", "436"), ("38", "435,436"), ("1", "436")],
    ids=["ENOSYS-clone3", "ENOSYS-close_range", "ENOSYS-both", "EPERM-close_range"],
)
def test_it_works_where_a_filter_refuses_new_calls(
    errno: str, numbers: str, program: Callable[..., Program]
) -> None:
    ended = program(REFUSE).run(errno, numbers)
    if ended.returncode == 99:
        pytest.skip("this machine takes no seccomp filter")
    assert (ended.stdout, ended.stderr) == ("4.0\nkilled\n", "")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")
def test_where_pidfds_are_refused_no_process_is_made_and_the_error_says_so(
    program: Callable[..., Program],
) -> None:
    ended = program(REFUSE).run("38", "434")
    if ended.returncode == 99:
        pytest.skip("this machine takes no seccomp filter")
    lines = [f"{backend} 38 failed to open a pidfd" for backend in ("forkserver", "fork", "exec")]
    assert (ended.stdout.splitlines(), ended.stderr) == ([*lines, "4.0 []"], "")


def test_as_the_first_process_of_a_pid_namespace(program: Callable[..., Program]) -> None:
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespace can be made here")
    first = program(
        """
        import os, sys
        import tractor_host as th
        if __name__ == "__main__":
            assert os.getpid() == 1
            for backend in ("forkserver", "fork", "exec", "subint"):
                print(th.spawn("os:getppid", backend=backend).result(30))
                print(th.spawn("time:sleep", 1000, backend=backend, cancel_timeout=0).kill().kind)
            sys.exit(3)
        """
    )
    first.command = [*alone, *first.command]
    ended = first.run()
    assert (ended.stdout, ended.stderr) == ("1\nkilled\n" * 3 + "0\nkilled\n", "")
    assert ended.returncode == 3


def test_python_is_the_one_of_the_host() -> None:
    assert spawn(th.Source("import sys; sys.prefix")).result(timeout=PATIENCE) == sys.prefix


@pytest.mark.parametrize("garbage", ["b'x' * 1000", "bytes(1000)", "b'\\xff' * 3"])
def test_a_server_that_is_fed_garbage_is_replaced(garbage: str, program: Callable[..., Program]) -> None:
    ended = program(
        f"""
        import os
        import tractor_host as th
        from conftest import pid_is_gone
        from tractor_host import _native

        th.spawn("os:getpid").result(timeout=30)
        server = _native.fork_server()
        own = _native.fork_server_owns()["fds"][:3]
        (socket,) = (fd for fd in own if os.readlink(f"/proc/self/fd/{{fd}}").startswith("socket:"))
        os.write(socket, {garbage})
        assert pid_is_gone(server)
        for _ in range(2):
            print(th.spawn("math:factorial", 5).result(timeout=30), _native.fork_server() != server)
        """
    ).run(env=importable())
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "120 True\n" * 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tractor-host: the fork server ")
