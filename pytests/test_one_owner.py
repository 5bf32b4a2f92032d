"""Workers of workers: the program's process owns all of them, whoever asked for them, and nothing that a
worker has asked for outlives it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helpers
import targets
import tractor_host as th
from conftest import PATIENCE, Program, pid_is_gone
from tractor_host import _native

#: Processes with nothing of the asking worker's memory.
AFRESH = ("forkserver", "subint_forkserver", "exec")
AFRESH_AND_PLAIN = ("forkserver", "exec")


@pytest.fixture(params=["shared", "own"])
def gil(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=AFRESH)
def inner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def nested(code: str, *args: object, backend: str = "forkserver", **options: Any) -> th.Worker:
    """A worker that runs `code`, in which `inner` is the backend that `args` begin with."""
    prologue = "import os, sys, time\nimport tractor_host as th\ninner = args[0]\n"
    return th.spawn(th.Source(prologue + code), *args, backend=backend, **options)


# -- who owns whom -----------------------------------------------------------------------------------


def test_a_worker_s_worker_is_the_program_s_child(process_backend: str, inner: str) -> None:
    code = "(os.getpid(), th.spawn('os:getppid', backend=inner).result(30))"
    pid, parent = nested(code, inner, backend=process_backend).result(timeout=PATIENCE)
    assert parent == os.getpid() != pid


def test_so_is_that_of_a_worker_s_subinterpreter(inner: str) -> None:
    code = """
sub = th.spawn(th.Source("import tractor_host as th\\nth.spawn('os:getppid', backend=args[0]).result(30)"),
               inner, backend="subint")
sub.result(30)
"""
    assert nested(code, inner).result(timeout=PATIENCE) == os.getpid()


def test_what_shares_memory_is_the_worker_s_own() -> None:
    code = "(os.getpid(), th.spawn('os:getppid', backend='fork').result(30))"
    pid, parent = nested(code, "").result(timeout=PATIENCE)
    assert pid == parent != os.getpid()


def test_any_depth(inner: str) -> None:
    pids = th.spawn(targets.spawn_again, [inner] * 4, backend="forkserver").result(timeout=PATIENCE)
    assert len(set(pids)) == 5


def test_the_program_sees_the_tree(process_backend: str) -> None:
    with th.spawn(
        targets.hang_in_a_chain, ["exec", "forkserver"], backend=process_backend, name="top"
    ) as top:
        helpers.until(lambda: len(th.workers()) == 3 and th.workers()[-1].state == "running")
        first, second, third = th.workers()
        assert (first.name, first.parent) == ("top", None)
        assert (second.name, second.parent) == ("deep-2", top.id)
        assert (third.name, third.parent) == ("deep-1", second.id)
        assert [worker.backend for worker in (second, third)] == ["exec", "forkserver"]
        assert third.kill().kind == "cancelled"
        # Whoever asked for it is told so, and fails for that.
        assert second.wait(timeout=PATIENCE).kind == "raised"
        with pytest.raises(th.RemoteError, match="WorkerCancelled"):
            top.result(timeout=PATIENCE)


def test_it_sees_what_a_worker_runs_by_itself_too(process_backend: str) -> None:
    chain = ["subint", "fork", "subint", "exec", "subint"]
    with th.spawn(targets.hang_in_a_chain, chain, backend=process_backend, name="top") as top:
        helpers.until(lambda: len(th.workers()) == 6 and th.workers()[-1].state == "running")
        found = sorted(th.workers(), key=lambda worker: worker.name)
        assert [worker.name for worker in found] == [*(f"deep-{index}" for index in range(1, 6)), "top"]
        assert [worker.backend for worker in found] == [*chain[::-1], process_backend]
        assert [worker.parent for worker in found[:-1]] == [worker.id for worker in found[1:]]
        assert next(worker.ladder for worker in found if worker.backend == "subint").keys() >= {"destroy"}
        # It can be ended from here, and who waits for it is told.
        deepest = found[0]
        assert deepest.kill().kind in ("killed", "cancelled")  # as it hangs already, or is about to
        with pytest.raises(th.RemoteError, match="WorkerKilled|WorkerCancelled"):
            top.result(timeout=PATIENCE)
    assert {worker.wait(timeout=PATIENCE).kind for worker in found[1:]} == {"raised"}
    assert th.workers() == []
    assert th.statistics().live == 0


def test_what_a_worker_ran_by_itself_has_ended_when_that_has(process_backend: str) -> None:
    with th.spawn(targets.hang_in_a_chain, ["subint"], backend=process_backend) as top:
        helpers.until(lambda: len(th.workers()) == 2 and th.workers()[-1].state == "running")
        below = th.workers()[-1]
        os.kill(top.pid or 0, signal.SIGKILL)
        top.wait(timeout=PATIENCE)
        assert below.exit is not None
        assert below.exit.cause == "the process that ran it has ended"


def test_a_subinterpreter_s_workers_are_shown_as_its_own() -> None:
    with th.spawn(targets.hang_in_a_chain, ["forkserver"], backend="subint", name="top") as top:
        helpers.until(lambda: len(th.workers()) == 2 and th.workers()[1].state == "running")
        below = th.workers()[1]
        assert below.parent == top.id
    # It hears of a cancellation where it waits for its worker, and ends that before itself.
    assert top.wait(timeout=PATIENCE).kind == "cancelled"
    assert below.exit is not None


# -- what it does ------------------------------------------------------------------------------------


def test_results_errors_and_output_go_to_who_asked(inner: str) -> None:
    code = """
