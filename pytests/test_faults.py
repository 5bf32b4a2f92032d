"""The operating system refuses, others meddle, workers misbehave: a spawn fails or works, nothing is left,
the next one works, and no end is lost or invented. What needs no descriptors, and what happens at the limits
of processes and of descriptors, is in test_bad_input.py."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import refusing
import targets
import tractor_host as th
from conftest import BACKENDS, PATIENCE, PROCESS_BACKENDS, Program, pid_is_gone
from helpers import children_of, importable, ready, until

x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")


def run(host: Program, *args: str) -> str:
    """What the program writes to stdout; it writes nothing to stderr."""
    ended = host.run(*args, timeout=60, env=importable())
    if ended.returncode == refusing.NO_FILTER:
        pytest.skip("this machine takes no seccomp filter")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    return ended.stdout


# -- many at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "beside"),
    [
        *((backend, "nobody") for backend in BACKENDS),
        *((backend, "subinterpreters") for backend in PROCESS_BACKENDS),
    ],
)
def test_two_hundred_spawns_from_sixteen_threads(backend: str, beside: str) -> None:
    results: list[int] = []
    failures: list[object] = []
    over = threading.Event()

    def spawn_some(first: int) -> None:
        try:
            workers = [th.spawn(targets.give, number, backend=backend) for number in range(first, first + 13)]
            results.extend(worker.result(timeout=PATIENCE) for worker in workers)
        except Exception as error:
            failures.append(error)

    def keep_making_subinterpreters(gil: str) -> None:
        while not over.is_set():
            found = th.spawn(targets.nothing, backend="subint", gil=gil).wait(timeout=PATIENCE)  # type: ignore[arg-type]
            if found.kind != "returned":
                failures.append(found)

    makers = [threading.Thread(target=keep_making_subinterpreters, args=[gil]) for gil in ("shared", "own")]
    spawners = [threading.Thread(target=spawn_some, args=[13 * index]) for index in range(16)]
    if beside == "nobody":
        makers = []
    for thread in [*makers, *spawners]:
        thread.start()
    for thread in spawners:
        thread.join()
    over.set()
    for thread in makers:
        thread.join()
    assert failures == []
    assert sorted(results) == list(range(13 * 16))


# -- no new process ------------------------------------------------------------------------------------

NO_FORKS = """
import os, sys
from collections import Counter
import helpers, refusing, targets, tractor_host as th

def attempt(backend, number):
    try:
        th.spawn(targets.nothing, backend=backend)
    except OSError as error:
        assert error.errno == number, error
        return str(error)
    sys.exit(f"{backend} has spawned")

def left():
    owned = helpers.resources()
    return Counter([*owned["fds"].values(), *owned["threads"], *owned["children"]])

def main():
    number = int(sys.argv[1])
    refusing.forks(number)
    th.spawn(targets.nothing, backend="subint").result(timeout=30)
    for backend in ("forkserver", "fork", "exec"):
        attempt(backend, number)  # what is started with the first one stays
        before = left()
        for _ in range(20):
            text = attempt(backend, number)
        helpers.until(lambda: left() <= before, "the end of all that was made")
        print(backend, text)
    assert th.workers() == []
    print(th.spawn(targets.add, 1, 2, backend="subint").result(timeout=30))

if __name__ == "__main__":
    main()
