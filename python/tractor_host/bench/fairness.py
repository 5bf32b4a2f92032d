"""What busy subinterpreters leave to the program and to each other: `tractor-host bench fairness`.

Each row is a program of its own: a trio loop in the main interpreter sleeps 10 ms again and again beside
busy workers, and notes how late it wakes. The workers count the seconds of processor time that they have had.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, Final

import tractor_host as th

#: How long the loop in the main interpreter sleeps, in seconds.
NAP: Final = 0.01
#: What each worker has room for in the file: rounds, and seconds of processor time.
_CELL: Final = struct.Struct("=qd")
#: Who is measured.
KINDS: Final = ("plain _interpreters", "TRACTOR_HOST_SCHEDULER=0", "tractor_host")
#: What three workers ask for, three others, and one with a GIL of its own.
WEIGHTS: Final = (1.0, 2.0, 4.0)
QUOTAS: Final = (0.1, 0.3, None)
OWN: Final = 0.2

#: What a busy worker runs; also in a plain subinterpreter, which need not find this file.
_BUSY: Final = """
import mmap, os, struct, time
def busy(path, at):
    fd = os.open(path, os.O_RDWR)
    cells = mmap.mmap(fd, 0)
    os.close(fd)
    cell, rounds, clock = struct.Struct("=qd"), 0, time.thread_time
    while True:
        for _ in range(20_000):
            pass
        rounds += 1
        cell.pack_into(cells, at * cell.size, rounds, clock())
"""


def busy(path: str, at: int) -> None:
    """A worker's target: computes, and counts that in a file."""
    names: dict[str, Any] = {}
    exec(_BUSY, names)
    names["busy"](path, at)