good = th.spawn("math:factorial", 5, backend=inner).result(30)
big = len(th.spawn("operator:mul", b"x", 3 << 20, backend=inner).result(30))
try:
    th.spawn("json:loads", "{", backend=inner).result(30)
except th.RemoteError as error:
    raised = type(error.__cause__).__name__
loud = th.spawn(th.Source("import sys; print('out'); print('err', file=sys.stderr)"), backend=inner, stdio="pipe")
loud.wait(30)
try:
    th.spawn("no_such_module:f", backend=inner).result(30)
except th.RemoteError as error:
    missing = error.exit.cause
dead = th.spawn(th.Source("import os; os._exit(7)"), backend=inner).wait(30)
(good, big, raised, loud.stdout, loud.stderr, missing, dead.kind, dead.code)
"""
    good, big, raised, out, err, missing, kind, exit_code = nested(code, inner).result(timeout=PATIENCE)
    assert (good, big, raised, out, err) == (120, 3 << 20, "JSONDecodeError", b"out\n", b"err\n")
    assert "No module named 'no_such_module'" in missing
    assert (kind, exit_code) == ("exited", 7)


def test_large_things_descriptors_and_shared_ones_go_along(inner: str) -> None:
    code = """
reading, writing = os.pipe()
os.write(writing, b"hello")
held = th.share(b"s" * (2 << 20))
look = th.Source("import os\\n(len(args[0]), os.read(args[1].fileno(), 5), bytes(args[2].get()[:2]), b'x' * (3 << 20))")
*rest, back = th.spawn(look, b"a" * (4 << 20), th.Fd(reading), held, backend=inner).result(30)
(rest, len(back))
"""
    rest, back = nested(code, inner).result(timeout=PATIENCE)
    assert (rest, back) == ([4 << 20, b"hello", b"ss"], 3 << 20)


def test_inherited_output_goes_where_the_worker_s_goes(inner: str) -> None:
    code = "th.spawn('builtins:print', 'from below', backend=inner).result(30)"
    with nested(code, inner, stdio="pipe") as worker:
        worker.result(timeout=PATIENCE)
        assert worker.stdout == b"from below\n"


def test_it_starts_with_what_the_worker_has(inner: str, tmp_path: Path) -> None:
    code = """
