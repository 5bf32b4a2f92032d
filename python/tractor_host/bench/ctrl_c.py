"""What one Ctrl-C does in each situation, under the launcher and under plain Python: `bench ctrl-c`.

Each program is pressed once by SIGINT when it is where it is to be. Those that can heed it note when
KeyboardInterrupt rose; the others are waited for until their bound. Where plain Python does not end within
the limit it is killed, and the table says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

#: What every program begins with; `ready` is its last word before the situation.
_HEAD = "import atexit, sys, time\ndef ready(): print('ready', flush=True)\n"
_BUSY = "th.spawn(th.Source('while True: pass'), backend='subint')"

#: The situations that Python can heed a Ctrl-C in, and those in which it can't.
SITUATIONS = {
    "sleep": "ready(); time.sleep(1000)",
    "busy loop": "ready()\nwhile True: pass",
    "lock": "import threading\nlock = threading.Lock(); lock.acquire(); ready(); lock.acquire()",
    "join": (
        "import threading\nthread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)\n"
        "thread.start(); ready(); thread.join()"
    ),
    "trio": "import trio\nasync def main(): ready(); await trio.sleep_forever()\ntrio.run(main)",
    "asyncio": "import asyncio\nasync def main(): ready(); await asyncio.sleep(1000)\nasyncio.run(main())",
    "25 busy subinterpreters": (
        f"import tractor_host as th\nfor _ in range(25): {_BUSY}\nready(); time.sleep(1000)"
    ),
    "SIGINT blocked by the main thread": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); ready(); time.sleep(1000)"
    ),
    "C code that holds the GIL": "ready(); sum(range(10**12))",
    "C code without the GIL": "import hashlib\nready(); hashlib.pbkdf2_hmac('sha256', b'x', b'', 2**31 - 1)",
    "a worker holds the shared GIL": (
        "import tractor_host as th\n"
        "th.spawn(th.Source(\"print('ready', flush=True); sum(range(10**12))\"), backend='subint')\n"
        "time.sleep(1000)"
    ),
    "C code at exit": "atexit.register(lambda: (ready(), sum(range(10**12))))",
}
#: Seconds that a program is given.
_LIMIT = 8.0
#: Seconds that one which has said `ready` needs at most to be there.
_TO_SETTLE = 0.3


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One situation under one Python.

    Attributes:
        situation: Which.
        python: `"tractor-host"` or `"python"`.
        reaction: Milliseconds from the signal to KeyboardInterrupt, median; `None` if that never rose.
        end: Seconds from the signal to the end, the worst; `None` where it had to be killed.
        code: The exit status, as `subprocess` has it.
    """

    situation: str
    python: str
    reaction: float | None
    end: float | None
    code: int | None


def press(command: list[str], situation: str) -> tuple[float | None, float | None, int | None]:
    """Runs one program and presses Ctrl-C once; reaction in ms, end in s, exit status."""
    body = "\n".join("    " + line for line in SITUATIONS[situation].splitlines())
    source = (
        f"{_HEAD}try:\n{body}\nexcept KeyboardInterrupt:\n"
        "    print('heeded', time.monotonic(), flush=True)\n    raise\n"
    )
    with subprocess.Popen(
        [*command, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            # Where it is cannot be seen from outside in every situation; too early would only be easier.
            time.sleep(_TO_SETTLE)
            pressed = time.monotonic()
            process.send_signal(signal.SIGINT)
            try:
                code: int | None = process.wait(_LIMIT)
                end: float | None = time.monotonic() - pressed
            except subprocess.TimeoutExpired:
                code = end = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        heeded = process.stdout.read().split()
        reaction = (float(heeded[1]) - pressed) * 1e3 if heeded[:1] == ["heeded"] else None
    return reaction, end, code


def measure(situation: str, n: int) -> list[Row]:
    """Presses a program in one situation `n` times under either Python, in turns."""
    launcher = str(Path(sys.executable).with_name("tractor-host"))
    commands = {"tractor-host": [launcher, "run"], "python": [sys.executable]}
    seen: dict[str, list[tuple[float | None, float | None, int | None]]] = {name: [] for name in commands}
    for _ in range(n):
        for name, command in commands.items():
            seen[name].append(press(command, situation))
    rows = []
    for name, runs in seen.items():
        reactions = [reaction for reaction, _, _ in runs if reaction is not None]
        ends = [end for _, end, _ in runs]
        rows.append(
            Row(
                situation,
                name,
                statistics.median(reactions) if reactions else None,
                None if None in ends else max(end for end in ends if end is not None),
                runs[-1][2],
            )
        )
    return rows


def main(arguments: list[str]) -> int:
    """The command; returns its exit code: 1 where the launcher did not end a program."""
    parser = argparse.ArgumentParser(prog="tractor-host bench ctrl-c", description=__doc__)
    parser.add_argument(
        "--situation", action="append", choices=SITUATIONS, help="this one (repeatable; default: all)"
    )
    parser.add_argument("-n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error("-n must be at least 1")
    if not options.json:
        print(f"{'situation':36} {'under':13} {'reaction':>11} {'end (worst)':>12} {'status':>7}")
    failed = False
    for situation in options.situation or SITUATIONS:
        for row in measure(situation, options.n):
            failed |= row.python == "tractor-host" and row.end is None
            if options.json:
                print(json.dumps(dataclasses.asdict(row)), flush=True)
                continue
            reaction = "-" if row.reaction is None else f"{row.reaction:.2f} ms"
            end = f"over {_LIMIT:.0f} s" if row.end is None else f"{row.end:.3f} s"
            code = "-" if row.code is None else str(row.code)
            print(f"{row.situation:36} {row.python:13} {reaction:>11} {end:>12} {code:>7}", flush=True)
    return int(failed)
