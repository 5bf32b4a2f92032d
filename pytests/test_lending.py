"""Memory that large content is sent in again and again: that nobody sees it change, and that it is given back."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

import acting
import sharing
import targets
import tractor_host as th
from conftest import Program
from helpers import PATIENCE, importable, until
from sharing import is_block
from tractor_host import _lending, _native
from tractor_host._calls import CALL, LARGE, RETURNED, Datagram, Link
from tractor_host._parcel import Packed, unpack

pytestmark = pytest.mark.outside

SIZE = 200_000


def block(mark: int, size: int = SIZE) -> memoryview:
    return memoryview(bytearray([mark]) * size)


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pair = Link(ours), Link(theirs)
        yield pair
        for link in pair:
            link._segments = None


def carried(sender: Link, receiver: Link, value: object) -> memoryview:
    """What comes of a value that is sent."""
    sender.send(CALL, 1, Packed(value))
    message = receiver.receive(wait=False)
    assert message is not None
    found: memoryview = unpack(message.content)
    return found


def segments(link: Link) -> _lending.Segments:
    assert link._segments is not None
    return link._segments


def kept(link: Link) -> tuple[int, int]:
    """How many segments are free, and how many are lent."""
    return len(segments(link)._free), len(segments(link)._lent)


# -- one link ------------------------------------------------------------------------------------------------


def test_a_segment_is_used_again_when_it_was_given_back(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    for mark in range(20):
        view = carried(ours, theirs, block(mark))
        assert view == block(mark)
        assert kept(ours) == (0, 1)
        del view
        theirs.send(RETURNED, 1)
        assert ours.receive(wait=False) is not None
        assert kept(ours) == (1, 0)
    assert segments(ours)._free[0].number == 1, "it was the same one"


def test_what_anything_refers_to_is_not_written_to(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    views = []
    for mark in range(10):
        views.append(carried(ours, theirs, block(mark))[5:7])
        theirs.send(RETURNED, 1)
        assert ours.receive(wait=False) is not None
        assert [bytes(view) for view in views] == [bytes([it, it]) for it in range(mark + 1)]
    assert kept(ours) == (0, _lending._MOST), "and there are not more and more of them"
    views.clear()
    assert sorted(theirs.given_back()) == list(range(1, 11))


def test_what_is_written_to_is_the_borrower_s_own(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    for mark in range(1, 4):
        view = carried(ours, theirs, block(mark))
        assert view == block(mark), "nothing is left of what was written there"
        view[:] = bytes(SIZE)
        assert view == bytes(SIZE)
        del view
        theirs.send(RETURNED, 1)
        assert ours.receive(wait=False) is not None
    assert kept(ours) == (1, 0)


@pytest.mark.parametrize("shift", [-1, 0, 1, 4096])
def test_content_of_any_size_and_shape_arrives(ends: tuple[Link, Link], shift: int) -> None:
    ours, theirs = ends
    for size in (LARGE, SIZE, _lending._CHUNK, 3 * _lending._CHUNK):
        data = os.urandom(size + shift)
        value = [data, memoryview(bytearray(data)), data.hex(), bytearray(data), {"x": data[::2]}]
        for _ in range(3):
            assert carried(ours, theirs, value) == value
            theirs.send(RETURNED, 1)
            assert ours.receive(wait=False) is not None
        assert sum(kept(ours)) <= _lending._MOST


def test_a_segment_fits_or_another_one_is_made(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    sizes = [SIZE, SIZE - 1000, SIZE // 2 + 1000, SIZE + 1, 10 * SIZE, SIZE]
    expected = [1, 1, 1, 2, 3, 1]
    numbers = []
    for size in sizes:
        view = carried(ours, theirs, block(1, size))
        assert len(view) == size
        numbers += segments(ours)._lent
        del view
        theirs.send(RETURNED, 1)
        assert ours.receive(wait=False) is not None
    assert numbers == expected


def test_what_is_too_large_is_sent_in_a_file_of_its_own(
    ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lending, "LARGEST", SIZE)
    ours, theirs = ends
    assert carried(ours, theirs, block(1, 2 * SIZE)) == block(1, 2 * SIZE)
    assert kept(ours) == (0, 0)
    assert not theirs.given_back()


def test_a_segment_that_can_not_be_mapped_is_done_without(
    ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = ends
    view = carried(ours, theirs, block(1))
    del view
    theirs.send(RETURNED, 1)
    assert ours.receive(wait=False) is not None

    def fail(*args: object, **options: object) -> None:
        raise OSError(12, "no address space")

    with monkeypatch.context() as patch:
        patch.setattr(_lending.mmap, "mmap", fail)
        ours.send(CALL, 1, Packed(block(2)))
    message = theirs.receive(wait=False)
    assert message is not None
    assert unpack(message.content) == block(2)
    assert kept(ours) == (0, 0)


def test_what_was_not_sent_is_free_again(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    ours.socket.setblocking(False)
    filler = bytes(LARGE)
    with pytest.raises(BlockingIOError):
        while True:
            ours.socket.send(filler)
    datagram = Datagram(CALL, 1, 0.0, Packed(block(3)), link=ours)
    with pytest.raises(BlockingIOError):
        datagram.send(ours.socket)
    assert kept(ours) == (0, 1)
    with pytest.raises(BlockingIOError):
        datagram.send(ours.socket)
    datagram.close()
    datagram.close()
    assert kept(ours) == (1, 0)
    theirs.socket.close()
    with pytest.raises(ConnectionError):
        ours.send(CALL, 2, Packed(block(4)))
    assert kept(ours) == (1, 0)


def test_what_was_not_lent_can_not_be_given_back(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    view = carried(ours, theirs, block(1))
    segments(ours).take_back([0, 2, 3, 1 << 63])
    assert kept(ours) == (0, 1)
    segments(ours).take_back([1, 1])
    segments(ours).take_back([1])
    assert kept(ours) == (1, 0)
    del view


def test_what_is_kept_for_long_enough_is_freed(
    ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = ends
    kept_view = carried(ours, theirs, block(1))
    del kept_view
    theirs.send(RETURNED, 1)
    assert ours.receive(wait=False) is not None
    lent = carried(ours, theirs, block(2, 3 * SIZE))
    due = segments(ours).trim()
    assert due is not None
    assert 0 < due - _native.clock() <= _lending.KEPT
    assert kept(ours) == (1, 1)
    monkeypatch.setattr(_lending, "KEPT", 0.0)
    assert segments(ours).trim() is None
    assert kept(ours) == (0, 0)
    assert lent == block(2, 3 * SIZE), "who has borrowed it has it"
    del lent
    theirs.send(RETURNED, 1)
    assert ours.receive(wait=False) is not None
    assert kept(ours) == (0, 0)


def test_who_waits_for_a_message_frees_meanwhile_what_was_kept(
    ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lending, "KEPT", 0.05)
    ours, theirs = ends
    view = carried(ours, theirs, block(1))

    def answer() -> None:
        until(lambda: kept(ours) == (0, 0), "nothing kept")
        theirs.send(RETURNED, 7)

    thread = threading.Thread(target=answer)
    thread.start()
    message = ours.receive()
    thread.join()
    assert message is not None
    assert message.number == 7
    del view


# -- workers -------------------------------------------------------------------------------------------------


def files(pid: int | str = "self") -> int:
    """The segments that a process has a descriptor of."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(path).startswith("/memfd:th-call")
        except FileNotFoundError:
            continue
    return count


