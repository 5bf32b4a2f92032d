"""What it costs to start a worker and to see its end, next to what CPython itself has to offer.

Each contestant lives in a Python process of its own, which takes its times itself, and all of them
take turns (A B C A B C …), so that whatever else the machine does hits all alike. Two times are taken:

- reaped: from the request until the worker, which does nothing, has ended and was waited for;
- answered: from the request until the value of one call (`os.getpid()`) in the worker is here.

`Worker.result()` waits for the end, so for tractor_host the two differ by next to nothing.

    python benches/spawn.py [-n ROUNDS] [--only NAME …] [--json | --markdown]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection
    from typing import Any

#: Takes one measurement, in seconds, and tidies up after it.
type Measure = Callable[[], float]


# -- the contestants: two measures each --------------------------------------------------------------


def tractor_host(**options: Any) -> tuple[Measure, Measure]:
    import tractor_host as th

    def reaped() -> float:
        begun = time.perf_counter()
        th.spawn("os:getpid", **options).wait()
        return time.perf_counter() - begun

    def answered() -> float:
        begun = time.perf_counter()
        assert th.spawn("os:getpid", **options).result()
        return time.perf_counter() - begun

    return reaped, answered


def os_fork() -> tuple[Measure, Measure]:
    def reaped() -> float:
        begun = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return time.perf_counter() - begun

    def answered() -> float:
        begun = time.perf_counter()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, b"%d" % os.getpid())
            os._exit(0)
        assert int(os.read(reading, 32)) == pid
        seconds = time.perf_counter() - begun
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
        return seconds

    return reaped, answered


def multiprocessing(method: str) -> tuple[Measure, Measure]:
    from multiprocessing import get_context

    context: Any = get_context(method)

    def reaped() -> float:
        begun = time.perf_counter()
        process = context.Process(target=os.getpid)
        process.start()
        process.join()
        seconds = time.perf_counter() - begun
        process.close()
        return seconds

    def answered() -> float:
        begun = time.perf_counter()
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=send_pid, args=(writing,))
        process.start()
        assert reading.recv() == process.pid
        seconds = time.perf_counter() - begun
        process.join()
        process.close()
        reading.close()
        writing.close()
        return seconds

    return reaped, answered


def send_pid(connection: Connection) -> None:
    connection.send(os.getpid())


def interpreters() -> tuple[Measure, Measure]:
    from concurrent import interpreters

    def reaped() -> float:
        begun = time.perf_counter()
        interpreter = interpreters.create()
        interpreter.exec("pass")
        interpreter.close()
        return time.perf_counter() - begun

    def answered() -> float:
        begun = time.perf_counter()
        interpreter = interpreters.create()
        assert interpreter.call(os.getpid)
        seconds = time.perf_counter() - begun
        interpreter.close()
        return seconds

    return reaped, answered


def fresh_python() -> tuple[Measure, Measure]:
    def reaped() -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
        return time.perf_counter() - begun

    def answered() -> float:
        command = [sys.executable, "-S", "-c", "import os; print(os.getpid())"]
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert int(process.stdout.read()) == process.pid
            seconds = time.perf_counter() - begun
        return seconds

    return reaped, answered


CONTESTANTS: Mapping[str, Callable[[], tuple[Measure, Measure]]] = {
    "th subint": lambda: tractor_host(backend="subint"),
    "th subint, own GIL": lambda: tractor_host(backend="subint", gil="own"),
    "th forkserver": lambda: tractor_host(backend="forkserver"),
    "th fork": lambda: tractor_host(backend="fork"),
    "th exec": lambda: tractor_host(backend="exec"),
    "os.fork": os_fork,
    "mp forkserver": lambda: multiprocessing("forkserver"),
    "mp spawn": lambda: multiprocessing("spawn"),
    "interpreters": interpreters,
    "python -S -c pass": fresh_python,
}
#: What the others' medians are divided by.
YARDSTICKS = ("os.fork", "mp forkserver")


# -- taking turns ------------------------------------------------------------------------------------


def serve(name: str) -> None:
    """The process of one contestant: a line in is a measure, a line out its seconds."""
    import warnings

    # Forking beside threads of one's own is what the documentation warns of, and not measured here.
    warnings.simplefilter("ignore", DeprecationWarning)
    reaped, answered = CONTESTANTS[name]()
    for line in sys.stdin:
        print((reaped if line == "reaped\n" else answered)(), flush=True)


class Contestant:
    """A process that runs `serve`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.times: dict[str, list[float]] = {"reaped": [], "answered": []}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, what: str, *, keep: bool = True) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with exit status {self._process.wait()}")
        if keep:
            self.times[what].append(float(line))

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._process:
            if exc_info[0] is not None:
                self._process.kill()


def run(names: Sequence[str], rounds: int) -> list[Contestant]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        contestants = [stack.enter_context(Contestant(name)) for name in names]
        # Servers are started and modules imported by whoever comes first.
        for index in range(-3, rounds):
            if sys.stderr.isatty():
                print(f"round {max(index, 0)} of {rounds}", end="\r", file=sys.stderr, flush=True)
            for what in ("reaped", "answered"):
                for contestant in contestants:
                    contestant.measure(what, keep=index >= 0)
    return contestants


# -- figures -----------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def summary(contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """A row for each contestant, in milliseconds."""
    rows: list[dict[str, Any]] = []
    for contestant in contestants:
        row: dict[str, Any] = {"name": contestant.name}
        for what, times in contestant.times.items():
            for title, share in (("p50", 0.5), ("p95", 0.95)):
                row[f"{what} {title}"] = 1000 * percentile(times, share)
        rows.append(row)
    medians = {row["name"]: row["reaped p50"] for row in rows}
    for row in rows:
        for yardstick in YARDSTICKS:
            if yardstick in medians:
                row[f"x {yardstick}"] = row["reaped p50"] / medians[yardstick]
    return rows


def table(rows: Sequence[dict[str, Any]], *, markdown: bool) -> str:
    cells = [list(rows[0])]
    for row in rows:
        cells.append([value if isinstance(value, str) else f"{value:.2f}" for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            f"{cell:>{width}}" if index else f"{cell:<{width}}"
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |" if markdown else "  ".join(padded))
    if markdown:
        lines.insert(
            1,
            "|"
            + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths))
            + "|",
        )
    return "\n".join(lines)


def about(rounds: int) -> dict[str, Any]:
    import platform

    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.process_cpu_count(),
        "rounds": rounds,
    }


def parse_arguments() -> argparse.Namespace:
    import argparse

    parser = argparse.ArgumentParser(description="Times starting a worker and seeing its end.")
    parser.add_argument("-n", "--rounds", type=int, default=100, help="measurements of each kind")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help="these contestants")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON, with all single times")
    shape.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("-n must be at least 1")
    return options


def main() -> None:
    options = parse_arguments()
    if options.serve:
        serve(options.serve)
        return
    if sys.flags.dont_write_bytecode:
        # Every fresh Python would compile what it imports: an environment that nobody runs workers in.
        print("started again without PYTHONDONTWRITEBYTECODE", file=sys.stderr, flush=True)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:]])
    contestants = run(options.only or list(CONTESTANTS), options.rounds)
    rows = summary(contestants)
    facts = about(options.rounds)
    if options.json:
        import json

        times = {contestant.name: contestant.times for contestant in contestants}
        print(json.dumps({**facts, "unit": "ms", "results": rows, "seconds": times}, indent=2))
        return
    print(table(rows, markdown=options.markdown))
    print(f"\nmilliseconds; x: of that one's median until reaped; {facts}")


if __name__ == "__main__":
    main()
