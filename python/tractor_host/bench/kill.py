"""How fast, and by which rung, each shape of stuck code ends in a subinterpreter: `bench kill`.

Each round spawns a worker, waits until it is stuck, and kills it without the polite first rung. Leaked
is what the process owns at the end of a shape's rounds beyond what it owned before them. One more round
goes before: what libraries open once in a process is nobody's leak.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections import Counter
from typing import Any

import tractor_host as th
from tractor_host import _native, testing


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One shape under one GIL; times in milliseconds from `kill()` to the worker's end."""

    shape: str
    variant: str
    gil: str
    ended: str
    rungs: str
    p50: float
    p99: float
    worst: float
    leaked: str


def measure(shape: str, variant: testing.Variant, gil: Any, rounds: int, kill_timeout: float) -> Row:
    """Runs the rounds of one row."""
    if testing.SHAPES[shape].can_be_ended:
        _kill(shape, variant, gil, kill_timeout)
    before = _owned()
    ends: Counter[str] = Counter()
    rungs: Counter[str] = Counter()
    times = []
    for _ in range(rounds):
        found = _kill(shape, variant, gil, kill_timeout)
        ends["abandoned" if found.kind == "abandoned" else "destroyed"] += 1
        rungs[found.rung or "-"] += 1
        times.append((found.elapsed or 0.0) * 1e3)
    times.sort()
    return Row(
        shape=shape,
        variant=variant,
        gil=gil,
        ended=_counts(ends),
        rungs=_counts(rungs),
        p50=round(times[len(times) // 2], 1),
        p99=round(times[-(-len(times) * 99 // 100) - 1], 1),
        worst=round(times[-1], 1),
        leaked=_leaked(before),
    )


def _kill(shape: str, variant: testing.Variant, gil: Any, kill_timeout: float) -> th.Exit:
    with th.spawn(
        "tractor_host.testing:stuck",
        shape,
        variant,
        backend="subint",
        gil=gil,
        stdio="pipe",
        cancel_timeout=0,
        kill_timeout=kill_timeout,
    ) as worker:
        testing.wait_ready(worker)
        return worker.kill()


def _counts(counter: Counter[str]) -> str:
    if len(counter) == 1:
        return next(iter(counter))
    return " ".join(f"{name}:{count}" for name, count in counter.most_common())


def _owned() -> dict[str, int]:
    from concurrent import interpreters

    found = _native.resources()
    return {
        "threads": len(found["threads"]),
        "fds": len(found["fds"]),
        "children": len(found["children"]),
        "interpreters": len(interpreters.list_all()),
    }


def _leaked(before: dict[str, int]) -> str:
    deadline = time.monotonic() + 2
    while True:
        gc.collect()
        after = _owned()
        left = {key: after[key] - before[key] for key in after if after[key] > before[key]}
        if not left or time.monotonic() > deadline:
            return " ".join(f"{key}:{count}" for key, count in left.items()) or "0"
        time.sleep(0.005)


def main(arguments: list[str]) -> int:
    """The command; its exit code says whether every shape that can be ended was destroyed."""
    parser = argparse.ArgumentParser("tractor-host bench kill", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=20, help="kills a row (default 20)")
    parser.add_argument("--gil", choices=["shared", "own", "both"], default="both")
    parser.add_argument("--shape", action="append", choices=list(testing.SHAPES), help="only these shapes")
    parser.add_argument("--variant", action="append", choices=list(testing.VARIANTS), help="only these")
    parser.add_argument("--abandonable", action="store_true", help="also code in C that can't be ended")
    parser.add_argument("--kill-timeout", type=float, default=3.0, help="seconds (default 3)")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true")
    style.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)

    # The supervisor's own threads and fds are nobody's leak.
    th.spawn("os:getpid", backend="subint").result(timeout=60)
    rows = []
    for name, shape in testing.SHAPES.items():
        if options.shape and name not in options.shape:
            continue
        if not shape.can_be_ended and not options.abandonable:
            continue
        for variant in shape.variants:
            if options.variant and variant not in options.variant:
                continue
            for gil in ("shared", "own") if options.gil == "both" else (options.gil,):
                if shape.hogs_gil and gil == "shared":
                    continue  # it would hog ours too
                # One that stays is enough to see that it does.
                rounds = options.rounds if shape.can_be_ended else 1
                rows.append(measure(name, variant, gil, rounds, options.kill_timeout))
                if sys.stderr.isatty():
                    print(f"\r{name} {variant} {gil}\033[K", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    _print(rows, options)
    failed = [row for row in rows if testing.SHAPES[row.shape].can_be_ended and row.ended != "destroyed"]
    return 1 if failed else 0


def _print(rows: list[Row], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    heads = ("shape", "variant", "gil", "ended", "rung", "p50 ms", "p99 ms", "worst ms", "leaked")
    table = [heads, *(tuple(map(str, dataclasses.astuple(row))) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    joint = " | " if options.markdown else "  "
    for index, line in enumerate(table):
        text = joint.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {text} |" if options.markdown else text.rstrip())
        if index == 0 and options.markdown:
            print(f"|{'|'.join('-' * (width + 2) for width in widths)}|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
