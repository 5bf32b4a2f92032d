"""What happens is told: as events in the ring, as lines, to `logging`, and as a timeline."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import blocked, importable, no_descriptor_left, ready, until
from tractor_host import _native

LADDERS = {
    "subint": ["cancel", "interrupt", "unwind", "unblock", "destroy"],
    "fork": ["cancel", "interrupt", "sigterm", "sigkill"],
    "forkserver": ["cancel", "interrupt", "sigterm", "sigkill"],
    "exec": ["cancel", "interrupt", "sigterm", "sigkill"],
    "subint_forkserver": ["cancel", "interrupt", "unwind", "unblock", "sigkill"],
}
SIGNALS = {"interrupt": signal.SIGINT, "sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}


def of(worker: th.Worker) -> list[th.Event]:
    """All that was told of a worker, to its end."""
    told = [event for event in th.events() if event.worker == worker.id]
    assert all((event.name, event.backend) == (worker.name, worker.backend) for event in told)
    assert all(event.pid == worker.pid for event in told)
    assert [event.monotonic for event in told] == sorted(event.monotonic for event in told)
    return told


def kinds(told: list[th.Event]) -> list[str]:
    return [event.kind for event in told]


# -- what is told ----------------------------------------------------------------------------------------


def test_a_life_is_told_in_order(backend: str) -> None:
    worker = th.spawn("math:factorial", 5, backend=backend, name="fact")
    assert worker.result(timeout=PATIENCE) == 120
    told = of(worker)
    assert kinds(told) == ["spawn", "started", "told", "reap", "exit"]
    spawned, started, outcome, reaped, ended = told
    assert spawned.fields["target"] == "math:factorial"
    assert 0 <= spawned.fields["age"] <= started.fields["age"] <= ended.fields["lifetime"]
    assert outcome.fields == {"outcome": "returned"}
    assert reaped.fields == ({} if worker.pid is None else {"code": 0})
    assert ended.fields["exit"] == "returned"
    assert ended.fields["cause"] == "returned"
    assert [event.level for event in told] == [20, 10, 10, 10, 20]
    assert {event.logger for event in told} == {"tractor_host.worker"}
    assert f"worker `fact` ({backend}" in ended.text


def test_how_a_target_raised_is_told(backend: str) -> None:
    worker = th.spawn("math:factorial", -1, backend=backend)
    worker.wait(timeout=PATIENCE)
    told = {event.kind: event.fields for event in of(worker)}
    assert told["told"] == {"outcome": "raised"}
    assert told["exit"]["exit"] == "raised"
    assert "ValueError" in told["exit"]["cause"]


def test_every_rung_and_signal_is_told(backend: str) -> None:
    budgets = {"cancel": 0.05, "interrupt": 0.05} | dict.fromkeys(LADDERS[backend][2:], 5.0)
    worker = ready(th.spawn(targets.spin_and_swallow, backend=backend, ladder=budgets, stdio="pipe"))
    found = worker.kill()
    told = of(worker)
    first = kinds(told).index("kill")
    assert kinds(told[:first]) == ["spawn", "started"]
    assert told[first].fields == {"reason": "killed"}
    climbed = [event for event in told if event.kind == "rung"]
    rungs = [event.fields["rung"] for event in climbed]
    assert rungs == LADDERS[backend][: len(rungs)]
    assert found.rung in rungs
    assert all(0 < event.fields["budget"] <= budgets[event.fields["rung"]] for event in climbed)
    # The signal of a rung follows it.
    for rung, after in pairwise(told):
        if (
            rung.kind == "rung"
            and backend in ("fork", "forkserver", "exec")
            and rung.fields["rung"] != "cancel"
        ):
            assert (after.kind, after.fields) == ("signal", {"signal": SIGNALS[rung.fields["rung"]]})
    ended = told[-1]
    assert kinds(told[-2:]) == ["reap", "exit"]
    assert (ended.fields["exit"], ended.fields["rung"]) == ("killed", found.rung)
    assert ended.fields["elapsed"] == found.elapsed
    assert {event.logger for event in told if event.kind in ("kill", "rung", "signal")} == {
        "tractor_host.ladder"
    }


def test_a_cancellation_is_told(backend: str) -> None:
    worker = th.spawn("asyncio:sleep", 1000, backend=backend)
    until(lambda: worker.state == "running", "the target")
    worker.cancel()
    assert worker.wait(timeout=PATIENCE).kind == "cancelled"
    assert kinds(of(worker)) == ["spawn", "started", "cancel", "told", "reap", "exit"]


def test_a_crash_is_told(process_backend: str) -> None:
    worker = th.spawn(targets.kill_itself, int(signal.SIGKILL), backend=process_backend)
    worker.wait(timeout=PATIENCE)
    told = of(worker)
    assert kinds(told)[-2:] == ["reap", "exit"]
    assert "told" not in kinds(told)
    assert told[-2].fields == {"signal": signal.SIGKILL}
    assert (told[-1].fields["exit"], told[-1].fields["signal"]) == ("signalled", signal.SIGKILL)


def test_a_refusal_is_told(backend: str) -> None:
    last = _native.events_last()
    with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
        while True:  # a blank may be there, and a subinterpreter needs none
            th.spawn(targets.nothing, backend=backend, stdio="pipe").wait(timeout=PATIENCE)
    told = th.events(last)[-1]
    assert (told.kind, told.backend, told.level) == ("refusal", backend, logging.INFO)
    assert told.fields["target"] == "targets:nothing"
    assert "Too many open files" in told.text


def test_the_fork_server_is_told_of() -> None:
    th.spawn("os:getpid", backend="forkserver").result(timeout=PATIENCE)
    first = _native.fork_server()
    assert first is not None
    last = _native.events_last()
    os.kill(first, signal.SIGKILL)
    until(lambda: " Z " in Path(f"/proc/{first}/stat").read_text(), "its end")
    th.spawn("os:getpid", backend="forkserver").result(timeout=PATIENCE)
    told = [event for event in th.events(last) if event.logger == "tractor_host.zygote"]
    assert kinds(told) == ["zygote_lost", "zygote_end", "zygote_start", "zygote_ready"]
    assert [event.pid for event in told] == [first, first, *[_native.fork_server()] * 2]
    assert told[0].level == logging.WARNING
    assert told[3].fields == {"not_imported": 0}


RECLAIM = """
    import helpers
    import tractor_host as th

    worker = helpers.stuck_for_a_while(gil="own")
    worker.kill()
    helpers.until(lambda: th.statistics().reclaimed, "the end of an abandoned worker")
    for event in th.events():
        if event.worker == worker.id:
            print(event.kind, event.level, event.fields.get("rung"), event.fields.get("exit"))
