"""What it costs to start a worker and to see its end, next to what else there is: `bench spawn`.

Each contestant is measured in a plain Python process of its own, and they take turns (A B C A B C …), so
that whatever else the machine does hits all alike. Where many live workers or much memory would not fit
side by side, they come one after the other, each of them in turns with os.fork.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from tractor_host.bench import _contestants
from tractor_host.bench._contestants import CONTESTANTS, YARDSTICK

#: Up to so many live workers, and MiB of ballast, all contestants are there at the same time.
_LIVE_TOGETHER = 10
_BALLAST_TOGETHER = 64
#: So many live workers are started at once: some of their ways give up when the machine is too busy.
_CHUNK = 16
#: The share of the available memory that may be taken.
_SHARE = 0.7
#: Seconds that the processes of a contestant have for leaving by themselves.
_PATIENCE = 5.0
#: In so many bursts throughput is measured; contestants take turns in these too.
_BURSTS = 3


class Setting(NamedTuple):
    """What is there while a worker is started.

    Attributes:
        preload: Modules that workers find imported; in the parent where that forks, or in its fork server.
        ballast: MiB of anonymous memory that the parent has touched.
        live: Idle workers of the same contestant.
        blanks: Idle processes that tractor_host's fork server keeps ready.
    """

    preload: tuple[str, ...]
    ballast: int
    live: int
    blanks: int

    @property
    def modules(self) -> str:
        """What is preloaded, in words."""
        return "+".join(self.preload) or "bare"

    def __str__(self) -> str:
        return f"{self.modules}, ballast {self.ballast} MiB, live {self.live}"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One contestant in one setting; `None` where there is nothing to say.

    Attributes:
        name: The contestant.
        preload: The modules that were preloaded, joined by `+`, or `bare`.
        ballast: MiB that the parent held.
        live: Idle workers that were there.
        p50, p95, max: Milliseconds from the request until a worker that does nothing was waited for.
        answered: Milliseconds from the request until the value of one call was here; the median.
        throughput: Workers started and reaped per second, by `--jobs` threads at once.
        ratio: `p50` in units of that of os.fork in the same turns.
        private: MiB of memory that each live worker shares with nobody: of a process its private pages, of
            a subinterpreter the growth of its process, which tells something for many of them only.
        kill: Milliseconds for ending all live workers at once.
        seconds: All single times by what was measured, in seconds.
    """

    name: str
    preload: str
    ballast: int
    live: int
    p50: float
    p95: float
    max: float
    answered: float
    throughput: float
    ratio: float | None
    private: float | None
    kill: float | None
    seconds: dict[str, list[float]]


class Trouble(Exception):
    """A contestant has no row."""


class Refused(Trouble):
    """What is asked for does not fit this machine."""


class Failed(Trouble):
    """A contestant did not do what it was asked to."""


# -- a contestant's process --------------------------------------------------------------------------


