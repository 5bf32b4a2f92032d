"""Where a worker's output goes, what it reads, and that nobody has to read what it writes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE, Program
from helpers import importable, ready, until

OUT = "out by print\nno newline at the end"
ERR = "err by print\n"


def test_inherited_output_goes_where_the_host_s_goes(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    th.spawn(targets.write_everywhere, backend=backend).result(timeout=PATIENCE)
    assert capfd.readouterr() == (OUT, ERR)


def test_output_is_inherited_by_default_and_by_name(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    th.spawn(targets.print_line, "one", backend=backend).result(timeout=PATIENCE)
    th.spawn(targets.print_line, "two", backend=backend, stdio="inherit").result(timeout=PATIENCE)
    assert capfd.readouterr().out == "one\ntwo\n"


def test_null_output_goes_nowhere(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    worker = th.spawn(targets.write_everywhere, backend=backend, stdio="null")
    worker.result(timeout=PATIENCE)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match='not collected; use stdio="pipe"'):
        _ = worker.stdout


def test_piped_output_is_collected(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    worker = th.spawn(targets.write_everywhere, backend=backend, stdio="pipe")
    worker.result(timeout=PATIENCE)
    assert (worker.stdout.decode(), worker.stderr.decode()) == (OUT, ERR)
    assert worker.stdout == worker.stdout, "reading it does not use it up"
    assert capfd.readouterr() == ("", "")


def test_output_to_a_file_is_appended_both_streams_to_one(backend: str, tmp_path: Path) -> None:
    log = tmp_path / "größe.log"
    log.write_text("before\n")
    for path in (log, str(log)):
        th.spawn(targets.write_everywhere, backend=backend, stdio=path).result(timeout=PATIENCE)
    text = log.read_text()
    assert text.startswith("before\n")
    assert text.count("err by print\n") == text.count("out by print\n") == 2
    assert text.count("no newline at the end") == 2


def test_a_relative_path_is_the_host_s(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {} if backend == "subint" else {"cwd": "/"}
    th.spawn(targets.print_line, "here", backend=backend, stdio="log", **options).result(timeout=PATIENCE)
    assert (tmp_path / "log").read_text() == "here\n"


def test_piped_output_can_be_read_while_the_worker_runs(backend: str) -> None:
    with th.spawn(targets.spin, backend=backend, stdio="pipe") as worker:
        ready(worker)
        assert (worker.stdout, worker.stderr) == (b"ready\n", b"")
    assert worker.stdout == b"ready\n", "and after its end"


def test_stderr_comes_line_by_line(backend: str) -> None:
    code = th.Source("import sys, time\nprint('a line', file=sys.stderr)\nwhile True: time.sleep(0.01)")
    with th.spawn(code, backend=backend, stdio="pipe") as worker:
        until(lambda: worker.stderr == b"a line\n", "a line that was not flushed")


@pytest.mark.parametrize("stdio", ["pipe", "inherit", "path"])
def test_raw_writes_of_a_process_go_the_same_way(
    process_backend: str, stdio: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    worker = th.spawn(
        targets.write_raw, backend=process_backend, stdio=str(log) if stdio == "path" else stdio
    )
    worker.result(timeout=PATIENCE)
    captured = capfd.readouterr()
    if stdio == "pipe":
        assert (worker.stdout, worker.stderr) == (b"out by fd\n", b"err by fd\n")
    elif stdio == "path":
        assert log.read_text() == "out by fd\nerr by fd\n"
    else:
        assert captured == ("out by fd\n", "err by fd\n")


def test_what_a_process_starts_writes_the_same_way(process_backend: str) -> None:
    code = th.Source("import subprocess; subprocess.run('echo out; echo err >&2', shell=True)")
    worker = th.spawn(code, backend=process_backend, stdio="pipe")
    worker.result(timeout=PATIENCE)
    assert (worker.stdout, worker.stderr) == (b"out\n", b"err\n")


@pytest.mark.parametrize("stdio", ["pipe", "null"])
def test_a_worker_that_writes_much_waits_for_no_reader(backend: str, stdio: str) -> None:
    """Shape 18 of the adversaries."""
    size = 10 << 20
    worker = th.spawn(targets.write_much, size, backend=backend, stdio=stdio)
    assert worker.wait(timeout=PATIENCE).kind == "returned"
    if stdio == "pipe":
        line = b"x" * 1023 + b"\n"
        assert worker.stdout == line * (size // 1024)
        assert worker.stderr == line * (size // 1024)


def test_output_that_is_kept_open_by_a_grandchild_keeps_nobody_waiting(process_backend: str) -> None:
    """cpython#76116; and the grandchild goes with its worker."""
    code = th.Source("import subprocess; subprocess.Popen(['sleep', '1000']); print('done')")
    worker = th.spawn(code, backend=process_backend, stdio="pipe")
    assert worker.wait(timeout=PATIENCE).kind == "returned"
    assert worker.stdout == b"done\n"


