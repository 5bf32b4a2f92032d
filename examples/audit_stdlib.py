"""Audits the standard library of the running Python with workers of every backend.

Every `.py` file is parsed, compiled, hashed and counted, in batches, with a new worker for each. Beside
them a hostile worker spins for ever and catches all that is thrown at it, and half-way another dies by
SIGSEGV. Each backend is held to what tractor_host promises:

- it finds exactly what a plain loop in this process finds;
- every worker returned but for the hostile two, whose ends are told as they were, and came in time;
- nothing is left behind: no thread, no fd, no child, no interpreter.

It exits with 0 if all of that held, else it says what did not and exits with 1.

    tractor-host run examples/audit_stdlib.py [--limit FILES] [--root FOLDER]
"""

from __future__ import annotations

import ast
import hashlib
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import tractor_host as th

# -- what the workers run ----------------------------------------------------------------------------

#: What there is to say of a file: its path, its hash, how many lines, functions and classes it has, and
#: the hash of its byte code; `None` for a file that is no Python.
type Finding = tuple[str, str, int, int, int, str | None]


def audit(root: str, paths: list[str]) -> tuple[float, list[Finding]]:
    """The target of the honest workers: when it began, by the clock that all processes share, and what
    it found."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like, in old code
        return began, [audit_file(root, path) for path in paths]


def audit_file(root: str, path: str) -> Finding:
    source = Path(root, path).read_bytes()
    sha256, lines = hashlib.sha256(source).hexdigest(), source.count(b"\n")
    try:
        tree = ast.parse(source, path)
        code = compile(tree, path, "exec", dont_inherit=True)
    except SyntaxError, ValueError:
        return path, sha256, lines, 0, 0, None
    kinds = [type(node) for node in ast.walk(tree)]
    functions = kinds.count(ast.FunctionDef) + kinds.count(ast.AsyncFunctionDef)
    code_hash = hashlib.sha256(b"".join(byte_code(code))).hexdigest()
    return path, sha256, lines, functions, kinds.count(ast.ClassDef), code_hash


def byte_code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from byte_code(constant)


def spin() -> None:
    """A hostile target: it computes for ever, whatever is raised in it."""
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


def crash() -> None:
    """The other one: it reads from address 0."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


# -- the supervising side ----------------------------------------------------------------------------

#: Honest workers alive at the same time, and how many there are one after the other in each place.
LIVE, ROUNDS = min(2 * (os.process_cpu_count() or 1), 8), 5
#: Seconds for a batch; it takes a fraction of one.
BATCH_TIMEOUT = 60.0
#: Seconds that the spinning worker gets to stop by itself once it is asked to, and then to be stopped.
CANCEL_TIMEOUT, KILL_TIMEOUT = 0.25, 1.5
#: Seconds until what is there still counts as left over: a thread is there for a moment after its last
#: word, and nothing tells of its end.
SETTLE = 5.0


class Wall(NamedTuple):
    """How the workers of one row are spawned."""

    title: str
    backend: str
    gil: Literal["shared", "own"]
    #: A segmentation fault ends the process that it happens in: in a subinterpreter, this one.
    crash_backend: str


WALLS = [
    Wall("subint, shared GIL", "subint", "shared", crash_backend="fork"),
    Wall("subint, own GIL", "subint", "own", crash_backend="fork"),
    Wall("forkserver", "forkserver", "shared", crash_backend="forkserver"),
    Wall("fork", "fork", "shared", crash_backend="fork"),
    Wall("exec", "exec", "shared", crash_backend="exec"),
]


