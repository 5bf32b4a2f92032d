"""What it costs to give a worker a large array and to have it back, next to what else there is: `bench
share`.

The array is bytes that pickle as a numpy array does. The worker reads a byte of every page of it; what comes
back is read here in the same way. All contestants take turns in one process, and a copy of the array within
that process (memcpy, to memory that is there) is the unit. `call` is what a call costs that carries nothing:
mostly the start of a worker, but for those that have theirs before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import tractor_host as th
from tractor_host.bench import _block
from tractor_host.bench._block import Block

#: Seconds that one call may take.
_PATIENCE = 120.0
Call = Callable[[Callable[[Any], Any], Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One contestant and one size; milliseconds, medians. `None` where it has no such way.

    Attributes:
        name: The contestant.
        mib: The size of the array.
        call: A call that carries 1 KiB there.
        there: One that carries the array there.
        both: One that carries it there and back.
        memcpy: A copy of it in this process, in the same turns.
        there_ratio: What `there` takes beyond `call`, in units of that.
        both_ratio: What `both` does.
    """

    name: str
    mib: int
    call: float
    there: float
    both: float | None
    memcpy: float
    there_ratio: float
    both_ratio: float | None


def _tractor_host(backend: str) -> Call:
    def call(function: Callable[[Any], Any], block: Any) -> Any:
        return th.spawn(function, block, backend=backend).result(timeout=_PATIENCE)

    return call


def _process(method: str) -> Call:
    import multiprocessing

    context: Any = multiprocessing.get_context(method)

    def call(function: Callable[[Any], Any], block: Any) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=_block.over_pipe, args=(theirs,))
        process.start()
        theirs.close()
        ours.send((function, block))
        found = ours.recv()
        ours.close()
        process.join()
        return found

    return call


def _pools() -> tuple[dict[str, Call], list[Callable[[], object]]]:
    """Those whose workers are there before, and how to end them."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("forkserver")
    pool = context.Pool(1)
    executor = ProcessPoolExecutor(1, mp_context=context)

    def close() -> None:
        pool.close()
        pool.join()

    calls: dict[str, Call] = {
        "multiprocessing.Pool": lambda function, block: pool.apply(function, (block,)),
        "ProcessPoolExecutor": lambda function, block: executor.submit(function, block).result(_PATIENCE),
    }
    ends: list[Callable[[], object]] = [close, executor.shutdown]
    if find_spec("loky") is not None:
        from loky import get_reusable_executor  # type: ignore[import-not-found]

        reusable = get_reusable_executor(1, timeout=None)
        calls["loky"] = lambda function, block: reusable.submit(function, block).result(_PATIENCE)
        ends.append(lambda: reusable.shutdown(wait=True))
    return calls, ends


BACKENDS = ("subint", "forkserver", "subint_forkserver", "fork", "exec")
SHARED = "th.share, forkserver"


def _measure(sizes: list[int], rounds: int, only: list[str]) -> list[Row]:
    calls: dict[str, Call] = {f"th {backend}": _tractor_host(backend) for backend in BACKENDS}
    calls[SHARED] = _tractor_host("forkserver")
    calls |= {f"multiprocessing.Process, {method}": _process(method) for method in ("forkserver", "spawn")}
    pools, ends = _pools()
    calls |= pools
    if only:
        calls = {name: call for name, call in calls.items() if any(word in name for word in only)}
    try:
        return [row for size in sizes for row in _rows(size, calls, rounds)]
    finally:
        for end in ends:
            end()


def _rows(mib: int, calls: dict[str, Call], rounds: int) -> list[Row]:
    nothing = Block(bytearray(1 << 10))
    # No page is the kernel's one page of zeros.
    block, copy = Block(bytearray(b"\1") * (mib << 20)), bytearray(b"\2") * (mib << 20)
    shared = th.share(block)
    times: dict[tuple[str, str], list[float]] = {}

    def take(name: str, what: str, function: Callable[[], object]) -> None:
        start = time.perf_counter()
        function()
        times.setdefault((name, what), []).append((time.perf_counter() - start) * 1e3)

    for turn in range(rounds + 1):
        if turn == 1:
            times.clear()  # the first turn has started what there is one of
        take("", "memcpy", lambda: copy.__setitem__(slice(None), block.data))
        for name, call in calls.items():
            given = shared if name == SHARED else block
            take(name, "call", lambda call=call: call(_block.there, nothing))  # type: ignore[misc]
            take(name, "there", lambda call=call, given=given: call(_block.there, given))  # type: ignore[misc]
            if name != SHARED:
                take(name, "both", lambda call=call: call(_block.there_and_back, block).read())  # type: ignore[misc]
    memcpy = statistics.median(times["", "memcpy"])
    rows = []
    for name in calls:
        base, there = (statistics.median(times[name, what]) for what in ("call", "there"))
        both = statistics.median(times[name, "both"]) if (name, "both") in times else None
        rows.append(
            Row(
                name=name,
                mib=mib,
                call=base,
                there=there,
                both=both,
                memcpy=memcpy,
                there_ratio=(there - base) / memcpy,
                both_ratio=None if both is None else (both - base) / memcpy,
            )
        )
    return rows


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("tractor-host bench share", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=7, help="calls of each kind (default 7)")
    parser.add_argument(
        "--mib", type=int, action="append", help="a size; may be given again (default 1, 10, 100)"
    )
    parser.add_argument("--only", action="append", default=[], help="contestants with this in their names")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes = options.mib or [1, 10, 100]
    if options.rounds < 1 or min(sizes) < 1:
        parser.error("there must be a round, and a MiB")
    # In a Python of its own, which has no `__main__` that workers would run again.
    code = "import sys; from tractor_host.bench.share import _serve; _serve(sys.argv[1])"
    wanted = json.dumps({"sizes": sizes, "rounds": options.rounds, "only": options.only})
    ran = subprocess.run([sys.executable, "-P", "-c", code, wanted], stdout=subprocess.PIPE, check=False)
    if ran.returncode != 0:
        return 1
    rows = [Row(**row) for row in json.loads(ran.stdout)]
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        _print(rows)
    return 0 if rows else 1


def _serve(wanted: str) -> None:
    rows = _measure(**json.loads(wanted))
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


def _print(rows: list[Row]) -> None:
    heads = ("MiB", "contestant", "call ms", "there ms", "both ms", "there/memcpy", "both/memcpy")
    table: list[tuple[str, ...]] = [heads]
    for row in rows:
        numbers = (row.call, row.there, row.both, row.there_ratio, row.both_ratio)
        table.append((str(row.mib), row.name, *("-" if one is None else f"{one:.2f}" for one in numbers)))
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[1] = line[1].ljust(widths[1])
        print("  ".join(cells).rstrip())
    copies = ", ".join(f"{mib} MiB {ms:.2f} ms" for mib, ms in {row.mib: row.memcpy for row in rows}.items())
    print(f"memcpy: {copies}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