"""


def test_what_could_not_be_ended_is_told_and_what_became_of_it(program: Callable[..., Program]) -> None:
    ran = program(RECLAIM).run(env=importable())
    told = [line.split() for line in ran.stdout.splitlines()]
    assert [words[0] for words in told if words[0] != "rung"] == [
        "spawn", "started", "kill", "quarantine", "exit", "reap", "reclaim",
    ]  # fmt: skip
    assert ["quarantine", "30", "None", "None"] in told
    assert ["exit", "20", "abandoned", "abandoned"] in told
    assert ["reclaim", "30", "None", "None"] in told
    lines = ran.stderr.splitlines()
    assert "could not be ended" in lines[-2]
    assert "has ended after all" in lines[-1]


def test_what_workers_run_is_told_here_too() -> None:
    last = _native.events_last()
    worker = th.spawn(targets.spawn_again, ["subint"], backend="fork", name="outer")
    worker.result(timeout=PATIENCE)
    told = [event for event in th.events(last) if event.fields.get("parent") == worker.id]
    assert kinds(told) == ["spawn"]
    (spawned,) = told
    inner = [event for event in th.events(last) if event.worker == spawned.worker]
    assert kinds(inner) == ["spawn", "started", "exit"]
    assert {event.backend for event in inner} == {"subint"}
    # Its end is told before that of the worker that runs it.
    assert inner[-1].number < of(worker)[-1].number


def test_those_who_share_a_process_are_told_of() -> None:
    last = _native.events_last()
    workers = [th.spawn("os:getpid", backend="subint_forkserver", process="shared") for _ in range(2)]
    assert len({worker.result(timeout=PATIENCE) for worker in workers}) == 1
    for worker in workers:
        assert kinds(of(worker)) == ["spawn", "started", "exit"]
        assert of(worker)[0].fields["process"] == "shared"
    house = [event for event in th.events(last) if event.name == "shared"]
    assert {event.pid for event in house} == {workers[0].pid}
    assert kinds(house)[0] == "spawn"
    assert kinds(house)[-1] == "exit"


# -- the ring --------------------------------------------------------------------------------------------


def refuse(count: int) -> None:
    for _ in range(count):
        with pytest.raises(FileNotFoundError):
            th.spawn("os:getpid", backend="exec", cwd="/nonexistent")


def test_the_ring_keeps_the_newest() -> None:
    last = _native.events_last()
    threads = [threading.Thread(target=refuse, args=(300,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _native.events_last() == last + 1200
    kept = th.events()
    # Which of them is told first is up to the scheduler; none is twice, or of an earlier round.
    assert [event.number for event in kept] == list(range(last + 1200 - 1023, last + 1201))
    assert set(kinds(kept)) == {"refusal"}
    assert th.events(last + 1200) == []
    assert kinds(th.events(last + 1198)) == ["refusal"] * 2


def test_a_forked_copy_of_the_host_tells_nothing_of_it(program: Callable[..., Program]) -> None:
    ran = program(
        """
        import os, sys
        import tractor_host as th

        if __name__ == "__main__":
            th.spawn("os:getpid").result(timeout=30)
            assert th.events()
            print(th.spawn("__main__:look", backend="fork").result(timeout=30))
            sys.stdout.flush()
            if os.fork() == 0:
                print(th.events(), flush=True)
                os._exit(0)
            os.wait()
        """.replace("if __name__", "def look():\n            return th.events()\n\n        if __name__")
    ).run("-W", "ignore")
    assert ran.stdout == "[]\n[]\n", ran.stderr


# -- logging ---------------------------------------------------------------------------------------------


class Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.gate = threading.Event()
        self.gate.set()

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.wait(PATIENCE)
        self.records.append(record)


@contextmanager
def kept(level: int) -> Iterator[Keeper]:
    logger, keeper = logging.getLogger("tractor_host"), Keeper()
    before, propagate = logger.level, logger.propagate
    logger.addHandler(keeper)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield keeper
    finally:
        logger.removeHandler(keeper)
        logger.setLevel(before)
        logger.propagate = propagate


def test_logging_gets_them_with_levels_and_fields(backend: str) -> None:
    with kept(logging.DEBUG) as keeper, th.log_to_logging() as bridge:
        assert th.log_to_logging() is bridge
        worker = th.spawn("math:factorial", 5, backend=backend)
        worker.result(timeout=PATIENCE)
    records = [record for record in keeper.records if record.worker == worker.id]  # type: ignore[attr-defined]
    told = of(worker)
    assert [record.event for record in records] == told  # type: ignore[attr-defined]
    for record, event in zip(records, told, strict=True):
        assert (record.name, record.levelno, record.getMessage()) == (event.logger, event.level, event.text)
        assert record.created == event.time
        assert (record.kind, record.fields) == (event.kind, event.fields)  # type: ignore[attr-defined]
        assert (record.worker_name, record.backend) == (worker.name, backend)  # type: ignore[attr-defined]
        assert record.worker_pid == worker.pid  # type: ignore[attr-defined]
    # Closed: nothing more comes.
    count = len(keeper.records)
    th.spawn("os:getpid", backend=backend).result(timeout=PATIENCE)
    assert len(keeper.records) == count


def test_a_level_leaves_out_what_is_below_it() -> None:
    with kept(logging.INFO) as keeper, th.log_to_logging():
        th.spawn("os:getpid").result(timeout=PATIENCE)
    assert {record.levelno for record in keeper.records} == {logging.INFO}


def test_a_handler_that_hangs_keeps_nobody_waiting() -> None:
    with kept(logging.DEBUG) as keeper, th.log_to_logging():
        keeper.gate.clear()
        workers = [th.spawn("os:getpid", backend=backend) for backend in ("subint", "fork", "forkserver")]
        for worker in workers:
            worker.result(timeout=PATIENCE)
        stuck = th.spawn(targets.sleep, backend="subint", cancel_timeout=0)
        assert stuck.kill().kind == "killed"
        assert keeper.records == []
        keeper.gate.set()
    ended = {record.worker for record in keeper.records if record.kind == "exit"}  # type: ignore[attr-defined]
    assert ended == {worker.id for worker in (*workers, stuck)}


def test_what_it_was_too_late_for_is_counted() -> None:
    with kept(logging.INFO) as keeper, th.log_to_logging():
        keeper.gate.clear()
        refuse(1)
        refuse(1500)
        keeper.gate.set()
    lost = [record for record in keeper.records if "not passed on" in record.getMessage()]
    assert sum(int(record.args[0]) for record in lost) + len(keeper.records) - len(lost) == 1501  # type: ignore[index, misc, arg-type]
    assert lost
    assert {record.levelno for record in lost} == {logging.WARNING}


AT_EXIT = """
    import logging, sys
    import tractor_host as th

    if __name__ == "__main__":
        logging.basicConfig(level="INFO", stream=sys.stdout, format="%(levelname)s %(name)s %(kind)s")
        if sys.argv[1] == "before":
            th.log_to_logging()
        worker = th.spawn("time:sleep", 1000, backend="fork", cancel_timeout=0)
        while worker.state != "running":
            pass
        if sys.argv[1] == "after":
            th.log_to_logging()