@pytest.mark.parametrize("stdio", ["inherit", "null", "pipe"])
def test_stdin_is_at_its_end(process_backend: str, stdio: str) -> None:
    worker = th.spawn(targets.read_stdin, backend=process_backend, stdio=stdio)
    assert worker.result(timeout=PATIENCE) == ("", b"")


def test_stdin_of_a_worker_does_not_take_the_host_s(backend: str, program: Callable[..., Program]) -> None:
    found = program(
        """
        import sys, targets, tractor_host as th
        code = th.Source("import sys; sys.stdin.read() if sys.stdin else ''")
        print(repr(th.spawn(code, backend=sys.argv[1]).result(timeout=10)))
        print(repr(sys.stdin.read()))
        """
    )
    with found.start(backend, stdin=subprocess.PIPE, env=importable()) as process:
        out, err = process.communicate("for the host", timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "''\n'for the host'\n", "")


@pytest.mark.parametrize("gil", ["shared", "own"])
def test_a_subinterpreter_s_output_is_its_own(gil: Any) -> None:
    first = th.spawn(targets.print_line, "first", backend="subint", gil=gil, stdio="pipe")
    second = th.spawn(targets.print_line, "second", backend="subint", gil=gil, stdio="pipe")
    for worker in (first, second):
        worker.result(timeout=PATIENCE)
    assert (first.stdout, second.stdout) == (b"first\n", b"second\n")


@pytest.mark.parametrize(
    "text", ["größe 世界 \U0001f40d", "lone \udc80 surrogate"], ids=["unicode", "surrogate"]
)
def test_any_text_can_be_written(backend: str, text: str) -> None:
    worker = th.spawn(targets.print_line, text, backend=backend, stdio="pipe")
    assert worker.wait(timeout=PATIENCE).kind == "returned"
    assert worker.stdout == text.encode("utf-8", "surrogateescape") + b"\n"


def test_output_that_nobody_can_take_is_the_worker_s_own_trouble(backend: str) -> None:
    worker = th.spawn(targets.print_line, "x", backend=backend, stdio="/dev/full")
    # It hears of it in the target only where PYTHONUNBUFFERED makes it write there and then.
    unbuffered = backend == "exec" and "PYTHONUNBUFFERED" in os.environ
    assert worker.wait(timeout=PATIENCE).kind == ("raised" if unbuffered else "returned")


# -- what the host has buffered ------------------------------------------------------------------------------


def test_what_the_host_has_buffered_is_written_once(backend: str, program: Callable[..., Program]) -> None:
    found = program(
        """
        import sys, targets, tractor_host as th
        log = open(sys.argv[2], "w")
        log.write("in a file of the host\\n")
        print("host")
        sys.stderr.write("host err without newline")
        for _ in range(5):
            th.spawn(targets.nothing, backend=sys.argv[1]).result(timeout=30)
        th.spawn(targets.print_line, "worker", backend=sys.argv[1]).result(timeout=30)
        th.spawn(targets.exit_now if sys.argv[1] != "subint" else targets.nothing, 0, backend=sys.argv[1]).wait()
        """
    )
    log = found.path.with_name("log")
    ended = found.run(backend, str(log), env=importable())
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["host", "worker"]
    assert ended.stderr == "host err without newline"
    assert log.read_text() == "in a file of the host\n"


