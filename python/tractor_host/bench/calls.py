"""What a call costs to a worker that is there, next to what else there is: `bench calls`.

Each contestant is one worker, in a program of its own that has called it before. A call carries so many bytes
there and back. Those of 1 MiB and more pickle as a numpy array does, and both sides read a byte of every
page. With one in flight, a call is a round trip (the median); with more, it is the time of all by their
number. The contestants take turns, round by round, and a row has the medians of the rounds.

Those that belong to an event loop are called from trio, by one task for each call in flight. What a portal's
actor calls is an async function, a function for one of its threads, or, with runtime="sync", one after the
other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any, Final

from tractor_host.bench._block import Block, same, same_in_loop

#: What pools there are; the peer whose calls are the unit comes first.
POOLS: Final = (
    "ProcessPoolExecutor",
    "InterpreterPoolExecutor",
    "loky",
    "th forkserver",
    "th subint_forkserver",
    "th fork",
    "th exec",
    "th subint",
    "th subint, own GIL",
)
#: Who belongs to an event loop.
LOOPED: Final = (
    "anyio.to_process",
    "portal, forkserver, sync",
    "portal, forkserver, async",
    "portal, forkserver, thread",
    "portal, subint, sync",
)
#: Modules that may not be there.
_NEEDS: Final[dict[str, tuple[str, ...]]] = {"loky": ("loky",), **dict.fromkeys(LOOPED, ("anyio", "trio"))}
#: Bytes that are in flight at most; what would be more is not measured.
MOST: Final = 1 << 28
#: From so many bytes on a call carries a block.
_LARGE: Final = 1 << 20
#: Seconds that one call may take, and one program.
_PATIENCE: Final = 120.0
_LIMIT: Final = 1800.0
#: Calls of each kind, at least.
_FEWEST: Final = 3

#: Has a worker give a value back: what waits for that.
Submit = Callable[[Any], Callable[[], Any]]
Call = Callable[[Any], Awaitable[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One contestant, one size, and one number of calls in flight.

    Attributes:
        name: The contestant.
        size: Bytes that go there and come back.
        in_flight: How many calls are on their way at a time.
        us: Microseconds for one call.
        ratio: That, in units of the first contestant's.
        copies: That, in units of one copy of as many bytes within a process (memcpy, to memory that is
            there). `None` for what is no block.
    """

    name: str
    size: int
    in_flight: int
    us: float
    ratio: float
    copies: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Figure:
    """What one program has measured, in seconds."""

    size: int
    in_flight: int
    call: float
    memcpy: float


def _pool(name: str) -> Any:
    if name == "ProcessPoolExecutor":
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"))
    if name == "InterpreterPoolExecutor":
        from concurrent.futures import InterpreterPoolExecutor

        return InterpreterPoolExecutor(1)
    if name == "loky":
        from loky import ProcessPoolExecutor as Loky  # type: ignore[import-not-found]

        return Loky(max_workers=1)
    import tractor_host as th

    backend, _, gil = name.removeprefix("th ").partition(", ")
    return th.Executor(1, backend, gil="own" if gil else "shared")


def _value(size: int) -> Any:
    # No page is the kernel's one page of zeros.
    return bytes(size) if size < _LARGE else Block(bytearray(b"\1") * size)


def _memcpy(value: Any) -> float:
    """Seconds for a copy of it."""
    if not isinstance(value, Block):
        return 0.0
    copy, times = bytearray(b"\2") * len(value.data), []
    for _ in range(_FEWEST + 4):
        begun = time.perf_counter()
        copy[:] = value.data
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _time(submit: Submit, value: Any, in_flight: int, seconds: float) -> float:
    """Keeps so many calls on their way for about so long; seconds for one."""
    waiting: deque[tuple[float, Callable[[], Any]]] = deque()
    times: list[float] = []

    def finish() -> None:
        begun, result = waiting.popleft()
        same(result())
        times.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds or len(times) < _FEWEST:
        waiting.append((now, submit(value)))
        if len(waiting) == in_flight:
            finish()
    while waiting:
        finish()
    return statistics.median(times) if in_flight == 1 else (time.perf_counter() - begun) / len(times)


async def _time_in_loop(call: Call, value: Any, in_flight: int, seconds: float) -> float:
    import trio

    times: list[float] = []

    async def caller() -> None:
        while (now := time.perf_counter()) - begun < seconds or len(times) < _FEWEST:
            same(await call(value))
            times.append(time.perf_counter() - now)

    begun = time.perf_counter()
    async with trio.open_nursery() as tasks:
        for _ in range(in_flight):
            tasks.start_soon(caller)
    return statistics.median(times) if in_flight == 1 else (time.perf_counter() - begun) / len(times)


def _measure(name: str, points: list[tuple[int, int]], seconds: float) -> list[_Figure]:
    if name in LOOPED:
        import trio

        return trio.run(_measure_in_loop, name, points, seconds)
    found = []
    with _pool(name) as pool:
        for size, in_flight in points:
            value = _value(size)
            pool.submit(same, value).result(_PATIENCE)
            call = _time(lambda value: pool.submit(same, value).result, value, in_flight, seconds)
            found.append(_Figure(size, in_flight, call, _memcpy(value)))
    return found


