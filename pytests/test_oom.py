"""Who is named as the sender of a SIGKILL that nobody here sent: the kernel's out-of-memory killer, if its
counters say so. In a memory cgroup with a limit, where one can be made."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import importable, ready, until

UNSENT = "its process was ended by SIGKILL (killed); the supervisor did not send it "
KERNEL = "the kernel's out-of-memory killer"
PROBABLY = (
    rf"\(probably {KERNEL}: the worker's cgroup has counted 1 more oom_kill since the worker was made\)"
)
POSSIBLY = (
    rf"\(possibly {KERNEL}: this machine has counted \d+ more oom_kill since .*; or somebody's kill -9\)"
)
UNKNOWN = rf"\({KERNEL}, or somebody's kill -9\)"


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup that may have 192 MB, with nobody in it."""
    membership = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    mounts = re.findall(r"^\S+ \S+ \S+ / (\S+) .* - (cgroup2?) \S+ (\S+)$", _mountinfo(), re.MULTILINE)
    v1 = "memory" in membership
    points = [
        point
        for point, kind, options in mounts
        if ((kind == "cgroup" and "memory" in options.split(",")) if v1 else kind == "cgroup2")
    ]
    if not points:
        pytest.skip("no memory cgroups are mounted here as a whole")
    made = Path(points[0]) / membership["memory" if v1 else ""].lstrip("/") / f"th-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            (made / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(192 << 20))
            # Or it would swap instead.
            for name, value in (("memory.swappiness", "0"), ("memory.swap.max", "0")):
                if (made / name).exists():
                    (made / name).write_text(value)
            counters = (made / ("memory.oom_control" if v1 else "memory.events")).read_text()
        except OSError as error:
            pytest.skip(f"no cgroup can be given a limit of memory here: {error}")
        if "oom_kill " not in counters:
            pytest.skip("this kernel does not count what its out-of-memory killer does")
        yield made
    finally:
        # Who ends with a host that has ended is in it for a moment longer.
        until(lambda: not (made / "cgroup.procs").read_text(), "the end of all that was in the cgroup")
        made.rmdir()


def _mountinfo() -> str:
    return Path("/proc/self/mountinfo").read_text()


def inside(cgroup: Path, host: Program, *hidden: str) -> Program:
    """Has the program start in a cgroup, where these files cannot be read."""
    hide = "".join(
        f"mount --bind /dev/null {path};" if path.startswith("/proc") else f"mount -t tmpfs none {path};"
        for path in hidden
    )
    if hidden and subprocess.run(["unshare", "-m", "sh", "-ec", hide], capture_output=True).returncode:
        pytest.skip("no files can be hidden here")
    join = f"echo 0 > {cgroup}/cgroup.procs;"
    alone = ["unshare", "-m"] if hidden else []
    host.command = [*alone, "sh", "-ec", f'{join}{hide}exec "$0" "$@"', *host.command]
    return host


HOST = """
import os, signal, sys
import helpers, targets, tractor_host as th
if __name__ == "__main__":
    backend, *moves = sys.argv[1:]
    older = helpers.ready(th.spawn(targets.sleep, backend=backend, stdio="pipe"))
    found = th.spawn(targets.eat_memory, *moves, backend=backend, stdio="null").wait(timeout=60)
    print(found.kind, found.signal, found.cause)
    # What has ended one of them is no evidence for the end of another.
    os.kill(older.pid, signal.SIGKILL)
    print(older.wait(timeout=30).cause)
"""


def causes(host: Program, *args: str) -> list[str]:
    ended = host.run(*args, timeout=60, env=importable())
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def says(cause: str, pattern: str) -> None:
    assert re.fullmatch(re.escape(UNSENT) + pattern, cause), cause


def test_an_oom_kill_is_named_and_the_next_kill_is_not_blamed_on_it(
    process_backend: str, cgroup: Path, program: Callable[..., Program]
) -> None:
    eater, killed = causes(inside(cgroup, program(HOST)), process_backend)
    says(eater.removeprefix("signalled 9 "), PROBABLY)
    says(killed, UNKNOWN)


def test_a_worker_that_went_to_another_cgroup_is_not_judged_by_the_one_it_left(
    cgroup: Path, program: Callable[..., Program]
) -> None:
    """Its new one's count is not known from before: what is left is that of the machine."""
    eater, _ = causes(program(HOST), "fork", str(cgroup))
    v1 = (cgroup / "memory.oom_control").exists()
    # Version 1 does not tell where a process that has ended was.
    says(eater.removeprefix("signalled 9 "), UNKNOWN if v1 else POSSIBLY)


@pytest.mark.parametrize(
    ("hidden", "pattern"),
    [
        (["/proc/vmstat"], PROBABLY),
        (["/sys/fs/cgroup"], POSSIBLY),
        (["/proc/vmstat", "/sys/fs/cgroup"], UNKNOWN),
    ],
    ids=["machine", "cgroup", "both"],
)
def test_what_cannot_be_read_is_no_evidence(
    hidden: list[str], pattern: str, cgroup: Path, program: Callable[..., Program]
) -> None:
    eater, killed = causes(inside(cgroup, program(HOST), *hidden), "fork")
    says(eater.removeprefix("signalled 9 "), pattern)
    assert f"probably {KERNEL}" not in killed


def test_where_nobody_was_short_of_memory_the_kernel_is_not_suspected(process_backend: str) -> None:
    def count() -> list[str]:
        return re.findall(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)

    if not (before := count()):
        pytest.skip("this kernel does not count what its out-of-memory killer does")
    worker = ready(th.spawn(targets.sleep, backend=process_backend, stdio="pipe"))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    cause = worker.wait(timeout=PATIENCE).cause
    if count() == before:
        says(cause, rf"\(not {KERNEL}, which has ended nobody on this machine since the worker was made\)")
    else:  # somebody else's worker, just now
        assert cause.startswith(UNSENT), cause
