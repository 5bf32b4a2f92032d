"""What workers are given without a copy, and give back: large buffers, descriptors, sockets, shared objects.
And that it is freed when its last holder has ended, however that came."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import helpers
import sharing
import tractor_host as th
from conftest import PATIENCE, Program
from sharing import LARGE, block, holders
from tractor_host import _native, _parcel


@contextlib.contextmanager
def pipe() -> Iterator[list[int]]:
    """Both ends, which a test may close itself and then sets to -1."""
    ends = list(os.pipe())
    try:
        yield ends
    finally:
        for end in ends:
            if end >= 0:
                os.close(end)


def close(ends: list[int], index: int) -> None:
    os.close(ends[index])
    ends[index] = -1


def at_end_of_file(fd: int) -> bool:
    """Nobody can write to the pipe any more."""
    ready, _, _ = select.select([fd], [], [], PATIENCE)
    return bool(ready) and os.read(fd, 100) == b""


# -- large arguments and results -------------------------------------------------------------------------


def test_a_large_buffer_is_mapped_by_the_worker(backend: str) -> None:
    worker = th.spawn(sharing.describe, block(), backend=backend)
    assert worker.result(timeout=PATIENCE) == (True, "mmap", True)


@pytest.mark.parametrize("size", [100, 1 << 17, LARGE])
def test_what_a_worker_writes_to_it_is_its_own_whatever_its_size(backend: str, size: int) -> None:
    ours = block(size)
    worker = th.spawn(sharing.overwrite, ours, backend=backend)
    assert worker.result(timeout=PATIENCE) == b"mine"
    assert sharing.is_block(ours, size)


def test_a_large_result_is_mapped_here_and_can_be_written_to(backend: str) -> None:
    view = th.spawn(sharing.give_block, backend=backend).result(timeout=PATIENCE)
    assert sharing.describe(view) == (True, "mmap", True)
    assert sharing.overwrite(view) == b"mine"


@pytest.mark.parametrize("gil", ["own", "auto"])
@pytest.mark.parametrize("wall", ["subint", "subint_forkserver"])
def test_with_a_gil_of_its_own_too(wall: str, gil: Any) -> None:
    assert th.spawn(sharing.describe, block(), backend=wall, gil=gil).result(timeout=PATIENCE) == (
        True,
        "mmap",
        True,
    )
    view = th.spawn(sharing.give_block, backend=wall, gil=gil).result(timeout=PATIENCE)
    assert sharing.describe(view) == (True, "mmap", True)


def test_numpy_arrays_are_not_copied(process_backend: str) -> None:
    numpy = pytest.importorskip("numpy")
    if process_backend == "subint_forkserver":
        pytest.skip("numpy warns there that it does not know subinterpreters")
    array = numpy.arange(1 << 18, dtype=numpy.float64).reshape(512, 512)
    worker = th.spawn("numpy:negative", array, backend=process_backend)
    found = worker.result(timeout=PATIENCE)
    assert (found == -array).all()
    assert found.flags.writeable
    assert not found.flags.owndata
    assert found.ctypes.data % 64 == 0
    fortran = numpy.asfortranarray(array)
    back = th.spawn("numpy:negative", fortran, backend=process_backend).result(timeout=PATIENCE)
    assert (back == -array).all()
    assert back.flags.f_contiguous


def test_anything_that_is_large_arrives_whole(backend: str) -> None:
    value = {
        "bytes": bytes(block()),
        "text": "\N{SNOWMAN}" * (1 << 20),
        "bytearray": bytearray(block()),
        "views": [block(), block(1 << 17), block(100), block(1 << 17).cast("I"), memoryview(b"read only")],
        "grid": block(1 << 20).cast("d", (2, 1 << 16)),
        "empty": memoryview(b""),
    }
    args, kwargs = th.spawn("targets:echo", value, backend=backend, kwargs={"again": value}).result(
        timeout=PATIENCE
    )
    assert args == (value,)
    assert kwargs == {"again": value}
    assert args[0]["grid"].shape == (2, 1 << 16)
    assert args[0]["views"][4].readonly
    assert args[0]["bytes"] is kwargs["again"]["bytes"]


@pytest.mark.parametrize("size", [_parcel.LARGE - 200, _parcel.LARGE, _parcel.LARGE + 200])
@pytest.mark.parametrize("kind", [bytes, bytearray, block, str])
def test_around_the_size_from_which_it_goes_by_memory(size: int, kind: Any) -> None:
    value = "x" * size if kind is str else kind(size)
    assert th.spawn("targets:give", value, backend="forkserver").result(timeout=PATIENCE) == value


def test_many_small_buffers_and_many_large_ones() -> None:
    value = [block(100) for _ in range(5000)] + [block(1 << 16) for _ in range(1500)]
    assert th.spawn("targets:give", value, backend="forkserver").result(timeout=PATIENCE) == value


def test_a_mapping_goes_with_the_last_object_that_uses_it(backend: str) -> None:
    view = th.spawn(sharing.give_block, backend=backend).result(timeout=PATIENCE)
    part = view[4096:8192]
    del view
    assert len(memory_mappings()) == 1
    assert part[:4] == (4096).to_bytes(4, "little")
    del part
    assert memory_mappings() == []


def memory_mappings(pid: str = "self") -> list[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if "/memfd:th-" in line]


def test_nothing_is_copied_on_the_way(program: Callable[..., Program]) -> None:
    """By the most memory of its own that either side has had. A copy would be 64 MiB."""
    found = program(
        """
        import sys
        import tractor_host as th

        SIZE = 64 << 20

        def most() -> int:
            fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
            return int(fields["VmHWM"].split()[0]) * 1024

        def receive(view):
            return most(), len(view)

        def give(kind):
            value = memoryview(bytearray(b"x" * SIZE)) if kind == "view" else b"x" * SIZE
            return most_of_pickling(value)

        def most_of_pickling(value):
            from tractor_host._parcel import Packed
            from tractor_host import _native
            before = most()
            _native.fd_close(Packed(value).memory("th-result"))
            return most() - before

        if __name__ == "__main__":
            for value in (memoryview(bytearray(SIZE)), bytearray(SIZE), b"x" * SIZE):
                value[0], value[-1]
                before = most()
                worker = th.spawn(receive, value, backend="exec")
                theirs, length = worker.result(timeout=30)
                assert length == SIZE
                assert most() - before < SIZE // 2, (type(value), most() - before)
                copies = 0 if isinstance(value, memoryview) else 1
                # What is mapped is not touched, or copied by what holds it itself.
                assert theirs < SIZE // 2 + copies * 2 * SIZE, (type(value), theirs)
            for kind in ("view", "bytes"):
                assert th.spawn(give, kind, backend="exec").result(timeout=30) < SIZE // 2
            print("good")
        """
    ).run(timeout=60)
    assert (found.stdout, found.stderr) == ("good\n", "")


def test_a_small_call_uses_no_memory_file() -> None:
    packed = _parcel.Packed(("name", "math:sqrt", (2,), {"a": memoryview(bytes(1000))}))
    content, fd = packed.content("th-arguments")
    assert fd is None
    assert content[:1] == b"\x80"
    assert _parcel.unpack(content)[3]["a"] == bytes(1000)


@pytest.mark.stress
@pytest.mark.parametrize("size", [1 << 30, (2 << 30) + 4097])
def test_a_gigabyte_there_and_back(backend: str, size: int) -> None:
    free = int(
        next(
            line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
        ).split()[1]
    )
    if free << 10 < 5 * size:
        pytest.skip("there is not enough memory")
    data = bytearray(size)
    data[-1] = 7
    back = th.spawn("targets:give", memoryview(data), backend=backend).result(timeout=100)
    assert (len(back), back[-1], back[0]) == (size, 7, 0)


# -- descriptors and sockets -----------------------------------------------------------------------------


def test_a_worker_reads_from_a_descriptor(backend: str) -> None:
    with pipe() as ends:
        os.write(ends[1], b"for the worker")
        worker = th.spawn(sharing.read_fd, th.Fd(ends[0]), backend=backend)
        assert worker.result(timeout=PATIENCE) == (b"for the worker", True)


def test_a_descriptor_of_a_file(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    with path.open() as file:
        assert th.spawn(sharing.read_fd, th.Fd(file), backend=backend).result(timeout=PATIENCE)[0] == b"text"


def test_a_detached_descriptor_is_the_targets_own(backend: str) -> None:
    with pipe() as ends:
        os.write(ends[1], b"x")
        worker = th.spawn(sharing.detach_fd, th.Fd(ends[0]), backend=backend)
        assert worker.result(timeout=PATIENCE) == b"x"


def test_a_descriptor_that_is_dropped_is_closed_with_a_warning(backend: str) -> None:
    with pipe() as ends:
        worker = th.spawn(sharing.drop_fd, th.Fd(ends[0]), backend=backend)
        (warning,) = worker.result(timeout=PATIENCE)
        assert warning.startswith("unclosed <Fd ")


def test_nobody_else_keeps_a_descriptor_open(backend: str) -> None:
    """The worker has the only copy: its end is the end of the file."""
    with pipe() as ends, pipe() as go:
        worker = th.spawn(sharing.wait_for_byte, th.Fd(go[0]), th.Fd(ends[1]), backend=backend, stdio="pipe")
        close(ends, 1)
        helpers.ready(worker)
        assert select.select([ends[0]], [], [], 0)[0] == []
        os.write(go[1], b"x")
        # It can't be pickled as a result, which ends the worker all the same.
        assert worker.wait(timeout=PATIENCE).kind == "raised"
        assert at_end_of_file(ends[0])


def test_what_a_worker_closes_is_closed_while_it_lives(backend: str) -> None:
    code = """
        args[1].close()
        print("ready", flush=True)
        with args[0]:
            os.read(args[0].fileno(), 1)
    """
    import textwrap

    with pipe() as ends, pipe() as go:
        source = th.Source("import os\n" + textwrap.dedent(code))
        worker = th.spawn(source, th.Fd(go[0]), th.Fd(ends[1]), backend=backend, stdio="pipe")
        close(ends, 1)
        assert at_end_of_file(ends[0])
        helpers.ready(worker)
        os.write(go[1], b"x")
        worker.result(timeout=PATIENCE)


def test_a_worker_that_is_killed_hard_keeps_nothing_open(backend: str) -> None:
    """Neither descriptors nor mappings: see also the leak check after every test."""
    ours, theirs = socket.socketpair()
    with pipe() as ends, ours, theirs:
        shared = th.share(block())
        worker = th.spawn(
            sharing.hold_and_spin, th.Fd(ends[1]), theirs, block(), shared, backend=backend,
            stdio="pipe", cancel_timeout=0,
        )  # fmt: skip
        close(ends, 1)
        theirs.close()
        helpers.ready(worker)
        assert worker.kill().kind == "killed"
        assert at_end_of_file(ends[0])
        assert ours.recv(1) == b""
        inode = os.fstat(shared._fd).st_ino
        helpers.until_same(lambda: holders(inode), {os.getpid()})
        assert len(memory_mappings()) == 0


def test_a_worker_that_is_killed_before_it_takes_them(backend: str) -> None:
    for _ in range(5):
        with pipe() as ends:
            worker = th.spawn(
                "targets:nothing", th.Fd(ends[1]), block(), backend=backend, stdio="null", cancel_timeout=0
            )
            close(ends, 1)
            worker.kill()
            assert at_end_of_file(ends[0])


def test_a_process_that_has_stopped_does_not_keep_them_from_being_freed() -> None:
    """They are on their way, in its socket, when it is killed."""
    with pipe() as ends:
        worker = th.spawn("targets:nothing", th.Fd(ends[1]), block(), backend="exec", stdio="null")
        assert worker.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGSTOP)
        close(ends, 1)
        worker.kill()
        assert at_end_of_file(ends[0])


def test_a_socket_arrives_with_its_timeout(backend: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(7.5)
        ours.sendall(b"this")
        worker = th.spawn(sharing.answer, theirs, backend=backend)
        assert worker.result(timeout=PATIENCE) == (7.5, socket.AF_UNIX)
        assert ours.recv(100) == b"got this"


def test_a_listening_socket_is_accepted_from_by_several(backend: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = th.Source(
            "with args[0] as server:\n connection, _ = server.accept()\n with connection: connection.sendall(b'hi')"
        )
        workers = [th.spawn(code, server, backend=backend) for _ in range(2)]
        for _ in workers:
            with socket.create_connection(server.getsockname(), timeout=PATIENCE) as client:
                assert client.recv(10) == b"hi"
        for worker in workers:
            worker.result(timeout=PATIENCE)


def test_there_is_a_limit_to_descriptors(backend: str) -> None:
    with pipe() as ends:
        before = th.statistics().spawned
        with pytest.raises(ValueError, match="241 descriptors in the arguments, and at most 240"):
            th.spawn("targets:nothing", [th.Fd(ends[0]) for _ in range(241)], backend=backend)
        assert th.statistics().spawned == before
        code = th.Source("for fd in args[0]: fd.close()\nlen({fd.closed for fd in args[0]}), len(args[0])")
        worker = th.spawn(code, [th.Fd(ends[0]) for _ in range(240)], block(), backend=backend)
        assert worker.result(timeout=PATIENCE) == (1, 240)


def test_what_is_closed_is_refused() -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises(TypeError, match="argument 1 of type socket cannot be pickled: the socket is closed"):
        th.spawn("targets:nothing", closed)
    with pipe() as ends:
        number = os.dup(ends[0])
        os.close(number)
    with pytest.raises(TypeError, match=f"argument 'fd' of type Fd .*descriptor {number} is not open"):
        th.spawn("targets:nothing", kwargs={"fd": th.Fd(number)})
    fd = th.Fd(1)
    fd.close()
    with pytest.raises(TypeError, match="argument 2 of type Fd .*this Fd is closed"):
        th.spawn("targets:nothing", 1, fd)
    with pytest.raises(TypeError, match="argument 1 .*is closed"):
        th.spawn("targets:nothing", th.Fd(closed))


def test_an_fd_is_made_of_what_has_a_number() -> None:
    for wrong in ("1", None, True, 1.5):
        with pytest.raises(TypeError, match="descriptor's number or a file"):
            th.Fd(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not negative"):
        th.Fd(-1)


def test_an_fd_of_ones_own_leaves_its_file_open() -> None:
    with pipe() as ends:
        fd = th.Fd(ends[0])
        assert fd.fileno() == ends[0]
        fd.close()
        fd.close()
        assert fd.closed
        with pytest.raises(ValueError, match="closed"):
            fd.fileno()
        os.fstat(ends[0])
        del fd
        assert th.Fd(ends[0]).detach() == ends[0]


def test_they_can_be_pickled_in_arguments_only() -> None:
    import copy
    import pickle

    for value in (th.Fd(0), th.share(1)):
        with pytest.raises(TypeError, match="in the arguments of a spawn only"):
            pickle.dumps(value)
        with pytest.raises(TypeError, match="in the arguments of a spawn only"):
            th.share([value])
        with pytest.raises(TypeError, match="in the arguments of a spawn only"):
            copy.copy(value)
        with pytest.raises(th.RemoteError, match="cannot be pickled.*in the arguments of a spawn only"):
            th.spawn("targets:give", value).result(timeout=PATIENCE)
    with pytest.raises(TypeError, match="made by tractor_host.share"):
        th.Shared()


# -- shared objects --------------------------------------------------------------------------------------


def test_a_shared_object_is_read_by_all_from_the_same_memory(backend: str) -> None:
    shared = th.share(block())
    workers = [th.spawn(sharing.shared_block, shared, shared, backend=backend) for _ in range(3)]
    for worker in workers:
        assert worker.result(timeout=PATIENCE) == (True, "mmap", False, True, True, shared.nbytes)
    assert sharing.describe(shared.get()) == (True, "mmap", False)
    assert shared.get() is shared.get()
    assert LARGE < shared.nbytes < LARGE + 4096


def test_a_shared_object_is_one_file_in_however_many_processes(process_backend: str) -> None:
    shared = th.share(block())
    inode = os.fstat(shared._fd).st_ino
    with pipe() as go, helpers.together() as spawn:
        workers = [
            spawn(sharing.wait_for_byte, th.Fd(go[0]), shared, backend=process_backend, stdio="pipe")
            for _ in range(4)
        ]
        for worker in workers:
            helpers.ready(worker)
        assert holders(inode) == {os.getpid(), *(worker.pid for worker in workers)}
        for worker in workers[:2]:
            os.kill(worker.pid or 0, signal.SIGKILL)
            assert worker.wait(timeout=PATIENCE).signal == signal.SIGKILL
        assert holders(inode) == {os.getpid(), *(worker.pid for worker in workers[2:])}
        del shared
        assert holders(inode) == {worker.pid for worker in workers[2:]}
    assert holders(inode) == set()


@pytest.mark.parametrize("value", [1, "text", b"bytes", {"a": [1, 2]}, list(range(100_000)), None])
def test_anything_can_be_shared(value: Any) -> None:
    shared = th.share(value)
    assert shared.get() == value
    code = th.Source("args[0].get()")
    assert th.spawn(code, shared, backend="forkserver").result(timeout=PATIENCE) == value


def test_a_shared_array_is_not_copied_and_cannot_be_written_to() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1 << 20)
    shared = th.share(array)
    assert (shared.get() == array).all()
    assert not shared.get().flags.writeable
    assert not shared.get().flags.owndata
    code = th.Source("a = args[0].get()\nint(a.sum()), a.flags.writeable, a.flags.owndata")
    found = th.spawn(code, shared, backend="forkserver").result(timeout=PATIENCE)
    assert found == (int(array.sum()), False, False)


@pytest.mark.parametrize(
    "backends",
    [["forkserver", "subint", "exec"], ["subint", "fork"], ["fork", "fork"], ["exec", "subint_forkserver"]],
)
def test_workers_pass_it_on_to_their_own(backends: list[str]) -> None:
    shared = th.share(block())
    first, *rest = backends
    found = th.spawn(sharing.shared_below, shared, rest, backend=first).result(timeout=PATIENCE)
    assert found == [(True, "mmap", False)] * len(backends)


def test_an_unused_shared_object_costs_nothing_when_it_is_dropped() -> None:
    shared = th.share(block())
    inode = os.fstat(shared._fd).st_ino
    assert holders(inode) == {os.getpid()}
    view = shared.get()
    del shared
    assert holders(inode) == {os.getpid()}
    assert sharing.is_block(view)
    del view
    assert holders(inode) == set()


def test_a_fork_of_the_host_has_no_shared_objects_of_its_own(program: Callable[..., Program]) -> None:
    found = program(
        """
        import os, warnings
        import tractor_host as th

        shared = th.share(1)

        def use() -> str:
            try:
                return f"got {shared.get()}"
            except RuntimeError as error:
                return str(error)

        if __name__ == "__main__":
            print(th.spawn(use, backend="fork").result(timeout=30).partition(";")[0].replace(str(os.getpid()), "N"))
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            pid = os.fork()
            if pid == 0:
                del shared
                os._exit(0)
            os.waitpid(pid, 0)
            assert shared.get() == 1
        """
    ).run()
    assert (found.stdout, found.stderr) == (
        "this Shared belongs to process N, of which this one is a fork\n",
        "",
    )


def test_all_is_freed_with_a_host_that_is_killed(program: Callable[..., Program]) -> None:
    """Its own memory, and that of its workers, on their way or there."""
    running = program(
        """
        import os, sys, time
        import helpers, sharing
        import tractor_host as th

        if __name__ == "__main__":
            shared = th.share(sharing.block())
            view = shared.get()
            r, w = os.pipe()
            workers = [
                th.spawn(sharing.wait_for_byte, th.Fd(r), shared, sharing.block(), backend=backend, stdio="pipe")
                for backend in ("subint", "fork", "forkserver", "subint_forkserver", "exec")
            ]
            for worker in workers:
                helpers.ready(worker)
            print(os.fstat(shared._fd).st_ino, flush=True)
            time.sleep(1000)
        """
    )
    with running.start(env=helpers.importable()) as process:
        assert process.stdout is not None
        inode = int(process.stdout.readline())
        assert len(holders(inode)) == 5
        process.kill()
        process.wait()
    helpers.until_same(lambda: holders(inode), set())


# -- where something is missing --------------------------------------------------------------------------


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process can have so many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    helpers.settled()
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    try:
        # No gap is left below the limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + count, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        for _ in range(count):
            os.close(opened.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in opened:
            os.close(fd)


def test_without_descriptors_nothing_is_started_and_nothing_left(backend: str) -> None:
    ours, theirs = socket.socketpair()
    with pipe() as ends, ours, theirs:
        arguments = [th.Fd(ends[0]), theirs, block()]
        spawned = th.statistics().spawned
        for count in range(3):
            with descriptors_left(count), pytest.raises(OSError, match="Too many open files"):
                th.spawn("targets:nothing", *arguments, backend=backend)
        assert th.statistics().spawned == spawned
        with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
            th.share(1)


def test_a_spawn_that_fails_later_leaves_nothing_of_its_arguments(process_backend: str) -> None:
    with pipe() as ends:
        with pytest.raises(FileNotFoundError):
            th.spawn(
                "targets:nothing", th.Fd(ends[1]), block(), backend=process_backend, stdio="/nowhere/at/all"
            )
        with pytest.raises(ValueError, match="nan"):
            th.spawn("targets:nothing", th.Fd(ends[1]), block(), timeout=float("nan"))
        close(ends, 1)
        assert at_end_of_file(ends[0])


def test_a_worker_without_room_for_them_says_so() -> None:
    """It has another limit than its host."""
    server = _native.fork_server()
    assert server is not None
    before = resource.prlimit(server, resource.RLIMIT_NOFILE)
    resource.prlimit(server, resource.RLIMIT_NOFILE, (50, before[1]))
    try:
        with pipe() as ends:
            worker = th.spawn("targets:nothing", [th.Fd(ends[1])] * 1, backend="forkserver")
            worker.result(timeout=PATIENCE)
            worker = th.spawn(
                "targets:nothing", [th.Fd(ends[1]) for _ in range(100)], backend="forkserver", stdio="null"
            )
            close(ends, 1)
            with pytest.raises(th.WorkerDied, match="limit of open files is too low|Too many open files"):
                worker.result(timeout=PATIENCE)
            assert at_end_of_file(ends[0])
    finally:
        # A new one, that is: a worker that it keeps ready has the limit, too.
        th.preload([])


def test_a_result_for_which_there_is_no_descriptor_left(process_backend: str) -> None:
    with pipe() as go:
        worker = th.spawn(sharing.wait_for_byte, th.Fd(go[0]), block(), backend=process_backend, stdio="pipe")
        helpers.ready(worker)
        with descriptors_left(0):
            os.write(go[1], b"x")
            assert worker.wait(timeout=PATIENCE).kind == "returned"
        with pytest.raises(OSError, match="result.*Too many open files"):
            worker.result(timeout=PATIENCE)


def test_a_result_that_has_arrived_can_be_had_once_there_is_a_descriptor() -> None:
    worker = th.spawn(sharing.give_block)
    worker.wait(timeout=PATIENCE)
    with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
        worker.result(timeout=PATIENCE)
    assert sharing.is_block(worker.result(timeout=PATIENCE))


REFUSED = """
    import sys
    import refusing, sharing
    import tractor_host as th

    if __name__ == "__main__":
        if sys.argv[1] == "memfd_create":  # of which the process backends have a use of their own
            backends = ["subint"]
            refusing.calls([319], 38)
        elif sys.argv[1] == "writev":
            backends = ["subint", "fork", "exec", "forkserver"]
            refusing.calls([20], 28)  # ENOSPC
        else:
            import resource
            backends = ["subint", "fork", "exec", "forkserver", "subint_forkserver"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        for backend in backends:
            view = th.spawn("targets:give", sharing.block(), backend=backend).result(timeout=30)
            print(sharing.describe(view))
        try:
            th.share(sharing.block())
        except OSError as error:
            print(error.strerror)
"""


@pytest.mark.parametrize(
    ("what", "count", "error"),
    [
        ("memfd_create", 1, "failed to make a file in memory: Function not implemented (os error 38)"),
        ("writev", 4, "No space left on device"),
        ("RLIMIT_FSIZE", 5, "File too large"),
    ],
)
def test_without_files_in_memory_it_goes_through_the_pipe(
    what: str, count: int, error: str, program: Callable[..., Program]
) -> None:
    if what != "RLIMIT_FSIZE" and os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are x86_64's")
    ended = program(REFUSED).run(what, env=helpers.importable())
    assert ended.stderr == ""
    *found, last = ended.stdout.splitlines()
    assert last == error
    assert len(found) == count
    # A fork server that was started later is refused too; what is mapped was not.
    assert set(found) <= {"(True, 'bytearray', True)", "(True, 'mmap', True)"}
    assert "(True, 'bytearray', True)" in found


def test_a_fork_server_that_stops_in_between_is_given_them_again() -> None:
    """The same descriptors go to the one that replaces it."""
    with helpers.keeping(0), pipe() as ends:
        server = _native.fork_server()
        assert server is not None
        os.write(ends[1], b"twice")
        os.kill(server, signal.SIGSTOP)
        worker = th.spawn(sharing.read_fd, th.Fd(ends[0]), kwargs={}, backend="forkserver")
        assert worker.result(timeout=PATIENCE) == (b"twice", True)
        assert _native.fork_server() != server


@pytest.mark.parametrize("wall", ["subint", "subint_forkserver"])
def test_a_target_that_starts_again_is_given_them_again(wall: str, tmp_path: Path) -> None:
    """With a GIL of its own it had taken them already when an extension module was refused."""
    pytest.importorskip("msgspec")
    # A name of its own: what is known of a target is remembered.
    name = f"again_{wall}"
    (tmp_path / f"{name}.py").write_text(
        "from sharing import use_msgspec\ndef run(*args): return use_msgspec(*args)\n"
    )
    sys.path.insert(0, str(tmp_path))
    ours, theirs = socket.socketpair()
    try:
        with pipe() as ends, ours, theirs:
            os.write(ends[1], b"!")
            ours.sendall(b"?")
            worker = th.spawn(
                f"{name}:run", th.Fd(ends[0]), block(), theirs, backend=wall, gil="auto", stdio="null"
            )
            close(ends, 1)
            assert worker.result(timeout=PATIENCE) == (b"1!", True, b"?")
    finally:
        sys.path.remove(str(tmp_path))


def test_a_worker_that_is_killed_while_it_gives_its_result(process_backend: str) -> None:
    size = 256 << 20
    worker = th.spawn(sharing.give_much, size, backend=process_backend, stdio="pipe")
    helpers.ready(worker)
    folder = Path(f"/proc/{worker.pid}/fd")

    def writing() -> bool:
        with contextlib.suppress(OSError):
            return worker.exit is not None or any(
                os.readlink(link).startswith("/memfd:th-result") for link in folder.iterdir()
            )
        return worker.exit is not None

    helpers.until(writing, "a result on its way")
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid or 0, signal.SIGKILL)
    ended = worker.wait(timeout=PATIENCE)
    if ended.kind == "signalled":
        with pytest.raises(th.WorkerDied):
            worker.result()
    else:
        assert ended.kind == "returned"
        assert len(worker.result()[0]) == size


# -- a hostile worker ------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [False, True])
def test_memory_that_its_maker_can_still_change_is_not_mapped(process_backend: str, truncate: bool) -> None:
    """Mapped, and truncated later, it would crash this process by a SIGBUS."""
    worker = th.spawn(
        sharing.return_unsealed,
        False,
        truncate,
        backend=process_backend,
        stdio="null",
        cancel_timeout=0,
        kill_timeout=0.3,
    )
    ended = worker.wait(timeout=PATIENCE)
    assert ended.kind == "killed", ended
    assert "protocol" in ended.cause
    with pytest.raises(th.WorkerKilled, match="protocol"):
        worker.result()


def test_sealed_garbage_is_the_results_failure(process_backend: str) -> None:
    worker = th.spawn(
        sharing.return_unsealed,
        True,
        False,
        backend=process_backend,
        stdio="null",
        timeout=3,
        cancel_timeout=0,
        kill_timeout=0.3,
    )
    ended = worker.wait(timeout=PATIENCE)
    assert ended.kind == "returned"
    with pytest.raises(th.RemoteError, match="does not unpickle here"):
        worker.result()


def test_a_result_in_memory_without_memory(process_backend: str) -> None:
    worker = th.spawn(
        sharing.return_nothing_in_memory,
        backend=process_backend,
        stdio="null",
        cancel_timeout=0,
        kill_timeout=0.3,
    )
    ended = worker.wait(timeout=PATIENCE)
    assert (ended.kind, "protocol" in ended.cause) == ("killed", True)


@pytest.mark.parametrize("count", [2, 50])
def test_descriptors_that_nobody_asked_for(process_backend: str, count: int) -> None:
    worker = th.spawn(
        sharing.send_descriptors,
        count,
        backend=process_backend,
        stdio="null",
        cancel_timeout=0,
        kill_timeout=0.3,
    )
    ended = worker.wait(timeout=PATIENCE)
    assert (ended.kind, "protocol" in ended.cause) == ("killed", True)


@pytest.mark.parametrize(
    "data",
    [
        b"th-parts",
        b"th-parts" + bytes(8),
        b"th-parts" + b"\xff" * 64,
        b"th-parts" + (2).to_bytes(8, sys.byteorder) + b"\xff" * 32,
        b"other",
    ],
)
def test_what_was_not_packed_is_an_error_and_no_crash(data: bytes) -> None:
    for form in (data, memoryview(bytearray(data))):
        with pytest.raises(Exception):  # noqa: B017, PT011
            _parcel.unpack(form)


def test_the_launcher_shares_too(launcher: Path, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(
        "import sharing, tractor_host as th\n"
        "if __name__ == '__main__':\n"
        "    for backend in ('subint', 'fork', 'forkserver', 'exec'):\n"
        "        shared = th.share(sharing.block())\n"
        "        print(th.spawn(sharing.shared_block, shared, shared, backend=backend).result(30)[:3])\n"
    )
    ran = subprocess.run(
        [launcher, "run", "--main", "subint", path],
        capture_output=True, text=True, timeout=60, env=helpers.importable(), check=True,
    )  # fmt: skip
    assert ran.stdout == "(True, 'mmap', False)\n" * 4