"""


@x86_64
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN], ids=["ENOMEM", "EAGAIN"])
def test_where_no_process_can_be_made_the_error_says_so_and_nothing_is_left(
    number: int, program: Callable[..., Program]
) -> None:
    *refused, worked = run(program(NO_FORKS), str(number)).splitlines()
    assert [line.split()[0] for line in refused] == ["forkserver", "fork", "exec"]
    assert all(os.strerror(number) in line for line in refused), refused
    assert worked == "3"


@pytest.fixture
def preloads_nothing_afterwards() -> Iterator[None]:
    yield
    th.preload([])


@x86_64
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN], ids=["ENOMEM", "EAGAIN"])
def test_a_fork_server_that_cannot_fork_says_so_and_another_one_can(
    number: int, tmp_path: Path, preloads_nothing_afterwards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cannot_fork.py").write_text(f"import refusing\nrefusing.forks({number})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        th.preload(["cannot_fork"])
    except RuntimeError:
        pytest.skip("this machine takes no seccomp filter")
    for _ in range(3):
        with pytest.raises(OSError, match=os.strerror(number)) as refused:
            th.spawn(targets.add, 1, 2, backend="forkserver")
        assert refused.value.errno == number
    assert th.workers() == []
    th.preload([])
    assert th.spawn(targets.add, 1, 2, backend="forkserver").result(timeout=PATIENCE) == 3


# -- refused calls -------------------------------------------------------------------------------------

REFUSED = """
import errno, os, sys
from collections import Counter
import helpers, refusing, targets, tractor_host as th

def left():
    owned = helpers.resources()
    return Counter([*owned["fds"].values(), *owned["threads"], *owned["children"]])

def main():
    call, number = map(int, sys.argv[1:3])
    for backend in ("subint", "forkserver", "fork", "exec"):
        th.spawn(targets.nothing, backend=backend).result(timeout=30)
    before = left()
    refusing.calls([call], number)
    for backend in ("forkserver", "fork", "exec"):
        for _ in range(5):
            try:
                worker = th.spawn(targets.add, 1, 2, backend=backend)
            except OSError as error:
                said = "refused", errno.errorcode[error.errno]
                continue
            exit = worker.wait(timeout=30)
            said = exit.kind, exit.cause
        print(backend, *said)
    # What was on its way out then is gone now; what is left each time would be more than that.
    helpers.until(lambda: left() <= before, "the end of all that was made")
    assert th.workers() == []

if __name__ == "__main__":
    main()
"""


@x86_64
@pytest.mark.parametrize(
    ("call", "number", "forkserver"),
    [
        (434, "EPERM", "returned"),  # pidfd_open; the fork server has one from clone
        (434, "ENOSYS", "returned"),
        (434, "EMFILE", "returned"),
        (319, "ENOMEM", "refused ENOMEM"),  # memfd_create
        (53, "ENFILE", "refused ENFILE"),  # socketpair
    ],
    ids=["pidfd_open-EPERM", "pidfd_open-ENOSYS", "pidfd_open-EMFILE", "memfd_create", "socketpair"],
)
def test_a_call_that_is_refused_fails_the_spawn_and_nothing_is_left(
    call: int, number: str, forkserver: str, program: Callable[..., Program]
) -> None:
    """To this process alone: its fork server was there before, and can do what it could."""
    said = dict(
        line.split(" ", 1)
        for line in run(program(REFUSED), str(call), str(getattr(errno, number))).splitlines()
    )
    assert said["forkserver"].startswith(forkserver), said
    assert (said["fork"], said["exec"]) == (f"refused {number}", f"refused {number}")


@x86_64
def test_a_worker_that_cannot_be_watched_is_ended_and_says_so(program: Callable[..., Program]) -> None:
    said = run(program(REFUSED), "233", str(errno.ENOSPC)).splitlines()  # epoll_ctl
    cause = "killed because the supervisor could not watch it, ended at `sigkill` "
    assert len(said) == 3
    for line, backend in zip(said, ("forkserver", "fork", "exec"), strict=True):
        assert line.startswith(f"{backend} killed {cause}(No space left on device"), said


# -- somebody else reaps -------------------------------------------------------------------------------

#: Every start that fails has made a process first.
FAILING_STARTS = """
import os, signal, sys, threading
import helpers, targets, tractor_host as th