class Row:
    """What came of one backend: a row of the table, and what was wrong with it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.findings: list[Finding] = []
        self.seconds = 0.0
        #: Seconds from each spawn to the first line of its target.
        self.starts: list[float] = []
        self.spinner = self.crasher = "-"
        self.left: dict[str, int] = {}
        self.failures: list[str] = []


def main() -> int:
    options = parse_arguments()
    paths = python_files(options.root)[: options.limit]
    print(f"{len(paths)} files below {options.root}, {LIVE} workers at a time")
    if not paths:
        print("FAILED: there is nothing to audit")
        return 1

    expected = audit_in_a_loop(options.root, paths)
    rows = [expected]
    warm_up()
    for wall in WALLS:
        row = Row(wall.title)
        before = resources()
        audit_with_workers(row, wall, options.root, paths)
        row.left = left_over(before)
        if any(row.left.values()):
            row.failures.append(f"left over: {row.left}")
        if digest(row.findings) != digest(expected.findings):
            row.failures.append("its findings are not those of the plain loop")
        rows.append(row)

    print_table(rows, len(paths))
    print_findings(expected.findings)
    failures = [f"FAILED: {row.title}: {failure}" for row in rows for failure in row.failures]
    print(*failures or ["all of it held"], sep="\n")
    return 1 if failures else 0


def audit_in_a_loop(root: str, paths: list[str]) -> Row:
    row = Row("plain loop, no worker")
    progress = Progress(row.title, len(paths))
    begun = time.monotonic()
    for path in paths:
        row.findings += audit(root, [path])[1]
        progress.show(len(row.findings))
    row.seconds = time.monotonic() - begun
    return row


def audit_with_workers(row: Row, wall: Wall, root: str, paths: list[str]) -> None:
    progress = Progress(row.title, len(paths))
    with th.spawn(
        spin,
        backend=wall.backend,
        gil=wall.gil,
        cancel_timeout=CANCEL_TIMEOUT,
        kill_timeout=KILL_TIMEOUT,
    ) as spinner:
        while spinner.state == "booting":
            time.sleep(0.001)
        begun = time.monotonic()
        crasher = None
        for spawned, worker in workers_in_turn(wall, root, split(paths, LIVE * ROUNDS)):
            try:
                began, found = worker.result()
            except th.WorkerError as error:
                row.failures.append(str(error))
                continue
            row.starts.append(began - spawned)
            row.findings += found
            progress.show(len(row.findings))
            if crasher is None and 2 * len(row.findings) >= len(paths):
                crasher = th.spawn(crash, backend=wall.crash_backend, timeout=BATCH_TIMEOUT)
        row.seconds = time.monotonic() - begun
        if spinner.state != "running":
            row.failures.append(f"the spinning worker was to spin until now, but: {spinner}")
        spun = spinner.kill()

    took = spun.elapsed or 0.0
    row.spinner = f"{spun.kind} by {spun.rung}, {took:.2f} s"
    if spun.kind != "killed" or took > CANCEL_TIMEOUT + KILL_TIMEOUT:
        row.failures.append(f"the spinning worker was to be killed in time, but: {spun}")
    if crasher is None:
        row.failures.append("no worker crashed: half of the files were never reached")
        return
    crashed = crasher.wait()
    row.crasher = f"{crashed.kind} {crashed.signal}, {crashed.lifetime:.2f} s ({wall.crash_backend})"
    if crashed.kind != "signalled" or crashed.signal != signal.SIGSEGV:
        row.failures.append(f"the crashing worker was to die by SIGSEGV, but: {crashed}")


def workers_in_turn(wall: Wall, root: str, batches: list[list[str]]) -> Iterator[tuple[float, th.Worker]]:
    """Spawns a worker a batch, `LIVE` at a time. Yields each as it ends, with the time of its spawn."""
    import contextlib
    import selectors

    waiting = iter(batches)
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:

        def spawn_next() -> None:
            for batch in waiting:
                now = time.monotonic()
                worker = th.spawn(
                    audit, root, batch, backend=wall.backend, gil=wall.gil, timeout=BATCH_TIMEOUT
                )
                stack.enter_context(worker)  # it is killed if this is left early
                selector.register(worker, selectors.EVENT_READ, (now, worker))
                return

        for _ in range(LIVE):
            spawn_next()
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fileobj)
                spawn_next()
                yield key.data


def warm_up() -> None:
    """The supervisor's own threads and fds, and the fork server, come with the first workers and stay.
    The thread of a subinterpreter does not."""
    for backend in ("forkserver", "fork"):
        th.spawn("os:getpid", backend=backend).result(timeout=BATCH_TIMEOUT)
    tid = th.spawn("threading:get_native_id", backend="subint").result(timeout=BATCH_TIMEOUT)
    deadline = time.monotonic() + SETTLE
    while os.path.exists(f"/proc/self/task/{tid}") and time.monotonic() < deadline:
        time.sleep(0.001)


def resources() -> dict[str, int]:
    """How much there is just now of what workers could leave behind."""
    from concurrent import interpreters

    me = str(os.getpid())
    children = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # Behind the name, which may hold anything, come its state and its parent.
            children += (process / "stat").read_text().rpartition(")")[2].split()[1] == me
        except FileNotFoundError, ProcessLookupError:
            continue
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "fds": len(os.listdir("/proc/self/fd")),
        "children": children,
        "interpreters": len(interpreters.list_all()),
    }


def left_over(before: dict[str, int]) -> dict[str, int]:
    """How much more there is than before."""
    deadline = time.monotonic() + SETTLE
    while True:
        now = resources()
        left = {name: now[name] - before[name] for name in before}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


# -- files and figures -------------------------------------------------------------------------------


def parse_arguments() -> Options:
    import argparse
    import sysconfig

    library = sysconfig.get_path("stdlib")
    parser = argparse.ArgumentParser(description="Audits the standard library with every backend.")
    parser.add_argument("--limit", type=int, metavar="FILES", help="audit only so many files")
    parser.add_argument("--root", default=library, metavar="FOLDER", help="audit this folder instead")
    return parser.parse_args(namespace=Options())


class Options:
    limit: int | None
    root: str


def python_files(root: str) -> list[str]:
    foreign = {"site-packages", "dist-packages"}
    found = (path.relative_to(root) for path in Path(root).rglob("*.py"))
    return sorted(str(path) for path in found if foreign.isdisjoint(path.parts))


def split(paths: list[str], parts: int) -> list[list[str]]:
    """Neighbours are often alike: they go to different parts, so that all parts are."""
    return [batch for index in range(parts) if (batch := paths[index::parts])]


def digest(findings: list[Finding]) -> str:
    return hashlib.sha256(repr(sorted(findings)).encode()).hexdigest()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class Progress:
    """One line that is written again and again on a terminal; elsewhere a line for every quarter."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.quarter = title, total, 0

    def show(self, done: int) -> None:
        quarter = 4 * done // self.total
        if sys.stdout.isatty():
            end = "\n" if done == self.total else "\r"
        elif quarter > self.quarter:
            end = "\n"
        else:
            return
        self.quarter = quarter
        print(f"{self.title:<22} {done:>5} of {self.total} files", end=end, flush=True)