class Contestant:
    """A process that runs `_contestants.serve`, with its live workers.

    Raises:
        Refused: The machine lacks what it takes.
        Failed: It did not start, or not in time.
    """

    def __init__(self, name: str, setting: Setting, timeout: int) -> None:
        self.name = name
        self.setting = setting
        #: Seconds, by what was measured.
        self.times: dict[str, list[float]] = {"reaped": [], "answered": [], "burst": []}
        #: Bytes of private memory of a live worker.
        self.private: float | None = None
        self._timeout = timeout
        self._output = b""
        _check_memory(setting.ballast << 20)
        settings = json.dumps({**setting._asdict(), "timeout": timeout})
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _contestants.MAIN, _contestants.__file__, name, settings],
            env=_environment(setting.blanks),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        try:
            self._reply()
            self._hold()
        except BaseException:
            self.abort()
            raise

    def _hold(self) -> None:
        held = 0
        while held < self.setting.live:
            count = min(_CHUNK, self.setting.live - held)
            self.private = float(self._ask("hold", count))
            held += count
            _progress(f"{self.name}: {held} of {self.setting.live} live")
            _check_memory((self.setting.live - held) * self.private)

    def measure(self, what: str, *arguments: int, keep: bool = True) -> None:
        """Takes one time of a kind; see `_contestants.Server`.

        Raises:
            Refused, Failed: As its start.
        """
        seconds = float(self._ask(what, *arguments))
        if keep:
            self.times[what].append(seconds)

    def kill(self) -> float:
        """Ends the live workers; seconds.

        Raises:
            Refused, Failed: As its start, and when some of them, or others, are still there.
        """
        seconds = float(self._ask("kill"))
        if left := self._ask("left"):
            raise Failed(f"processes that should have ended: {len(left)}")
        return seconds

    def close(self) -> None:
        """Lets it end.

        Raises:
            Failed: Processes were left over. They have been killed.
        """
        if left := self._end(_PATIENCE):
            raise Failed(f"processes that were left over, and killed: {left}")

    def abort(self) -> None:
        """Ends it and all that it has started, if that was not done."""
        self._end(0)

    def _ask(self, *request: object) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it has ended
            self._process.stdin.write(f"{json.dumps(request)}\n".encode())
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        # It ends itself when its time is up, and is killed when it does not.
        deadline = time.monotonic() + self._timeout + 2
        while b"\n" not in self._output:
            ready = [fd for fd, _ in poll.poll(max(0, deadline - time.monotonic()) * 1000)]
            if not ready:
                raise Failed(f"no reply within {self._timeout} s")
            more = os.read(output, 1 << 16) if output in ready else b""
            if not more:
                raise Failed(self._how_it_ended())
            self._output += more
        line, _, self._output = self._output.partition(b"\n")
        reply = json.loads(line)
        if isinstance(reply, dict):
            raise Refused(reply["refused"]) if "refused" in reply else Failed(reply["failed"])
        return reply

    def _how_it_ended(self) -> str:
        select.select([self._pidfd], [], [], _PATIENCE)
        found = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return "its process closed its output"
        if found.si_code == os.CLD_EXITED:
            return f"its process ended with exit status {found.si_status}"
        if found.si_status == signal.SIGALRM:
            return f"no reply within {self._timeout} s"
        return f"its process was ended by {signal.Signals(found.si_status).name}"

    def _end(self, patience: float) -> int:
        """Ends its session, whose number is nobody else's until the leader is reaped; how many processes
        had to be killed that should have left."""
        if self._process.returncode is not None:
            return 0
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        deadline = time.monotonic() + patience
        killed: set[int] = set()
        while there := _session(self._process.pid):
            if time.monotonic() >= deadline:
                killed.update(there)
                for pid in there:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        self._process.wait()
        self._process.stdout.close()
        os.close(self._pidfd)
        return len(killed)


def _environment(blanks: int) -> dict[str, str]:
    # With the former, every fresh Python would compile what it imports.
    hidden = ("PYTHONDONTWRITEBYTECODE", "TRACTOR_HOST_PRELOAD")
    # numpy starts threads when it is imported, and the fork server does not fork beside any.
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # What our supervisor would say of each worker that can't be ended is said once, as a failure.
    quiet = {"TRACTOR_HOST_LOG": "off"}
    given = {key: value for key, value in os.environ.items() if key not in hidden}
    return {**one, **quiet, **given, "TRACTOR_HOST_BLANKS": str(blanks)}


def _session(leader: int) -> list[int]:
    """The pids of all processes of a session that have not ended."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:  # it ended just now
            continue
        if int(session) == leader and state not in "ZX":
            found.append(int(name))
    return found


def _check_memory(needed: float) -> None:
    """Raises `Refused` where so many bytes can't be had."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    available = int(fields["MemAvailable"].split()[0]) << 10
    if needed > _SHARE * available:
        raise Refused(f"it would take {needed / 2**20:.0f} MiB, of {available >> 20} MiB that are available")


# -- taking turns ------------------------------------------------------------------------------------