def main():
    backend, how = sys.argv[1:]
    over = threading.Event()
    if how == "ignore":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    elif how == "reap":
        def reap():
            while not over.is_set():
                try:
                    os.wait()
                except ChildProcessError:
                    over.wait(0.0001)
        threading.Thread(target=reap, daemon=True).start()
    for _ in range(20):
        try:
            worker = th.spawn(targets.nothing, backend=backend, cwd="/not/there", stdio="null")
        except FileNotFoundError:
            continue
        assert worker.wait(timeout=30).kind == "exited", worker.exit
    print(th.spawn(targets.add, 1, 2, backend=backend).result(timeout=30), th.workers())
    over.set()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("how", ["nobody", "ignore", "reap"])
def test_a_start_that_fails_is_an_error_whoever_reaps(
    process_backend: str, how: str, program: Callable[..., Program]
) -> None:
    assert run(program(FAILING_STARTS), process_backend, how) == "3 []\n"


# -- a worker without descriptors ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forbidden", "used"])
@pytest.mark.parametrize("then", ["return", "raise"])
def test_a_worker_without_descriptors_tells_its_end_and_leaves_nobody(
    process_backend: str, then: str, how: str
) -> None:
    worker = th.spawn(targets.without_fds, then, how, backend=process_backend, stdio="pipe")
    found = worker.wait(timeout=PATIENCE)
    if then == "return":
        assert (found.kind, found.code) == ("returned", 0)
        assert worker.result() == "without descriptors"
    else:
        # A fresh process may not have loaded yet what it tells exceptions with: then its stderr has it.
        assert found.kind in ("raised", "exited")
        assert "ValueError: without descriptors" in found.cause + found.stderr
    kin = children_of(worker)
    assert len(kin) == 2
    assert all(pid_is_gone(pid) for pid in kin), "what it had started outlives it"


def test_a_host_without_descriptors_ends_a_worker_with_all_that_it_started(
    signalled_backend: str, program: Callable[..., Program]
) -> None:
    """Also what has left its session: to find that takes a look at /proc."""
    found = run(
        program(
            """
            import sys
            import helpers, targets, tractor_host as th

            if __name__ == "__main__":
                worker = th.spawn(targets.daemons, "ignore", backend=sys.argv[1], stdio="pipe", ladder={"sigkill": 5})
                helpers.until(lambda: len(helpers.children_of(worker)) == 2, "the daemons")
                pids = helpers.children_of(worker)
                with helpers.no_descriptor_left():
                    print(worker.kill().rung)
                print(*pids)
            """
        ),
        signalled_backend,
    )
    rung, pids = found.splitlines()
    assert rung == "sigkill"
    assert all(pid_is_gone(int(pid)) for pid in pids.split())


@pytest.mark.parametrize("rung", ["cancel", "interrupt", "sigterm", "sigkill"])
def test_a_worker_without_descriptors_is_ended_as_any_other(signalled_backend: str, rung: str) -> None:
    then = "ignore" if rung == "sigkill" else "sleep"
    ladder = {rung: 10.0, "sigkill": 10.0}
    worker = th.spawn(
        targets.without_fds, then, "used", backend=signalled_backend, stdio="pipe", ladder=ladder
    )
    ready(worker)
    found = worker.kill()
    assert (found.kind, found.rung) == ("cancelled" if rung == "cancel" else "killed", rung), found
    assert all(pid_is_gone(pid) for pid in children_of(worker)), "what it had started outlives it"


def test_a_worker_without_descriptors_hears_its_host_s_end(
    process_backend: str, program: Callable[..., Program]
) -> None:
    host = program(
        """
        import sys, time, helpers, targets, tractor_host as th
        worker = helpers.ready(th.spawn(targets.without_fds, "ignore", "used", backend=sys.argv[1], stdio="pipe"))
        print(worker.pid, *helpers.children_of(worker), flush=True)
        time.sleep(1000)
        """
    ).start(process_backend, env=importable())
    with host:
        assert host.stdout is not None
        pids = [int(word) for word in host.stdout.readline().split()]
        assert len(pids) == 3
        host.kill()
        host.wait()
        assert [pid_is_gone(pid) for pid in pids] == [True] * 3