def print_table(rows: list[Row], files: int) -> None:
    head = "backend,workers,files/s,spawn p50,p95,spinning worker,crashing worker,left over"
    lines = [head.split(",")]
    for row in rows:
        workers = p50 = p95 = "-"
        if row.starts:
            workers = str(len(row.starts))
            p50, p95 = (f"{1000 * percentile(row.starts, share):.1f} ms" for share in (0.5, 0.95))
        speed = f"{files / row.seconds:.0f}"
        left = "/".join(map(str, row.left.values())) or "-"
        lines.append([row.title, workers, speed, p50, p95, row.spinner, row.crasher, left])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"""
spawn            from spawn() to the first line of the target, beside {LIVE - 1} workers that compute and one
                 that spins; with the shared GIL, every step of it waits for a turn of each of them
spinning worker  catches every exception: each rung has its share of cancel_timeout={CANCEL_TIMEOUT} and
                 kill_timeout={KILL_TIMEOUT} (seconds), and the next one follows
crashing worker  a process in every row: a crash ends the whole process that it happens in
left over        threads/fds/children/interpreters
""")


def print_findings(findings: list[Finding]) -> None:
    _, _, lines, functions, classes, hashes = zip(*findings, strict=True)
    counts = f"{sum(lines)} lines, {sum(functions)} functions, {sum(classes)} classes"
    print(f"{len(findings)} files: {counts}; {hashes.count(None)} do not parse")
    print(f"digest: {digest(findings)}")


if __name__ == "__main__":
    sys.exit(main())