async def _measure_in_loop(name: str, points: list[tuple[int, int]], seconds: float) -> list[_Figure]:
    found: list[_Figure] = []

    async def measure(call: Call) -> None:
        for size, in_flight in points:
            value = _value(size)
            await call(value)
            taken = await _time_in_loop(call, value, in_flight, seconds)
            found.append(_Figure(size, in_flight, taken, _memcpy(value)))

    if name == "anyio.to_process":
        import anyio
        import anyio.to_process

        limiter = anyio.CapacityLimiter(1)
        await measure(lambda value: anyio.to_process.run_sync(same, value, limiter=limiter))
        return found
    import tractor_host as th

    _, backend, how = name.split(", ")
    async with th.open_nursery(backend, runtime="sync" if how == "sync" else "trio") as nursery:
        portal = await nursery.start_actor()
        if how == "async":
            await measure(lambda value: portal.run(same_in_loop, value))
        else:
            await measure(lambda value: portal.run(same, value))
    return found


def _serve(wanted: str) -> None:
    """Measures one contestant, and prints that."""
    name, points, seconds = json.loads(wanted)
    print(json.dumps([dataclasses.astuple(figure) for figure in _measure(name, points, seconds)]))


def _run(name: str, points: list[tuple[int, int]], seconds: float) -> list[_Figure]:
    # In a Python of its own, which has no `__main__` that workers would run again.
    code = "import sys; from tractor_host.bench.calls import _serve; _serve(sys.argv[1])"
    wanted = json.dumps([name, points, seconds])
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code, wanted], stdout=subprocess.PIPE, timeout=_LIMIT, check=True
    )
    return [_Figure(*figure) for figure in json.loads(ran.stdout)]


def _rows(names: list[str], points: list[tuple[int, int]], seconds: float, rounds: int) -> list[Row]:
    """Measures all of them, in turns."""
    found: dict[tuple[str, int, int], list[float]] = {}
    copies: dict[int, list[float]] = {}
    for _ in range(rounds):
        for name in names:
            for figure in _run(name, points, seconds):
                found.setdefault((name, figure.size, figure.in_flight), []).append(figure.call)
                copies.setdefault(figure.size, []).append(figure.memcpy)
    rows = []
    for size, in_flight in points:
        unit = statistics.median(found[names[0], size, in_flight])
        memcpy = statistics.median(copies[size])
        for name in names:
            call = statistics.median(found[name, size, in_flight])
            rows.append(
                Row(
                    name=name,
                    size=size,
                    in_flight=in_flight,
                    us=call * 1e6,
                    ratio=call / unit,
                    copies=call / memcpy if memcpy else None,
                )
            )
    return rows


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("tractor-host bench calls", description=__doc__)
    parser.add_argument(
        "--size", type=int, nargs="+", default=[0, 1 << 10, 1 << 20, 100 << 20], metavar="BYTES",
        help="what a call carries there and back (default 0, 1 KiB, 1 MiB, 100 MiB)",
    )  # fmt: skip
    parser.add_argument(
        "--in-flight", type=int, nargs="+", default=[1, 10, 100], metavar="N",
        help="calls on their way at a time (default 1, 10, 100); but no more than 256 MiB in all",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure of a round")
    parser.add_argument("-n", "--rounds", type=int, default=3, help="programs of each kind (default 3)")
    parser.add_argument("--only", action="append", default=[], help="contestants with this in their names")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.in_flight) < 1 or min(options.size) < 0:
        parser.error("there must be a round, and a call in flight, and no size is below 0")
    if not 0 < options.seconds < 1e6:
        parser.error("--seconds must be above 0")
    points = [(size, count) for size in options.size for count in options.in_flight if size * count <= MOST]
    names = [name for name in (*POOLS, *LOOPED) if _is_there(name)]
    if options.only:
        names = [name for name in names if any(word in name for word in options.only)]
    if not points or not names:
        parser.error("nothing is left to be measured")
    try:
        rows = _rows(names, points, options.seconds, options.rounds)
    except subprocess.CalledProcessError:
        return 1  # it has said why
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        _print(rows)
    return 0


def _is_there(name: str) -> bool:
    return all(find_spec(module) is not None for module in _NEEDS.get(name, ()))


def _print(rows: list[Row]) -> None:
    heads = ("bytes", "in flight", "contestant", "us a call", "calls/s", "ratio", "call/memcpy")
    table: list[tuple[str, ...]] = [heads]
    for row in rows:
        copies = "-" if row.copies is None else f"{row.copies:.2f}"
        numbers = (f"{row.us:,.1f}", f"{1e6 / row.us:,.0f}", f"{row.ratio:.2f}", copies)
        table.append((f"{row.size:,}", str(row.in_flight), row.name, *numbers))
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[2] = line[2].ljust(widths[2])
        print("  ".join(cells).rstrip())
    print(f"ratio: in units of {rows[0].name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