def mappings(pid: int | str = "self") -> int:
    return len(re.findall("/memfd:th-call", Path(f"/proc/{pid}/maps").read_text()))


def test_large_calls_to_a_pool_leave_nothing_behind(backend: str) -> None:
    with th.Executor(2, backend) as pool:
        for mark in range(100):
            data = block(mark)
            results = list(pool.map(targets.give, [data, data, data]))
            assert results == [data] * 3
        pids = {worker.pid or os.getpid() for worker in pool.workers()} | {os.getpid()}
        assert all(files(pid) <= 4 * _lending._MOST for pid in pids)
        del results
        until(lambda: not any(files(pid) or mappings(pid) for pid in pids), "nothing kept by either side")
        # It goes on as before.
        assert pool.submit(targets.give, data).result(PATIENCE) == data
    until(lambda: not files() and not mappings(), "nothing kept")


@pytest.mark.parametrize("backend", ["subint", "forkserver"])
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_large_calls_and_items_of_actors_leave_nothing_behind(backend: str, loop: str) -> None:
    async def main() -> None:
        async with th.open_nursery(backend, runtime=loop) as nursery:  # type: ignore[arg-type]
            portal = await nursery.start_actor()
            for mark in range(20):
                data = block(mark)
                assert await portal.run(targets.give, data) == data
                async with portal.open_stream(acting.double) as stream:
                    for _ in range(3):
                        await stream.send(bytes(data))
                        assert await stream.receive() == 2 * bytes(data)
            assert portal.worker is not None
            pids = {portal.worker.pid or os.getpid(), os.getpid()}
            with anyio.fail_after(PATIENCE):
                while any(files(pid) or mappings(pid) for pid in pids):
                    await anyio.sleep(0.01)
            assert await portal.run(targets.give, data) == data

    anyio.run(main, backend=loop)
    until(lambda: not files() and not mappings(), "nothing kept")