"""


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_end_of_the_program_is_logged_too(
    when: str, launcher: str, program: Callable[..., Program]
) -> None:
    ran = program(AT_EXIT, launcher=launcher).run(when)
    lines = ran.stdout.splitlines()
    assert ("INFO tractor_host.worker spawn" in lines) == (when == "before")
    assert lines[-3:] == [
        "INFO tractor_host.ladder kill", "INFO tractor_host.ladder rung", "INFO tractor_host.worker exit",
    ]  # fmt: skip


WARNS = """
    import logging, sys
    import tractor_host as th
    import os, signal

    if __name__ == "__main__":
        if sys.argv[1:] == ["logging"]:
            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            th.log_to_logging()
        th.spawn("os:getpid").result(timeout=30)
        from tractor_host import _native
        os.kill(_native.fork_server(), signal.SIGKILL)
        th.spawn("os:getpid").result(timeout=30)
        th.spawn("os:getpid").result(timeout=30)
"""
LOST = re.compile(r"the fork server (has died; a new one is started|was lost and is started again: .*)\n")


def test_warnings_come_once(program: Callable[..., Program]) -> None:
    ran = program(WARNS).run()
    assert LOST.fullmatch(ran.stderr.removeprefix("tractor-host: "))
    ran = program(WARNS).run("logging")
    assert LOST.fullmatch(ran.stdout)
    assert ran.stderr == ""
    ran = program(WARNS).run("logging", env={**os.environ, "TRACTOR_HOST_LOG": "warn"})
    assert LOST.fullmatch(ran.stdout)
    assert LOST.search(ran.stderr)


# -- lines -----------------------------------------------------------------------------------------------

LINES = """
    import os, sys
    import tractor_host as th

    def inner():
        return th.spawn("os:getpid", backend="subint", name="inner").result(timeout=30)

    if __name__ == "__main__":
        for backend in sys.argv[1:] or ["fork"]:
            th.spawn(inner, backend=backend, name="outer").result(timeout=30)
        print("good")