def test_a_forked_worker_does_not_flush_the_host_s_files(program: Callable[..., Program]) -> None:
    """The numbers that its copies of them have are taken and useless: EBADF."""
    found = program(
        """
        import errno, sys, tractor_host as th
        sys.held = open(sys.argv[1], "w")
        sys.held.write("once\\n")
        code = "import sys\\ntry:\\n    sys.held.close()\\nexcept OSError as error:\\n    args = error.errno\\nargs"
        assert th.spawn(th.Source(code), backend="fork").result(timeout=30) == errno.EBADF
        sys.held.close()
        """
    )
    log = found.path.with_name("log")
    ended = found.run(str(log))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert log.read_text() == "once\n"


# -- a host without stdio ------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1", "1 2", "0 1 2"])
def test_a_host_with_closed_stdio_has_workers_all_the_same(
    backend: str, closed: str, program: Callable[..., Program]
) -> None:
    found = program(
        """
        import os, sys, targets, tractor_host as th
        backend, result = sys.argv[1:]
        values = [th.spawn(targets.add, 1, 2, backend=backend).result(timeout=30)]
        values.append(th.spawn(targets.surroundings, backend=backend).result(timeout=30)["pid"] > 0)
        worker = th.spawn(targets.print_line, "text", backend=backend, stdio="pipe")
        worker.result(timeout=30)
        values.append(worker.stdout.decode())
        open(result, "w").write(repr(values))
        """
    )
    result = found.path.with_name("result")
    shut = " ".join(f"{fd}{'<' if fd == '0' else '>'}&-" for fd in closed.split())
    command = f'exec "$@" {shut}'
    ended = subprocess.run(
        ["sh", "-c", command, "sh", *found.command, backend, str(result)],
        env=importable(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    assert result.read_text() == "[3, True, 'text\\n']"
    assert ended.stderr == ""


def test_what_took_the_number_of_a_closed_stream_is_no_stream(
    process_backend: str, program: Callable[..., Program]
) -> None:
    """Whatever any thread of the host opens at that moment, for itself."""
    found = program(
        """
        import os, sys, targets, tractor_host as th
        backend, result = sys.argv[1:]
        os.close(1)
        assert os.open("/", os.O_RDONLY | os.O_DIRECTORY) == 1
        value = th.spawn(targets.names_in, 1, backend=backend).result(timeout=30)
        open(result, "w").write(repr(value))
        """
    )
    result = found.path.with_name("result")
    command = [*found.command, process_backend, str(result)]
    ended = subprocess.run(command, env=importable(), capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert result.read_text() == "None"


def test_closed_streams_of_a_host_are_taken_and_still_closed_for_new_programs(
    process_backend: str, program: Callable[..., Program]
) -> None:
    found = program(
        """
        import os, sys, targets, tractor_host as th
        backend, result = sys.argv[1:]
        th.spawn(targets.add, 1, 2, backend=backend).result(timeout=30)
        places = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
        inheritable = [os.get_inheritable(fd) for fd in range(3)]
        code = th.Source("import sys\\nstr([sys.stdout, sys.__stdout__, sys.stderr])")
        seen = [th.spawn(code, backend="subint", gil=gil).result(timeout=30) for gil in ("shared", "own")]
        open(result, "w").write(repr((places, inheritable, sys.stdin, sys.stdout, sys.stderr, seen)))
        """
    )
    result = found.path.with_name("result")
    command = [*found.command, process_backend, str(result)]
    shut = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh"]
    ended = subprocess.run([*shut, *command], env=importable(), capture_output=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert result.read_text() == repr(
        (["/dev/null"] * 3, [False] * 3, None, None, None, ["[None, None, None]"] * 2)
    )


def test_a_host_whose_sys_streams_are_replaced(
    backend: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are the host's objects; a worker writes to the fds."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdin", None)
    th.spawn(targets.write_everywhere, backend=backend).result(timeout=PATIENCE)
    monkeypatch.undo()
    assert capfd.readouterr() == (OUT, ERR)


def test_a_terminal_gets_lines_at_once(process_backend: str) -> None:
    """As Python's own: a worker's stdout on a terminal is not held back."""
    leader, follower = os.openpty()
    try:
        code = th.Source("import time\nprint('a line')\nwhile True: time.sleep(0.01)")
        path = os.ttyname(follower)
        with th.spawn(code, backend=process_backend, stdio=path):
            text = b""
            while not text.endswith(b"\n"):  # unbuffered, it comes in two pieces
                text += os.read(leader, 100)
            assert text == b"a line\r\n"
    finally:
        os.close(leader)
        os.close(follower)