def test_a_worker_that_dies_takes_its_loans_with_it(backend: str) -> None:
    if backend == "subint":
        pytest.skip("what kills itself is a process")
    with th.Executor(1, backend) as pool:
        mine = pool.submit(sharing.give_block).result(PATIENCE)
        for _ in range(5):
            with pytest.raises(th.WorkerDied):
                pool.submit(sharing.die_with, block(1)).result(PATIENCE)
            assert pool.submit(targets.give, block(2)).result(PATIENCE) == block(2)
        assert is_block(mine), "what came from it stays"
        del mine


FORKS = """
    import os, sys, warnings
    import tractor_host as th
    import sharing, targets

    # Of os.fork, that there are threads.
    warnings.simplefilter("ignore", DeprecationWarning)

    kept = None

    def look(ready, go):
        os.write(ready, b"!")
        os.read(go, 1)
        return sharing.is_block(kept)

    def segments():
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                pass
        return sum(link.startswith("/memfd:th-call") for link in links)

    def look_by_fds(ready, go):
        with ready, go:
            return look(ready.fileno(), go.fileno())

    def main():
        global kept
        is_ready, ready = os.pipe()
        go, may_go = os.pipe()
        with th.Executor(1, "forkserver") as pool:
            for _ in range(3):
                kept = pool.submit(sharing.give_block).result()
                pool.submit(targets.give, kept).result()
            assert segments(), "there is something to be inherited"
            if sys.argv[1] == "os.fork":
                child = os.fork()
                if child == 0:
                    try:
                        os._exit(0 if look(ready, go) and not segments() else 1)
                    finally:
                        os._exit(2)
            else:
                worker = th.spawn(look_by_fds, th.Fd(ready), th.Fd(go), backend="fork")
            os.read(is_ready, 1)
            kept = None
            for mark in range(20):
                other = memoryview(bytearray([mark]) * sharing.LARGE)
                assert pool.submit(targets.give, other).result() == other
            os.write(may_go, b"!")
            if sys.argv[1] == "os.fork":
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            else:
                print(0 if worker.result(timeout=30) else 1)

    if __name__ == "__main__":
        main()
"""


@pytest.mark.outside
@pytest.mark.parametrize("how", ["os.fork", "fork"])
def test_what_a_fork_s_child_has_too_is_not_given_back(program: Callable[..., Program], how: str) -> None:
    """Or else the child would see it change; and the segments themselves it has not."""
    found = program(FORKS).run(how, env=importable())
    assert (found.stdout, found.stderr, found.returncode) == ("0\n", "", 0)