class Cells:
    """What the workers have had so far."""

    def __init__(self, path: str, count: int) -> None:
        self.path, self.count = path, count
        with open(path, "wb+") as file:
            file.truncate(_CELL.size * count)
            self._map = mmap.mmap(file.fileno(), 0)

    def read(self) -> tuple[list[int], list[float]]:
        """Rounds, and seconds of processor time, of each."""
        pairs = [_CELL.unpack_from(self._map, at * _CELL.size) for at in range(self.count)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _start(kind: str, cells: Cells, terms: list[dict[str, Any]]) -> list[th.Worker]:
    if kind != KINDS[0]:
        return [
            th.spawn(busy, cells.path, at, backend="subint", cancel_timeout=0, **asked)
            for at, asked in enumerate(terms)
        ]
    import _interpreters

    go = f"{cells.path}.go"
    for at in range(len(terms)):
        code = f"{_BUSY}\nwhile not os.path.exists({go!r}): time.sleep(0.05)\nbusy({cells.path!r}, {at})"
        number = _interpreters.create("legacy")
        threading.Thread(target=_interpreters.exec, args=(number, code), daemon=True).start()
    time.sleep(0.5)
    open(go, "w").close()
    return []


async def _lateness(seconds: float) -> list[float]:
    import trio

    late, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        await trio.sleep(NAP)
        late.append((time.perf_counter() - begun - NAP) * 1e3)
    return sorted(late)


def _begun(cells: Cells, patience: float = 120.0) -> bool:
    """Waits until all of them run."""
    end = time.monotonic() + patience
    while not all(cells.read()[0]):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def measure(kind: str, terms: list[dict[str, Any]], seconds: float, starts: int) -> dict[str, Any]:
    """One row, in a program that is left without ceremony afterwards."""
    import trio

    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        if kind != KINDS[0] and starts:
            found["idle_start"] = median(_start_times(starts))
        cells = Cells(os.path.join(folder, "cells"), max(1, len(terms)))
        if terms:
            _start(kind, cells, terms)
            if not _begun(cells):
                return {"error": "they did not all start within 120 s"}
            time.sleep(1.0)
        rounds, used = cells.read()
        begun, own = time.perf_counter(), time.thread_time()
        late = trio.run(_lateness, seconds)
        elapsed = time.perf_counter() - begun
        own = time.thread_time() - own
        rounds_after, used_after = cells.read()
        found["late"] = [late[len(late) // 2], late[int(len(late) * 0.99)], late[-1]]
        found["rate"] = sum(rounds_after) / elapsed - sum(rounds) / elapsed
        found["own"] = own / elapsed
        found["used"] = [(after - before) / elapsed for before, after in zip(used, used_after, strict=True)]
        if kind != KINDS[0] and starts and terms:
            found["busy_start"] = median(_start_times(starts))
        return found


def _start_times(most: int, patience: float = 20.0) -> Iterator[float]:
    """From a spawn to the end of a target that does nothing, in ms: at least once, for about `patience`
    seconds, as without the scheduler one of them may take that long.
    """
    end = time.perf_counter() + patience
    for _ in range(most):
        begun = time.perf_counter()
        th.spawn("builtins:int", backend="subint").result(120)
        yield (time.perf_counter() - begun) * 1e3
        if time.perf_counter() > end:
            return


def _row(kind: str, terms: list[dict[str, Any]], seconds: float, starts: int) -> dict[str, Any]:
    request = json.dumps([kind, terms, seconds, starts])
    environment = {**os.environ, "TRACTOR_HOST_SCHEDULER": "0" if kind == KINDS[1] else "1"}
    code = f"from tractor_host.bench import fairness; fairness.one({request!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"a measurement failed ({done.returncode}): {done.stderr}") from None
    return found


def one(request: str) -> None:
    """Measures one row, and prints it; does not return."""
    print(json.dumps(measure(*json.loads(request))), flush=True)
    os._exit(0)


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


def _seconds(text: str) -> float:
    if not 0 < (seconds := float(text)) < 1e6:
        raise ValueError
    return seconds


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tractor-host bench fairness", description=__doc__)
    parser.add_argument(
        "--busy", type=_count, nargs="+", default=[3, 25], metavar="N", help="so many busy workers"
    )
    parser.add_argument("--seconds", type=_seconds, default=8.0, help="for each row")
    parser.add_argument(
        "--starts", type=_count, default=15, help="workers started beside them, for the median"
    )
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    asked = parser.parse_args(arguments)
    rows = _rows(asked.busy, asked.seconds, asked.starts)
    if asked.json:
        print(json.dumps({**dict(rows), **dict(_terms(asked.seconds))}))
        return 0
    print("How late a trio loop in the main interpreter wakes (ms), and what it and the workers have.\n")
    titles = f"{'':34}{'p50':>8}{'p99':>8}{'max':>8}{'program':>9}"
    print(f"{titles}{'spread':>8}{'work':>7}{'start idle':>12}{'beside':>9}", flush=True)
    reference = None
    for name, row in rows:
        if name.endswith(KINDS[0]):
            reference = row.get("rate")
        print(f"{name:34}{_line(row, reference)}", flush=True)
    print("\nprogram: its part of a processor.")
    print("spread: the most and least processor time of a worker, from the mean.")
    print(f"work: rounds done a second, as a part of those with {KINDS[0]}.")
    print("start: a worker that does nothing, from its spawn to its end (ms, median).\n")
    terms = dict(_terms(asked.seconds))
    total = sum(terms["priority"]["used"])
    for weight, part in zip(WEIGHTS, terms["priority"]["used"], strict=True):
        print(f"priority {weight:g}: asked {weight / sum(WEIGHTS):6.1%}, got {part / total:6.1%}")
    for quota, part in zip(QUOTAS, terms["quota"]["used"], strict=True):
        print(f"cpu_quota {quota}: got {part:.3f} of a processor")
    print(f"cpu_quota {OWN}, own GIL: got {terms['own']['used'][0]:.3f} of a processor")
    return 0


def _rows(counts: list[int], seconds: float, starts: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "no worker", _row(KINDS[2], [], seconds, 0)
    for count in counts:
        for kind in KINDS:
            yield f"{count} busy, {kind}", _row(kind, [{}] * count, seconds, starts)


def _terms(seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "priority", _row(KINDS[2], [{"priority": weight} for weight in WEIGHTS], seconds, 0)
    yield "quota", _row(KINDS[2], [{"cpu_quota": quota} for quota in QUOTAS], seconds, 0)
    yield "own", _row(KINDS[2], [{"cpu_quota": OWN, "gil": "own"}], seconds, 0)


def _line(row: dict[str, Any], reference: float | None) -> str:
    if "error" in row:
        return f"  {row['error']}"
    line = "".join(f"{late:8.2f}" for late in row["late"]) + f"{row['own']:9.1%}"
    if any(row["used"]):
        mean = sum(row["used"]) / len(row["used"])
        line += f"{max(max(row['used']) / mean - 1, 1 - min(row['used']) / mean):8.0%}"
        line += f"{row['rate'] / reference:7.2f}" if reference else f"{'':7}"
    if "busy_start" in row:
        line += f"{row['idle_start']:12.1f}{row['busy_start']:9.1f}"
    return line