class Table:
    """The rows, and why others are missing."""

    def __init__(self, rounds: int, jobs: int, timeout: int) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []
        self._rounds = rounds
        self._jobs = jobs
        self._timeout = timeout

    def run(self, names: Sequence[str], setting: Setting) -> None:
        """Adds a row for each contestant in one setting."""
        apart = setting.live > _LIVE_TOGETHER or setting.ballast > _BALLAST_TOGETHER
        others = [name for name in names if name != YARDSTICK]
        groups = [[name] for name in others] if apart and others else [others]
        first = len(self.rows)
        with contextlib.ExitStack() as stack:
            forks = self._start(stack, [YARDSTICK] if YARDSTICK in names else [], setting)
            for group in groups:
                with contextlib.ExitStack() as inner:
                    self._run_group(forks, self._start(inner, group, setting))
            for fork in forks:
                self._finish(fork, 1.0)
        self.rows[first:] = sorted(self.rows[first:], key=lambda row: names.index(row.name))

    def _start(self, stack: contextlib.ExitStack, names: Sequence[str], setting: Setting) -> list[Contestant]:
        started = []
        for name in names:
            try:
                started.append(Contestant(name, setting, self._timeout))
            except Trouble as trouble:
                self._note(name, setting, trouble)
            else:
                stack.callback(started[-1].abort)
        return started

    def _run_group(self, forks: list[Contestant], others: list[Contestant]) -> None:
        before = [len(fork.times["reaped"]) for fork in forks]
        # Caches are filled by whoever comes first.
        for index in range(-3, self._rounds):
            _progress(f"round {max(index, 0)} of {self._rounds}")
            for what in ("reaped", "answered"):
                self._turn(forks, others, what, keep=index >= 0)
        for index in range(_BURSTS):
            _progress(f"burst {index} of {_BURSTS}")
            self._turn(forks, others, "burst", self._jobs, self._in_burst)
        medians = [
            _percentile(fork.times["reaped"][start:], 0.5) for fork, start in zip(forks, before, strict=False)
        ]
        for contestant in others:
            median = _percentile(contestant.times["reaped"], 0.5)
            self._finish(contestant, median / medians[0] if forks else None)

    @property
    def _in_burst(self) -> int:
        """Workers that are started in one burst."""
        return max(self._jobs, -(-self._rounds // _BURSTS))

    def _turn(
        self,
        forks: list[Contestant],
        others: list[Contestant],
        what: str,
        *arguments: int,
        keep: bool = True,
    ) -> None:
        """Measures each once; who fails is out."""
        for group in (forks, others):
            for contestant in group[:]:
                try:
                    contestant.measure(what, *arguments, keep=keep)
                except Trouble as trouble:
                    self._note(contestant.name, contestant.setting, trouble)
                    contestant.abort()
                    group.remove(contestant)

    def _finish(self, contestant: Contestant, ratio: float | None) -> None:
        """Ends a contestant, and adds its row."""
        name, setting, times = contestant.name, contestant.setting, contestant.times
        try:
            kill = contestant.kill()
            contestant.close()
        except Trouble as trouble:
            self._note(name, setting, trouble)
            return
        live = setting.live
        self.rows.append(
            Row(
                name=name,
                preload=setting.modules,
                ballast=setting.ballast,
                live=live,
                p50=1e3 * _percentile(times["reaped"], 0.5),
                p95=1e3 * _percentile(times["reaped"], 0.95),
                max=1e3 * max(times["reaped"]),
                answered=1e3 * _percentile(times["answered"], 0.5),
                throughput=len(times["burst"]) * self._in_burst / sum(times["burst"]),
                ratio=ratio,
                private=contestant.private / 2**20 if contestant.private is not None else None,
                kill=1e3 * kill if live else None,
                seconds=times,
            )
        )

    def _note(self, name: str, setting: Setting, trouble: Trouble) -> None:
        line = f"{name} ({setting}): {trouble}"
        (self.skipped if isinstance(trouble, Refused) else self.failed).append(line)


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


# -- the command -------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """The command; its exit code says whether every contestant did what it was asked to."""
    options = _parse(arguments)
    table = Table(options.rounds, options.jobs, options.timeout)
    names = []
    can_preload = set()
    for name in dict.fromkeys(options.only or CONTESTANTS):
        contestant = CONTESTANTS[name]()
        if contestant.needs is not None and not _is_there(contestant.needs):
            table.skipped.append(f"{name}: it is not installed")
            continue
        names.append(name)
        if contestant.preload is not None:
            can_preload.add(name)
    modules = []
    for module in dict.fromkeys(options.preload):
        if _is_there(module):
            modules.append(module)
        else:
            table.skipped.append(f"--preload {module}: it is not installed")
    preloads = [(), tuple(modules)] if modules else [()]
    for preload, ballast, live in itertools.product(preloads, options.ballast or [0], options.live or [1]):
        able = [name for name in names if not preload or name in can_preload]
        table.run(able, Setting(preload, ballast, live, options.blanks))
    _progress("")
    about = _about(options)
    if options.json:
        rows = [dataclasses.asdict(row) for row in table.rows]
        found = {"about": about, "results": rows, "skipped": table.skipped, "failed": table.failed}
        print(json.dumps(found, indent=2))
    else:
        _print(table, about, markdown=options.markdown)
    return 1 if table.failed else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tractor-host bench spawn", description=__doc__)
    several: dict[str, Any] = {"action": "append", "default": []}
    natural: dict[str, Any] = {"type": _at_least(0), "metavar": "N"}
    positive: dict[str, Any] = {"type": _at_least(1), "metavar": "N"}
    add = parser.add_argument
    add("-n", "--rounds", **positive, default=100, help="measurements of each kind (default 100)")
    add("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"of {', '.join(CONTESTANTS)}")
    add("--live", **several, **natural, help="idle workers that are there meanwhile (default 1); repeatable")
    add("--ballast", **several, **natural, help="MiB that the parent holds (default 0); repeatable")
    add("--preload", **several, metavar="MODULE", help="also measure with it preloaded; repeatable")
    add("--blanks", **natural, default=1, help="idle processes that th's fork server keeps (default 1)")
    add("--jobs", **positive, default=2 * (os.process_cpu_count() or 1), help="threads that start workers")
    add("--timeout", **positive, default=120, help="seconds that any one step may take (default 120)")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="with all single times")
    style.add_argument("--markdown", action="store_true")
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of a package that it would be in
        return False


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.process_cpu_count(),
        "rounds": options.rounds,
        "jobs": options.jobs,
        "blanks": options.blanks,
    }


#: The columns: the head, the attribute of `Row`, and how it is printed.
_COLUMNS = (
    ("contestant", "name", ""),
    ("preload", "preload", ""),
    ("ballast MiB", "ballast", ""),
    ("live", "live", ""),
    ("p50 ms", "p50", ".2f"),
    ("p95 ms", "p95", ".2f"),
    ("max ms", "max", ".2f"),
    ("answered ms", "answered", ".2f"),
    ("per second", "throughput", ".0f"),
    ("x os.fork", "ratio", ".2f"),
    ("private MiB", "private", ".2f"),
    ("kill ms", "kill", ".1f"),
)


def _print(table: Table, about: Mapping[str, Any], *, markdown: bool) -> None:
    lines = [[head for head, _, _ in _COLUMNS]]
    for row in table.rows:
        values = [(getattr(row, name), style) for _, name, style in _COLUMNS]
        lines.append(["-" if value is None else format(value, style) for value, style in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for index, line in enumerate(lines):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
        if index == 0 and markdown:
            rules = ["-" * (width + 1) + ("-" if column < 2 else ":") for column, width in enumerate(widths)]
            print(f"|{'|'.join(rules)}|")
    for what, notes in (("skipped", table.skipped), ("failed", table.failed)):
        for note in notes:
            print(f"\n{what}: {note}" if note is notes[0] else f"{what}: {note}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