import resource
LOOK = th.Source('''
import os, resource
mask = os.umask(0)
(os.getcwd(), mask, os.environ.get("COLOUR"), os.environ.get("HOME"),
 resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.nice(0), len(os.sched_getaffinity(0)))
''')
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
os.chdir(args[1])
os.umask(0o027)
os.environ["COLOUR"] = "red"
os.environ.pop("HOME", None)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.nice(3)
first = th.spawn(LOOK, backend=inner).result(30)
second = th.spawn(LOOK, backend=inner, cwd="/", env={"COLOUR": "blue", "HOME": "/x"}).result(30)
(first, second)
"""
    first, second = nested(code, inner, str(tmp_path)).result(timeout=PATIENCE)
    assert first == (str(tmp_path), 0o027, "red", None, 100, 3 + os.nice(0), 1)
    assert second == ("/", 0o027, "blue", "/x", 100, 3 + os.nice(0), 1)


def test_time_limits_cancellation_and_the_ladder(inner: str) -> None:
    code = """
import threading
late = th.spawn("time:sleep", 1000, backend=inner, timeout=0.2, cancel_timeout=5).wait(30)
asked = th.spawn(th.Source("import time\\nwhile True: time.sleep(0.01)"), backend=inner)
while asked.state != "running":
    time.sleep(0.001)
asked.cancel()
asked = asked.wait(30)
stubborn = th.spawn("targets:spin", backend=inner, cancel_timeout=0, kill_timeout=0.3)
while stubborn.state != "running":
    time.sleep(0.001)
stubborn = stubborn.kill()
[(exit.kind, exit.rung, exit.cause) for exit in (late, asked, stubborn)]
"""
    late, asked, stubborn = nested(code, inner).result(timeout=PATIENCE)
    assert late[:2] in (("cancelled", "cancel"), ("killed", "unblock"))
    assert "longer than its timeout of 0.2 s" in late[2]
    assert asked[:2] == ("cancelled", "cancel")
    assert stubborn[0] == "killed"


def test_a_worker_can_end_its_subinterpreters(process_backend: str, gil: str) -> None:
    code = """
worker = th.spawn("targets:spin_and_swallow", backend="subint", gil=args[1], cancel_timeout=0, kill_timeout=5)
while worker.state != "running":
    time.sleep(0.001)
exit = worker.kill()
(exit.kind, exit.rung, th.quarantine())
"""
    with nested(code, "", gil, backend=process_backend, stdio="pipe") as worker:
        kind, rung, abandoned = worker.result(timeout=PATIENCE)
        assert (kind, abandoned, worker.stderr) == ("killed", [], b"")
        assert rung in ("interrupt", "unwind", "unblock")


def test_bad_requests_fail_as_they_do_in_the_program(inner: str) -> None:
    code = """