"""
LINE = re.compile(
    r"tractor-host: \d\d:\d\d:\d\d\.\d{6}Z (ERROR|WARN|INFO|DEBUG) +\[(\d+)\] (tractor_host\.\w+): (\w+).*"
)


def lines(text: str) -> list[tuple[str, str, str, str]]:
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [match.groups() for match in found if match]  # type: ignore[misc]


@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
def test_a_filter_sends_lines_to_stderr(launcher: str, program: Callable[..., Program]) -> None:
    def run(text: str) -> list[tuple[str, str, str, str]]:
        ran = program(LINES, launcher=launcher).run(env={**os.environ, "TRACTOR_HOST_LOG": text})
        assert (ran.returncode, ran.stdout) == (0, "good\n"), ran.stderr
        return lines(ran.stderr)

    assert {(level, kind) for level, _, _, kind in run("info")} == {("INFO", "spawn"), ("INFO", "exit")}
    told = run("debug")
    # The worker's own supervisor says what it runs, and so does the program's.
    assert len({pid for _, pid, _, _ in told}) == 2
    counts = Counter(kind for _, _, _, kind in told)
    assert counts["started"] == 3
    assert run("tractor_host.ladder=debug,warn") == []
    assert run("off") == []


def test_a_file_takes_the_lines_of_all_processes(
    backend: str, program: Callable[..., Program], tmp_path: Path
) -> None:
    env = {**os.environ, "TRACTOR_HOST_LOG": "debug", "TRACTOR_HOST_LOG_FILE": "the.log"}
    for _ in range(2):
        ran = program(LINES).run(backend, env=env, cwd=tmp_path)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "good\n", "")
    told = lines((tmp_path / "the.log").read_text())
    # It is appended to. What runs in a worker is told of there and here.
    assert Counter(kind for _, _, _, kind in told)["started"] == 2 * (2 if backend == "subint" else 3)


@pytest.mark.parametrize("wrong", ["loud", "tractor_host=loud", "tractor_hots=info"])
def test_a_filter_that_is_none_is_refused(wrong: str, program: Callable[..., Program]) -> None:
    ran = program(LINES).run(env={**os.environ, "TRACTOR_HOST_LOG": wrong})
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f'ValueError: TRACTOR_HOST_LOG="{wrong}": ')
    assert "off, error, warn, info, debug, trace" in last


def test_a_file_that_cannot_be_written_is_refused(program: Callable[..., Program]) -> None:
    for name in ("TRACTOR_HOST_LOG_FILE", "TRACTOR_HOST_TRACE"):
        ran = program(LINES).run(env={**os.environ, name: "/nonexistent/file"})
        assert ran.returncode == 1
        assert re.match(r"FileNotFoundError: .*`/nonexistent/file`", ran.stderr.splitlines()[-1])


LOAD = """
    import sys, threading
    import tractor_host as th

    def inner():
        return th.spawn("os:getpid", backend="subint").result(timeout=60)

    def spawn(backend):
        for _ in range(6):
            th.spawn(inner, backend=backend).result(timeout=60)

    if __name__ == "__main__":
        threads = [threading.Thread(target=spawn, args=(backend,)) for backend in ["fork"] * 3 + ["forkserver"]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert th.statistics().returned == 24, th.statistics()
        print("good")
"""


@pytest.mark.parametrize("where", ["stderr", "file"])
def test_forks_in_the_middle_of_events_hang_nobody(
    where: str, program: Callable[..., Program], tmp_path: Path
) -> None:
    """Children begin with whatever state other threads had the log, the ring and the timeline in."""
    env = {**os.environ, "TRACTOR_HOST_LOG": "trace", "TRACTOR_HOST_TRACE": str(tmp_path / "trace.json")}
    if where == "file":
        env["TRACTOR_HOST_LOG_FILE"] = str(tmp_path / "log")
    ran = program(LOAD).run(env=env, timeout=100)
    assert (ran.returncode, ran.stdout) == (0, "good\n"), ran.stderr[-5000:]
    told = lines(ran.stderr if where == "stderr" else (tmp_path / "log").read_text())
    assert Counter(kind for *_, kind in told)["exit"] == 24 * 3
    timeline(tmp_path / "trace.json")


# -- the timeline ----------------------------------------------------------------------------------------

Slice = tuple[str, float, float, int]


def timeline(path: Path, *, ended: bool = True) -> dict[str, list[Slice]]:
    """The slices of each track in their order, with their depths; that they nest is checked."""
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    names = {
        (entry["pid"], entry["tid"]): entry["args"]["name"]
        for entry in entries
        if (entry["ph"], entry["name"]) == ("M", "thread_name")
    }
    # Workers of several processes may have the same name.
    again = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {at: f"{name} #{at[1]}" if name in again else name for at, name in names.items()}
    found: dict[str, list[Slice]] = {name: [] for name in names.values()}
    stacks: dict[str, list[int]] = {name: [] for name in names.values()}
    for entry in entries:
        assert entry["ph"] in "MBEXi"
        if entry["ph"] == "M":
            continue
        track = names[entry["pid"], entry["tid"]]
        slices, stack = found[track], stacks[track]
        if entry["ph"] == "B":
            if stack:
                assert entry["ts"] >= slices[stack[-1]][1]
            stack.append(len(slices))
            slices.append((entry["name"], entry["ts"], float("inf"), len(stack) - 1))
        elif entry["ph"] == "E":
            name, since, _, depth = slices[stack[-1]]
            assert name == entry["name"]
            assert entry["ts"] >= since
            slices[stack.pop()] = (name, since, entry["ts"], depth)
        elif entry["ph"] == "X":
            slices.append((entry["name"], entry["ts"], entry["ts"] + entry["dur"], len(stack)))
    assert not ended or not any(stacks.values())
    return found


def names_at(slices: list[Slice], depth: int) -> list[str]:
    return [name for name, _, _, at in slices if at == depth]


TRACED = """
    import os, signal, sys, time
    import tractor_host as th
    from tractor_host import testing

    def stuck():
        while True:
            try:
                print("ready", flush=True)
                while True:
                    pass
            except BaseException:
                pass

    def main(backend, how):
        th.spawn(time.sleep, 0.1, backend=backend, name="good").result(timeout=30)
        limits = {"cancel_timeout": 0.05, "kill_timeout": 2}
        worker = th.spawn(stuck, backend=backend, name="stuck", stdio="pipe", **limits)
        testing.wait_ready(worker)
        if how == "kill":
            worker.kill()
        elif how == "worker":
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait(timeout=30)
        else:
            print("ready", flush=True)
            worker.wait()

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


def check_good(slices: list[Slice]) -> None:
    assert names_at(slices, 0) == ["good"]
    assert names_at(slices, 1) == ["booting", "running", "ending"]
    # They follow each other, and fill the whole.
    whole, *parts = slices
    assert [since for _, since, _, _ in parts] == [whole[1], parts[0][2], parts[1][2]]
    assert parts[-1][2] == whole[2]
    assert whole[2] - whole[1] >= 0.1e6


def track_of(found: dict[str, list[Slice]], name: str) -> list[Slice]:
    (track,) = (track for track in found if track.partition(" ")[0] == name)
    return found[track]


def test_the_timeline_of_a_run(
    backend: str, launcher: Path, program: Callable[..., Program], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    made = program(TRACED)
    made.command = [str(launcher), "trace", str(path), str(made.path)]
    ran = made.run(backend, "kill")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = timeline(path)
    check_good(track_of(found, "good"))
    stuck = track_of(found, "stuck")
    assert names_at(stuck, 1) == ["booting", "running", "killing"]
    rungs = names_at(stuck, 2)
    assert rungs == LADDERS[backend][: len(rungs)]
    assert len(rungs) > 1
    program_slices = found["main thread"]
    assert names_at(program_slices, 0) == ["program"]
    (waited,) = (slice for slice in program_slices if slice[0] == "wait good")
    assert waited[2] > waited[1]
    assert "spawn good" in names_at(program_slices, 1)
    whole = program_slices[0]
    assert all(
        whole[1] <= since <= until <= whole[2] for slices in found.values() for _, since, until, _ in slices
    )
    if "forkserver" in backend:
        assert names_at(found["fork server"], 1) == ["starting", "ready"]


def test_the_variable_does_in_any_python(program: Callable[..., Program], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    ran = program(TRACED).run("fork", "kill", env={**os.environ, "TRACTOR_HOST_TRACE": str(path)})
    assert (ran.returncode, ran.stderr) == (0, "")
    check_good(track_of(timeline(path), "good"))


def test_a_program_that_spawns_nothing_has_a_timeline(
    launcher: Path, tmp_path: Path, program: Callable[..., Program]
) -> None:
    path = tmp_path / "trace.json"
    made = program("import sys; sys.exit(3)")
    made.command = [str(launcher), "run", "--trace", str(path), str(made.path)]
    assert made.run().returncode == 3
    assert names_at(timeline(path)["main thread"], 0) == ["program"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("launcher", ["python", "tractor-host"])
def test_the_timeline_is_whole_however_the_program_ends(
    number: signal.Signals, launcher: str, program: Callable[..., Program], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    env = {**os.environ, "TRACTOR_HOST_TRACE": str(path)}
    with program(TRACED, launcher=launcher).start("exec", "wait", env=env) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"

        # Written as it happens.
        def running() -> bool:
            found = timeline(path, ended=False)
            tracks = [slices for name, slices in found.items() if name.startswith("stuck")]
            return any("running" in names_at(slices, 1) for slices in tracks)

        until(running, "the slice")
        check_good(track_of(timeline(path, ended=False), "good"))
        blocked(Path(f"/proc/{process.pid}/task/{process.pid}"))
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    found = timeline(path, ended=number == signal.SIGINT)
    check_good(track_of(found, "good"))
    stuck = track_of(found, "stuck")
    if number == signal.SIGINT:
        assert names_at(stuck, 1) == ["booting", "running", "killing"]
        assert "wait stuck" in names_at(found["main thread"], 1)
    else:
        assert stuck[-1][2] == float("inf")


def test_the_timeline_of_a_worker_that_somebody_kills(
    process_backend: str, program: Callable[..., Program], tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    ran = program(TRACED).run(process_backend, "worker", env={**os.environ, "TRACTOR_HOST_TRACE": str(path)})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert names_at(track_of(timeline(path), "stuck"), 1) == ["booting", "running"]


def test_a_program_does_not_write_into_another_one_s_timeline(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    inner = program(TRACED, name="inner.py")
    path = tmp_path / "trace.json"
    ran = program(
        f"""
        import subprocess, sys
        import tractor_host as th

        if __name__ == "__main__":
            th.spawn("os:getpid", name="outer").result(timeout=30)
            ran = subprocess.run([sys.executable, {str(inner.path)!r}, "fork", "kill"], stderr=subprocess.PIPE)
            assert ran.returncode == 0
            print(ran.stderr.decode(), end="")
            th.spawn("os:getpid", name="later").result(timeout=30)
        """
    ).run(env={**os.environ, "TRACTOR_HOST_TRACE": str(path)})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(r"tractor-host: the timeline `.*` is another process's: .*\n", ran.stdout)
    found = timeline(path)
    assert track_of(found, "outer")
    assert track_of(found, "later")
    assert not any(track.startswith("stuck") for track in found)
