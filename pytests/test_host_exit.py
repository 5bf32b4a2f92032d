"""The end of a program with workers in it: its own exit code, in bounded time, and nobody is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from conftest import PATIENCE, Program, pid_is_gone

pytestmark = pytest.mark.outside

LAUNCHERS = ("python", "tractor-host")
WITH_WORKERS = """
    import sys, time
    import tractor_host as th
    from tractor_host import testing

    def main(end):
        workers = [
            th.spawn("tractor_host.testing:stuck", shape, backend=backend, stdio="pipe", cancel_timeout=0.2)
            for backend in ("subint", "forkserver", "fork", "exec") for shape in ("swallow", "sleep")
        ]
        for worker in workers:
            testing.wait_ready(worker)
        print(*(worker.pid for worker in workers if worker.pid), flush=True)
        if end == "raise":
            raise ZeroDivisionError
        if end == "wait":
            workers[0].wait()
        if end == "atexit":
            import atexit
            atexit.register(th.spawn, "os:getpid")
            return
        sys.exit(int(end))

    if __name__ == "__main__":
        main(sys.argv[1])
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("end", "code"), [("0", 0), ("3", 3), ("raise", 1)])
def test_it_ends_with_its_own_code_and_takes_its_workers_along(
    program: Callable[..., Program], end: str, code: int, launcher: str
) -> None:
    ran = program(WITH_WORKERS, launcher=launcher).run(end, timeout=PATIENCE)
    assert ran.returncode == code, ran.stderr
    assert ("ZeroDivisionError" in ran.stderr) == (end == "raise")
    if end != "raise":
        assert ran.stderr == ""
    assert all(pid_is_gone(int(pid)) for pid in ran.stdout.split())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_ends_a_wait_and_then_the_workers(program: Callable[..., Program], launcher: str) -> None:
    host = program(WITH_WORKERS, launcher=launcher).start("wait", start_new_session=True)
    with host:
        assert host.stdout is not None
        pids = host.stdout.readline().split()
        host.send_signal(signal.SIGINT)
        _, err = host.communicate(timeout=PATIENCE)
    assert host.returncode == -signal.SIGINT, err
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert len(pids) == 6
    assert all(pid_is_gone(int(pid)) for pid in pids)


def test_spawning_after_the_end_is_refused(program: Callable[..., Program]) -> None:
    ran = program(
        """
        import atexit
        import tractor_host as th

        # Registered first, so that it runs after the supervisor's own.
        atexit.register(lambda: th.spawn("os:getpid"))
        print(th.spawn("math:sqrt", 4).result(30))
        """
    ).run()
    assert ran.stdout == "2.0\n"
    assert "RuntimeError: tractor_host is shutting down: no worker can be spawned any more" in ran.stderr


def test_other_ways_to_run_things_go_on_working(program: Callable[..., Program]) -> None:
    ran = program(
        """
        import concurrent.futures, multiprocessing, subprocess, sys
        import tractor_host as th

        if __name__ == "__main__":
            with th.spawn("time:sleep", 1000, backend="fork"), th.spawn("time:sleep", 1000, backend="exec"):
                ran = subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True)
                assert ran.stdout == b"1\\n"
                with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    assert pool.submit(pow, 2, 5).result(30) == 32
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    assert pool.submit(pow, 2, 5).result(30) == 32
            print("good")
        """
    ).run()
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "good\n", "")


def test_a_worker_that_nobody_holds_is_ended_with_the_program(program: Callable[..., Program]) -> None:
    ran = program(
        """
        import warnings
        import tractor_host as th

        warnings.simplefilter("ignore", ResourceWarning)
        print(th.spawn("time:sleep", 1000, backend="fork", stdio="null").pid)
        """
    ).run()
    assert ran.returncode == 0
    assert not os.path.exists(f"/proc/{ran.stdout.strip()}")