# -- a channel that is closed, flooded, or held by another -----------------------------------------------

STARTED = '{"type":"started"}'


def test_a_flood_of_messages_keeps_nobody_waiting(process_backend: str) -> None:
    worker = th.spawn(
        targets.flood, STARTED, backend=process_backend, stdio="pipe", cancel_timeout=0.5, kill_timeout=2
    )
    ready(worker)
    for number in range(10):
        assert th.spawn(targets.give, number, backend=process_backend).result(timeout=PATIENCE) == number
    assert worker.state == "running"
    found = worker.kill()
    assert found.kind in ("cancelled", "killed"), found
    assert found.elapsed is not None
    assert found.elapsed < 5


def test_a_flood_of_what_is_no_message_ends_the_worker(process_backend: str) -> None:
    found = th.spawn(
        targets.flood, '{"type":"nonsense"}', backend=process_backend, stdio="null", kill_timeout=2
    ).wait(timeout=PATIENCE)
    assert found.kind == "killed"
    assert "it broke the protocol of its channel" in found.cause


def test_who_is_left_with_the_channel_of_a_dead_worker_keeps_nobody_waiting(signalled_backend: str) -> None:
    worker = th.spawn(targets.flood_by_orphans, STARTED, backend=signalled_backend, stdio="pipe")
    try:
        found = worker.wait(timeout=PATIENCE)
        assert (found.kind, found.signal) == ("signalled", signal.SIGKILL)
        assert th.spawn(targets.add, 1, 2, backend=signalled_backend).result(timeout=PATIENCE) == 3
    finally:
        for pid in children_of(worker):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has heard that the channel is closed
                pass
    assert all(pid_is_gone(pid) for pid in children_of(worker))


ALL_AT_ONCE = """
import sys, targets, tractor_host as th
found = th.spawn(targets.stop_the_host_send_garbage_and_leave, backend=sys.argv[1]).wait(timeout=60)
print(found.kind, found.code, found.rung, "|", found.cause.partition(":")[0])
"""


def test_garbage_before_an_end_of_its_own_does_not_make_it_one_of_ours(
    process_backend: str, program: Callable[..., Program]
) -> None:
    """Where the supervisor sees both at the same time: it was stopped meanwhile."""
    host = program(ALL_AT_ONCE).start(process_backend, env=importable())
    with host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        assert pid_is_gone(pid, timeout=PATIENCE)
        # Its other threads can be later than its main one.
        until(lambda: os.listdir(f"/proc/{pid}/task") == [str(pid)], "the end of all its threads")
        host.send_signal(signal.SIGCONT)
        out, err = host.communicate(timeout=PATIENCE)
    assert err == ""
    assert out == "exited 7 None | its process left with exit code 7, without a result\n"


def test_a_worker_that_closes_its_channel_can_be_killed(process_backend: str) -> None:
    worker = th.spawn(
        targets.close_channel,
        "close",
        backend=process_backend,
        stdio="pipe",
        cancel_timeout=1,
        kill_timeout=2,
    )
    # It leaves by itself where its reader finds the descriptor closed, before it has written, perhaps.
    until(lambda: worker.exit or b"ready" in worker.stdout, "a word or the end")
    found = worker.kill()
    assert found.kind in ("killed", "exited"), found
    assert found.elapsed is None or found.elapsed < 5


def test_a_worker_that_says_that_it_will_say_no_more_is_over(process_backend: str) -> None:
    """Its supervisor hangs up too, which it takes for the end of that."""
    worker = th.spawn(targets.close_channel, "shutdown", backend=process_backend, stdio="null")
    found = worker.wait(timeout=PATIENCE)
    assert found.kind in ("killed", "exited"), found
    with pytest.raises(th.WorkerError):
        worker.result()