def failure(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
(failure(lambda: th.spawn("os:getpid", backend=inner, cwd="/no/such/directory")),
 failure(lambda: th.spawn("os:getpid", backend=inner, ladder={"cancel": 1})),
 failure(lambda: th.spawn("os:getpid", backend=inner, name="a\\0b")))
"""
    missing, endless, nul = nested(code, inner).result(timeout=PATIENCE)
    assert missing[0] == "FileNotFoundError"
    assert "/no/such/directory" in missing[1]
    assert endless[0] == nul[0] == "ValueError"


def test_two_hundred_from_sixteen_threads_of_a_worker() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
def one(index):
    return th.spawn("operator:neg", index, backend=inner[index % len(inner)]).result(60)
with ThreadPoolExecutor(16) as pool:
    found = list(pool.map(one, range(208)))
found == [-index for index in range(208)]
"""
    assert nested(code, ["forkserver", "forkserver", "forkserver", "subint_forkserver"]).result(timeout=90)


# -- nothing outlives who asked ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_who_dies_takes_all_below_along(process_backend: str, number: signal.Signals) -> None:
    with th.spawn(
        targets.hang_in_a_chain, ["forkserver", "exec", "subint_forkserver"], backend=process_backend
    ) as top:
        helpers.until(lambda: len(th.workers()) == 4 and th.workers()[-1].state == "running")
        below = th.workers()[1:]
        pids = [worker.pid for worker in below]
        os.kill(top.pid or 0, number)
        ended = top.wait(timeout=PATIENCE)
        assert (ended.kind, ended.signal) == ("signalled", number)
        # Not a moment later.
        assert th.workers() == []
        assert all(pid is not None and pid_is_gone(pid) for pid in pids)
        causes = [worker.wait(timeout=PATIENCE) for worker in below]
        assert [ended.kind for ended in causes] == ["killed"] * 3
        assert {ended.rung for ended in causes} == {"sigkill"}
        assert "because the process that spawned it ended" in causes[0].cause


def test_who_is_killed_takes_all_below_along(process_backend: str) -> None:
    worker = th.spawn(
        targets.hang_in_a_chain, ["forkserver", "forkserver"], backend=process_backend, cancel_timeout=0
    )
    helpers.until(lambda: len(th.workers()) == 3 and th.workers()[-1].state == "running")
    pids = [worker.pid for worker in th.workers()]
    assert worker.kill().kind == "killed"
    assert th.workers() == []
    assert all(pid is not None and pid_is_gone(pid) for pid in pids)


def test_who_returns_takes_what_it_forgot_along(process_backend: str, inner: str) -> None:
    with th.spawn(targets.leave_a_sleeper, inner, backend=process_backend) as worker:
        pid = worker.result(timeout=PATIENCE)
        assert pid_is_gone(pid)
        assert th.workers() == []


def test_a_worker_that_ends_while_one_is_made_for_it(program: Callable[..., Program]) -> None:
    """The fork server is stopped when the worker asks, and goes on once that is dead."""
    ended = program(
        """
        import os, signal, threading, tractor_host as th
        from tractor_host import _native

        if __name__ == "__main__":
            asking = th.Source("import tractor_host as th\\nth.spawn('time:sleep', 1000).result(30)")
            with th.spawn(asking, backend="exec") as asker:
                while asker.state != "running":
                    pass
                th.spawn("os:getpid").result(30)
                server = _native.fork_server()
                os.kill(server, signal.SIGSTOP)
                while not any(thread == "th-clerk" for thread in _native.resources()["threads"]):
                    pass
                asker.kill()
                os.kill(server, signal.SIGCONT)
            th.spawn("os:getpid").result(30)
            while th.workers():
                pass
            print(th.statistics().live, "left")
        """
    ).run()
    assert ended.stdout == "0 left\n", ended.stderr


ASKING = """
import os
import tractor_host as th

def attempt():
    try:
        return th.spawn("math:factorial", 5, backend=args[0]).result(30)
    except OSError as error:
        return error.errno

found = [attempt()]
while os.read(args[1].fileno(), 1):
    found.append(attempt())
    os.write(args[2].fileno(), b"!")
found
"""


def test_a_program_without_descriptors_says_so_to_who_asks(
    inner: str, program: Callable[..., Program]
) -> None:
    ended = program(
        f"""
        import errno, os, sys
        import helpers, tractor_host as th

        if __name__ == "__main__":
            asks, answers = os.pipe(), os.pipe()
            worker = th.spawn(th.Source({ASKING!r}), sys.argv[1], th.Fd(asks[0]), th.Fd(answers[1]), backend="exec")
            os.write(asks[1], b"!")
            os.read(answers[0], 1)
            # Once another one has come and gone, all of the last one is.
            th.spawn("os:getpid", backend="subint").result(30)
            assert len(th.workers()) == 1
            with helpers.no_descriptor_left():
                os.write(asks[1], b"!")
                os.read(answers[0], 1)
            os.write(asks[1], b"!")
            os.read(answers[0], 1)
            os.close(asks[1])
            print(*worker.result(30), errno.EMFILE, th.workers())
        """
    ).run(inner, env=helpers.importable())
    assert (ended.stdout, ended.stderr) == ("120 120 24 120 24 []\n", "")


# -- who must do it alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "confine",
    [
        "import ctypes; assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0",
        pytest.param(
            "os.setresgid(54321, 54321, 54321)",
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else"),
        ),
    ],
    ids=["no_new_privs", "another group"],
)
@pytest.mark.parametrize("kind", AFRESH_AND_PLAIN)
def test_a_confined_worker_s_workers_are_its_own(confine: str, kind: str) -> None:
    """They must not get out by way of a process that is free."""
    code = f"""
{confine}
LOOK = th.Source('''
import os
status = open("/proc/self/status").read()
(os.getppid(), os.getgid(), [line for line in status.splitlines() if line.startswith("NoNewPrivs")])
''')
(os.getpid(), os.getgid(), *th.spawn(LOOK, backend=inner).result(30), th.workers())
"""
    pid, gid, parent, inner_gid, privileges, left = nested(code, kind).result(timeout=PATIENCE)
    assert (parent, inner_gid, left) == (pid, gid, [])
    assert (privileges == ["NoNewPrivs:\t1"]) == ("prctl" in confine)


def test_a_worker_that_preloads_has_a_fork_server_of_its_own() -> None:
    before = _native.fork_server()
    code = """
import sys
th.preload(["fractions"])
(os.getpid(), th.spawn(th.Source("import os, sys; (os.getppid(), 'fractions' in sys.modules)")).result(30))
"""
    pid, (parent, there) = nested(code, "").result(timeout=PATIENCE)
    assert (pid, True) == (parent, there)
    assert _native.fork_server() == before


# -- who asks for nonsense ---------------------------------------------------------------------------

WISH = {"type": "about", "id": 1}
MEANS = {"limits": [], "nice": 0, "processors": []}
SPAWN = {"type": "spawn", "standing": {"umask": 0, "means": MEANS}, "roles": [], "parent": None}


@pytest.mark.parametrize(
    "wish",
    [
        {**SPAWN, "request": {}},
        {**SPAWN, "request": None, "roles": ["stdout", "stdout", "directory"]},
        {"type": "cancel"},
        {"type": "kill", "why": "owner_died"},
    ],
    ids=["no request", "no descriptors", "cancel nobody", "kill nobody"],
)
def test_nonsense_harms_nobody(wish: dict[str, Any]) -> None:
    code = "from tractor_host import _native\n_native.child_send(args[1], b'', None)\n'went on'"
    assert nested(code, "", {**WISH, "wish": wish}).result(timeout=PATIENCE) == "went on"


def test_descriptors_that_nobody_asked_for_are_a_breach_of_protocol() -> None:
    code = """
import array, socket
fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
for fd in range(3, 100):
    try:
        channel = socket.socket(fileno=os.dup(fd))
        if channel.family != socket.AF_UNIX:
            raise OSError
    except OSError:
        continue
    for part in (b"TH", b"\\0\\x01"):
        channel.sendmsg([part], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
time.sleep(1000)
"""
    ended = nested(code, "").wait(timeout=PATIENCE)
    assert ended.kind == "killed"
    assert "more descriptors than it has told what for" in ended.cause


def test_a_worker_spawns_what_is_in_the_main_module(program: Callable[..., Program], backend: str) -> None:
    ended = program(
        """
        import sys
        import tractor_host as th

        def leaf():
            return __name__

        def middle(backend):
            return th.spawn(leaf, backend=backend).result(30)

        if __name__ == "__main__":
            for other in ("subint", "forkserver", "subint_forkserver", "fork", "exec"):
                print(th.spawn(middle, other, backend=sys.argv[1]).result(30))
        """
    ).run(backend)
    names = ended.stdout.split()
    # A fork of the program's has that one's own.
    assert names.pop(3) in ("__main__", "__mp_main__"), ended.stderr
    assert names == ["__mp_main__"] * 4
