"""Starting workers: every kind of target, runtime, argument and result, on every backend; what a
worker finds around it, what its handle tells, and programs whose target is in `__main__`."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import math
import os
import pickle
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import targets
import tractor_host as th
from conftest import BACKENDS, PATIENCE, Program
from helpers import importable, ready, together, until

MANY = 20 << 20


# -- targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        pytest.param("math:factorial", (20,), math.factorial(20), id="name"),
        pytest.param("os.path:join", ("a", "b"), "a/b", id="dotted name"),
        pytest.param("targets:Adder.Inner.thrice", (2,), 6, id="qualified name"),
        pytest.param(targets.add, (1, 2), 3, id="function"),
        pytest.param(math.sqrt, (16,), 4.0, id="builtin"),
        pytest.param(functools.partial(targets.add, 1), (2,), 3, id="partial"),
        pytest.param(functools.partial(targets.Adder(1).add, 2), (), 3, id="partial of a method"),
        pytest.param(targets.Adder(1).add, (2,), 3, id="bound method"),
        pytest.param(targets.Adder.made, (1,), targets.Adder(1), id="class method"),
        pytest.param(targets.Adder.twice, (2,), 4, id="static method"),
        pytest.param(targets.Adder(1), (2,), 3, id="callable object"),
        pytest.param(targets.Adder, (1,), targets.Adder(1), id="class"),
        pytest.param(dict, ([("a", 1)],), {"a": 1}, id="builtin class"),
        pytest.param("abc".upper, (), "ABC", id="method of a builtin"),
    ],
)
def test_a_target_is_called_and_its_value_comes_back(
    backend: str, target: Any, args: tuple[Any, ...], expected: object
) -> None:
    worker = th.spawn(target, *args, backend=backend)
    assert worker.result(timeout=PATIENCE) == expected
    found = worker.wait()
    assert (found.kind, found.rung, found.signal, found.cause) == ("returned", None, None, "returned")
    assert found.code == (None if backend == "subint" else 0)
    assert found.elapsed is None
    assert 0 < found.lifetime < PATIENCE


def test_positional_and_keyword_arguments_arrive(backend: str) -> None:
    worker = th.spawn(targets.echo, 1, "zwei", backend=backend, kwargs={"three": [3.0], "backend": "mine"})
    assert worker.result(timeout=PATIENCE) == ((1, "zwei"), {"three": [3.0], "backend": "mine"})


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(10**100),
        float("inf"),
        1 + 2j,
        "Grüße, 世界 \0 \U0001f40d",
        pytest.param("lone \udc80 surrogate", id="surrogate"),
        b"\x00\xff",
        bytearray(b"changeable"),
        [1, [2, [3]]],
        {"nested": {("a", 1): {2, 3}}},
        frozenset({1}),
        range(3),
        Path("/some/where"),
        ValueError("as a value"),
        targets.Adder(7),
        Ellipsis,
        targets.add,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_come_back_as_they_went(backend: str, value: object) -> None:
    back = th.spawn(targets.give, value, backend=backend).result(timeout=PATIENCE)
    assert type(back) is type(value)
    assert back == value or (isinstance(value, ValueError) and repr(back) == repr(value))


def test_a_shared_object_is_shared_on_the_other_side(backend: str) -> None:
    item: list[Any] = []
    item.append(item)
    ((first, second), _) = th.spawn(targets.echo, item, item, backend=backend).result(timeout=PATIENCE)
    assert first is second
    assert first[0] is first


def test_big_arguments_arrive(backend: str) -> None:
    assert th.spawn(targets.length, bytes(MANY), backend=backend).result(timeout=PATIENCE) == MANY


def test_big_results_come_back(backend: str) -> None:
    assert th.spawn(targets.zeros, MANY, backend=backend).result(timeout=PATIENCE) == bytes(MANY)


def test_a_result_can_be_asked_for_again(backend: str) -> None:
    worker = th.spawn(targets.give, [1], backend=backend)
    assert worker.result(timeout=PATIENCE) == worker.result() == [1]
    assert worker.wait() == worker.wait(0) == worker.exit


# -- source text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1 + 1", 2),
        ("x = 5\nx * 2", 10),
        ("x = 5", None),
        ("", None),
        ("# only a comment", None),
        ("sum(args) + sum(kwargs.values())", 10),
        ("def f():\n    return args\nf()", (1, 2, 3)),
        ("import targets; targets.add(*args[:2])", 3),
        ("__name__", "__main__"),
        ("[x for x in args if x in args]", [1, 2, 3]),
        ("'größer 世界'", "größer 世界"),
    ],
)
def test_the_value_of_source_is_that_of_its_last_expression(
    backend: str, code: str, expected: object
) -> None:
    worker = th.spawn(th.Source(code), 1, 2, 3, backend=backend, kwargs={"four": 4})
    assert worker.result(timeout=PATIENCE) == expected


def test_an_instance_of_a_class_that_source_made_can_not_come_back(backend: str) -> None:
    worker = th.spawn(th.Source("class Here: pass\nHere()"), backend=backend)
    # It unpickles nowhere else: the message must not just say that the worker "returned".
    with pytest.raises(th.RemoteError, match="unpickle") as caught:
        worker.result(timeout=PATIENCE)
    assert "Here" in str(caught.value.__cause__)


def test_the_file_name_of_source_is_in_its_traceback(backend: str) -> None:
    source = th.Source("def fail():\n    1 / 0\n\nfail()", filename="recipe.txt")
    worker = th.spawn(source, backend=backend)
    with pytest.raises(th.RemoteError) as caught:
        worker.result(timeout=PATIENCE)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert 'File "recipe.txt", line 2, in fail' in caught.value.traceback


def test_a_syntax_error_in_source_is_reported_with_its_place(backend: str) -> None:
    worker = th.spawn(th.Source("x = 1\ny = (", filename="recipe.txt"), backend=backend)
    with pytest.raises(th.RemoteError) as caught:
        worker.result(timeout=PATIENCE)
    cause = caught.value.__cause__
    assert isinstance(cause, SyntaxError)
    assert (cause.filename, cause.lineno) == ("recipe.txt", 2)


# -- async targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["trio", "asyncio"])
@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        pytest.param(targets.add_soon, (1, 2), 3, id="function"),
        pytest.param("targets:add_soon", (1, 2), 3, id="name"),
        pytest.param(functools.partial(targets.add_soon, 1), (2,), 3, id="partial"),
        pytest.param(targets.Adder(1).add_soon, (2,), 3, id="bound method"),
    ],
)
def test_async_targets_run_on_the_runtime_that_is_asked_for(
    backend: str, runtime: Any, target: Any, args: tuple[Any, ...], expected: object
) -> None:
    assert th.spawn(target, *args, backend=backend, runtime=runtime).result(timeout=PATIENCE) == expected


@pytest.mark.parametrize("runtime", ["trio", "asyncio"])
def test_the_runtime_that_is_asked_for_is_the_one_that_runs(backend: str, runtime: Any) -> None:
    worker = th.spawn(targets.which_loop, backend=backend, runtime=runtime)
    assert worker.result(timeout=PATIENCE) == runtime


def test_without_a_runtime_the_caller_s_is_taken(backend: str) -> None:
    async def spawn_here() -> th.Worker:
        return th.spawn(targets.which_loop, backend=backend)

    assert trio.run(spawn_here).result(timeout=PATIENCE) == "trio"
    assert asyncio.run(spawn_here()).result(timeout=PATIENCE) == "asyncio"
    assert th.spawn(targets.which_loop, backend=backend).result(timeout=PATIENCE) == "asyncio"


def test_a_sync_target_spawned_from_a_loop_runs_without_one(backend: str) -> None:
    async def spawn_here() -> th.Worker:
        return th.spawn(targets.add, 1, 2, backend=backend)

    assert trio.run(spawn_here).result(timeout=PATIENCE) == 3


@pytest.mark.parametrize("runtime", ["trio", "asyncio"])
def test_an_exception_of_an_async_target_comes_back(backend: str, runtime: Any) -> None:
    with pytest.raises(th.RemoteError) as caught:
        th.spawn(targets.boom_soon, backend=backend, runtime=runtime).result(timeout=PATIENCE)
    assert repr(caught.value.__cause__) == "ValueError('soon')"


@pytest.mark.parametrize(
    ("target", "runtime", "says"),
    [
        (targets.add, "trio", "is not an async function"),
        (targets.add, "asyncio", "is not an async function"),
        (targets.add_soon, "sync", "is an async function"),
    ],
)
def test_a_runtime_that_does_not_fit_the_target_is_refused(
    backend: str, target: Any, runtime: Any, says: str
) -> None:
    worker = th.spawn(target, 1, 2, backend=backend, runtime=runtime)
    with pytest.raises(
        th.RemoteError, match=f"runtime='{runtime}' does not fit: the target {says}"
    ) as caught:
        worker.result(timeout=PATIENCE)
    assert isinstance(caught.value.__cause__, TypeError)


# -- what a worker finds around it -----------------------------------------------------------------------


def test_a_worker_has_its_parent_s_argv_and_path(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "größe", "lone \udc80"])
    monkeypatch.syspath_prepend(tmp_path)
    found = th.spawn(targets.surroundings, backend=backend).result(timeout=PATIENCE)
    assert found["argv"] == sys.argv
    assert found["path"] == sys.path
    # CPython holds that a subinterpreter has the process's main thread.
    assert found["is_main_thread"] == (backend != "subint")
    assert found["threads"][:1] == ["MainThread"]


def test_a_module_that_only_the_parent_s_path_finds_is_found(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_here_ü.py").write_text("def answer(): return 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert th.spawn("only_here_ü:answer", backend=backend).result(timeout=PATIENCE) == 42


def test_processes_are_processes_and_subinterpreters_are_not(backend: str) -> None:
    worker = th.spawn(targets.surroundings, backend=backend)
    pid = worker.result(timeout=PATIENCE)["pid"]
    if backend == "subint":
        assert worker.pid is None
        assert pid == os.getpid()
    else:
        assert worker.pid == pid != os.getpid()


@pytest.mark.parametrize(
    ("name", "comm"),
    [
        ("short", "th:short"),
        ("longer than fits", "th:longer than fits"[:15]),
        ("grüße", "th:grüße"),
        ("{} %s \\ '\"\n", "th:{} %s \\ '\"\n"),
    ],
)
def test_a_worker_s_name_is_that_of_its_thread(backend: str, name: str, comm: str) -> None:
    worker = th.spawn(targets.surroundings, backend=backend, name=name)
    found = worker.result(timeout=PATIENCE)["comm"]
    assert worker.name == name
    assert found == comm


def test_a_name_is_cut_between_characters_not_within(backend: str) -> None:
    # 14 bytes of ASCII would leave one byte of the two of the umlaut.
    worker = th.spawn(targets.surroundings, backend=backend, name="12345678901ü")
    assert worker.result(timeout=PATIENCE)["comm"] == "th:12345678901"  # and not "th:12345678901\xc3"


def test_a_worker_is_named_after_its_target(backend: str) -> None:
    worker = th.spawn(targets.nothing, backend=backend)
    worker.result(timeout=PATIENCE)
    assert worker.name == f"nothing-{worker.id}"


def test_a_process_gets_the_environment_and_directory_that_it_is_given(
    process_backend: str, tmp_path: Path
) -> None:
    # With a locale, or a fresh Python adds LC_CTYPE by itself (PEP 538).
    env = {"ONLY": "this", "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"], "Ü": "größe \udc80"}
    options: dict[str, Any] = {"backend": process_backend, "env": env, "cwd": tmp_path}
    assert th.spawn(targets.environment, **options).result(timeout=PATIENCE) == env
    assert th.spawn(os.getcwd, **options).result(timeout=PATIENCE) == str(tmp_path)


def test_the_environment_reaches_the_worker_s_own_children(process_backend: str) -> None:
    env = {"ONLY": "this", "PATH": os.environ["PATH"]}
    code = th.Source("import subprocess; subprocess.run(['env'], capture_output=True, text=True).stdout")
    out = th.spawn(code, backend=process_backend, env=env).result(timeout=PATIENCE)
    assert "ONLY=this" in out.splitlines()
    assert "HOME=" not in out


def test_without_a_directory_a_process_starts_in_its_parent_s(
    process_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert th.spawn(os.getcwd, backend=process_backend).result(timeout=PATIENCE) == str(tmp_path)


def test_the_environment_of_the_moment_is_the_default(
    process_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SET_JUST_NOW", "yes")
    found = th.spawn(targets.environment, backend=process_backend).result(timeout=PATIENCE)
    assert found["SET_JUST_NOW"] == "yes"


@pytest.mark.parametrize(
    ("alias", "backend_"), [("trio", "exec"), ("main_thread_forkserver", "fork"), ("subint_fork", "fork")]
)
def test_tractor_s_names_are_taken(alias: str, backend_: str) -> None:
    worker = th.spawn(targets.nothing, backend=alias)
    worker.result(timeout=PATIENCE)
    assert worker.backend == backend_


def test_the_default_backend_is_forkserver_or_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRACTOR_HOST_BACKEND", raising=False)
    with th.spawn(targets.nothing) as worker:
        assert worker.backend == "forkserver"
    monkeypatch.setenv("TRACTOR_HOST_BACKEND", "subint")
    with th.spawn(targets.nothing) as worker:
        assert worker.backend == "subint"
    with th.spawn(targets.nothing, backend="exec") as worker:
        assert worker.backend == "exec"


# -- handles ---------------------------------------------------------------------------------------------


def test_a_handle_tells_state_and_name_and_end(backend: str) -> None:
    with th.spawn(targets.spin, backend=backend, stdio="pipe", name="spinner") as worker:
        ready(worker)
        assert worker.state == "running"
        assert worker.exit is None
        assert worker.target == "targets:spin"
        pid = "" if backend == "subint" else f" pid={worker.pid}"
        assert repr(worker) == f"<Worker {worker.id} 'spinner' {backend}{pid} running>"
    assert worker.state == "ended"
    assert repr(worker) == (
        f"<Worker {worker.id} 'spinner' {backend}{pid} cancelled: killed, stopped when cancelled>"
    )
    assert th.workers() == []


def test_a_handle_is_made_by_spawn_alone() -> None:
    with pytest.raises(TypeError, match=r"made by tractor_host\.spawn"):
        th.Worker()


def test_a_handle_can_be_neither_pickled_nor_copied(backend: str) -> None:
    """A copy would be a handle that nobody has counted."""
    with th.spawn(targets.nothing, backend=backend) as worker:
        for number in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError):
                pickle.dumps(worker, number)
        for make in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                make(worker)
        with pytest.raises(TypeError, match="argument 1 of type Worker cannot be pickled"):
            th.spawn(targets.nothing, worker)


def test_looking_at_the_workers_warns_of_nothing(backend: str) -> None:
    """The handles that `workers` makes are dropped, while the one that spawned it is still held."""
    with th.spawn(targets.spin, backend=backend) as worker:
        for _ in range(3):
            assert [known.id for known in th.workers()] == [worker.id]
            gc.collect()


def test_statistics_count_every_end(backend: str) -> None:
    before = th.statistics()
    with th.spawn(targets.spin, backend=backend, stdio="pipe") as worker:
        ready(worker)
        running = th.statistics()
        assert (running.spawned, running.live) == (before.spawned + 1, 1)
    th.spawn(targets.nothing, backend=backend).result(timeout=PATIENCE)
    th.spawn("nowhere:nothing", backend=backend).wait(timeout=PATIENCE)
    th.spawn(targets.sys_exit, 3, backend=backend).wait(timeout=PATIENCE)
    after = th.statistics()
    changed = {
        name: getattr(after, name) - getattr(before, name)
        for name in th.Statistics.__slots__
        if getattr(after, name) != getattr(before, name)
    }
    assert changed == {"spawned": 4, "cancelled": 1, "returned": 1, "raised": 1, "exited": 1}


def test_leaving_the_block_kills_also_when_it_is_left_by_an_exception(backend: str) -> None:
    with pytest.raises(ZeroDivisionError), th.spawn(targets.spin, backend=backend, stdio="pipe") as worker:
        ready(worker)
        raise ZeroDivisionError
    assert worker.wait(0).kind == "cancelled"


def test_the_end_can_be_polled_for(backend: str) -> None:
    with th.spawn(targets.spin, backend=backend, stdio="pipe") as worker:
        ready(worker)
        assert select.select([worker], [], [], 0) == ([], [], [])
        poll = select.poll()
        poll.register(worker, select.POLLIN)
        assert poll.poll(0) == []
        worker.cancel()
        assert select.select([worker], [], [], PATIENCE) == ([worker], [], [])
        assert poll.poll(0) == [(worker.fileno(), select.POLLIN)]
        assert worker.exit is not None
        # It stays readable, and stays the same.
        assert select.select([worker.fileno()], [], [], 0)[0] == [worker.fileno()]


def test_the_end_can_be_polled_for_afterwards(backend: str) -> None:
    worker = th.spawn(targets.nothing, backend=backend)
    worker.wait(timeout=PATIENCE)
    assert select.select([worker], [], [], 0)[0] == [worker]


def test_the_end_can_be_awaited_in_trio_and_asyncio() -> None:
    async def in_trio() -> Any:
        worker = th.spawn(targets.add, 1, 2)
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(worker)
        return worker.result(0)

    async def in_asyncio() -> Any:
        worker = th.spawn(targets.add, 1, 2)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(worker, ended.set)
        await asyncio.wait_for(ended.wait(), PATIENCE)
        asyncio.get_running_loop().remove_reader(worker)
        return worker.result(0)

    assert trio.run(in_trio) == asyncio.run(in_asyncio()) == 3


def test_many_workers_at_once_get_their_own_results(backend: str) -> None:
    with together() as spawn:
        workers = [spawn(targets.add, number, 0.5, backend=backend) for number in range(30)]
        assert [worker.result(timeout=PATIENCE) for worker in workers] == [n + 0.5 for n in range(30)]


def test_threads_can_spawn_at_the_same_time(backend: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def spawn_one(number: int) -> Any:
        return th.spawn(targets.give, number, backend=backend).result(timeout=PATIENCE)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(spawn_one, range(40))) == list(range(40))


# -- workers of workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", BACKENDS)
def test_a_worker_spawns_workers(backend: str, inner: str) -> None:
    worker = th.spawn(targets.spawn_again, [inner, backend], backend=backend)
    pids = worker.result(timeout=PATIENCE)
    # A subinterpreter is in the process that spawned it, everybody else in one of its own.
    here = os.getpid()
    for kind, pid in zip([backend, inner, backend], pids, strict=True):
        assert (pid == here) == (kind == "subint")
        here = pid


def test_what_a_subinterpreter_left_running_is_ended_with_it(process_backend: str) -> None:
    worker = th.spawn(targets.spawn_and_forget, process_backend, "targets:spin", backend="subint")
    pid = worker.result(timeout=PATIENCE)
    until(lambda: not th.statistics().live, "the end of the worker's worker")
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_process_left_running_is_ended_with_it(process_backend: str, backend: str) -> None:
    worker = th.spawn(targets.spawn_and_forget, backend, "targets:spin", backend=process_backend)
    pid = worker.result(timeout=PATIENCE)
    if pid is not None:
        assert not Path(f"/proc/{pid}").exists()


def test_a_forked_worker_has_nothing_of_its_parent_s_workers() -> None:
    code = """
    import tractor_host as th
    assert th.workers() == []
    assert th.statistics().spawned == 0
    th.spawn("targets:add", 1, 2, backend="subint").result(timeout=30)
    """
    with th.spawn(targets.spin, backend="fork", stdio="pipe") as other:
        ready(other)
        assert th.spawn(th.Source(_dedent(code)), backend="fork").result(timeout=PATIENCE) == 3
        assert other.state == "running"


_inherited: list[th.Worker] = []


def use_inherited_handle() -> list[str]:
    """In a forked worker, with a worker of its own that has the same number as the inherited one."""
    (inherited,) = _inherited
    errors = []
    with together() as spawn:
        # From 1 on, as in the parent.
        mine = [spawn(targets.spin, backend="fork", stdio="pipe") for _ in range(inherited.id)]
        for worker in mine:
            ready(worker)
        for use in ("kill", "cancel", "wait", "result", "fileno"):
            try:
                getattr(inherited, use)(*([0.0] if use in ("wait", "result") else []))
            except RuntimeError as error:
                errors.append(f"{use}: {error}")
        _inherited.clear()
        del inherited
        states = [worker.state for worker in mine]
    return errors + states


def test_a_forked_worker_can_not_mistake_its_parent_s_worker_for_its_own(
    program: Callable[..., Program],
) -> None:
    # A program of its own, so that the numbers are small.
    found = program(
        """
        import sys
        import tractor_host as th, test_spawn, targets, helpers
        with th.spawn(targets.spin, backend="fork", stdio="pipe") as other:
            helpers.ready(other)
            test_spawn._inherited.append(other)
            print(th.spawn(test_spawn.use_inherited_handle, backend="fork").result(timeout=30))
            print(other.state)
            test_spawn._inherited.clear()
        """
    ).run(env=importable())
    assert found.returncode == 0, found.stderr
    *_, first, second = found.stdout.splitlines()
    assert second == "running"
    assert first.count("'running'") == 1
    for use in ("kill", "cancel", "wait", "result", "fileno"):
        assert f"{use}: " in first


# -- programs whose target is in __main__ --------------------------------------------------------------------

MAIN = """
import sys, tractor_host as th

class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return type(other) is type(self) and other.x == self.x
    __hash__ = None

class Trouble(Exception): pass

def move(point, by): return Point(point.x + by)
def fail(): raise Trouble("in main")
async def move_soon(point, by): return move(point, by)

if __name__ == "__main__":
    backend = sys.argv[1]
    assert th.spawn(move, Point(1), 2, backend=backend).result(timeout=30) == Point(3)
    assert th.spawn(move_soon, Point(1), 2, backend=backend).result(timeout=30) == Point(3)
    assert th.spawn(Point, 3, backend=backend).result(timeout=30) == Point(3)
    assert th.spawn("__main__:move", Point(1), 2, backend=backend).result(timeout=30) == Point(3)
    try:
        th.spawn(fail, backend=backend).result(timeout=30)
    except th.RemoteError as error:
        assert type(error.__cause__) is Trouble, repr(error.__cause__)
        assert error.__cause__.args == ("in main",)
    print("all good")
"""


def good(found: subprocess.CompletedProcess[str], says: str = "all good\n") -> None:
    assert (found.returncode, found.stdout, found.stderr) == (0, says, "")


def test_targets_in_a_script_s_main(backend: str, program: Callable[..., Program]) -> None:
    good(program(MAIN).run(backend))


def test_targets_in_a_script_with_an_odd_name(backend: str, program: Callable[..., Program]) -> None:
    good(program(MAIN, name="my script-ü.txt").run(backend))


def test_targets_in_the_main_of_a_module(backend: str, tmp_path: Path) -> None:
    (tmp_path / "some_module.py").write_text(MAIN)
    good(_python("-m", "some_module", backend, cwd=tmp_path))


def test_targets_in_the_main_of_a_module_of_a_package(backend: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "helper.py").write_text("")
    (tmp_path / "package" / "tool.py").write_text("from . import helper\n" + MAIN)
    good(_python("-m", "package.tool", backend, cwd=tmp_path))


def test_targets_in_the_main_of_a_package(backend: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text("from . import __name__ as package\n" + MAIN)
    good(_python("-m", "package", backend, cwd=tmp_path))


def test_targets_in_the_main_of_a_directory(backend: str, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text(MAIN)
    good(_python(tmp_path / "app", backend))


def test_targets_in_the_main_of_a_command(backend: str) -> None:
    good(_python("-c", MAIN, backend))


@pytest.mark.parametrize("backend_", ["subint", "exec"])
def test_a_main_without_source_is_named_as_the_reason(backend_: str) -> None:
    found = subprocess.run(
        [sys.executable, "-", backend_], input=MAIN, capture_output=True, text=True, timeout=PATIENCE
    )
    assert found.returncode == 1
    assert "this __main__ has no file that a worker could run again" in found.stderr
    assert "backend='fork'" in found.stderr


def test_a_main_without_source_can_be_forked() -> None:
    good(
        subprocess.run(
            [sys.executable, "-", "fork"], input=MAIN, capture_output=True, text=True, timeout=PATIENCE
        )
    )


def test_a_script_without_a_guard_gets_a_clear_end_and_does_not_spawn_for_ever(
    backend: str, program: Callable[..., Program]
) -> None:
    found = program(
        """
        import os, sys, tractor_host as th
        def double(x): return 2 * x
        with open(sys.argv[2], "a") as log: log.write("run\\n")
        print(th.spawn(double, 4, backend=sys.argv[1]).result(timeout=20))
        """
    )
    log = found.path.with_name("log")
    ended = found.run(backend, str(log), timeout=60)
    runs = len(log.read_text().splitlines())
    if backend == "fork":
        assert (ended.stdout, runs) == ("8\n", 1)
    else:
        # Its own worker runs it again, and is refused another one.
        assert (ended.returncode, runs) == (1, 2)
        assert "guard what only the program is to do by: if __name__ == '__main__':" in ended.stderr


@pytest.mark.outside
@pytest.mark.parametrize(
    "module",
    ["tractor_host._child", "tractor_host._share", "asyncio.events", "multiprocessing.managers", "trio"],
)
def test_a_module_that_another_thread_is_importing_is_not_taken_for_whole(
    module: str, program: Callable[..., Program]
) -> None:
    source = f"""
        import importlib.machinery, sys, threading
        import tractor_host as th

        class Late(importlib.machinery.SourceFileLoader):
            def exec_module(self, module):
                begun.set()
                go_on.wait(20)
                super().exec_module(module)

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name != {module!r}:
                    return None
                found = importlib.machinery.PathFinder.find_spec(name, path, target)
                found.loader = Late(name, found.origin)
                return found

        if __name__ == "__main__":
            begun, go_on = threading.Event(), threading.Event()
            assert {module!r} not in sys.modules
            sys.meta_path.insert(0, Finder())
            importing = threading.Thread(target=__import__, args=({module!r},))
            importing.start()
            assert begun.wait(20)
            for backend in ("exec", "forkserver"):
                assert th.spawn("math:sqrt", 16.0, backend=backend).result(timeout=20) == 4.0
            assert vars(sys.modules[{module!r}]).keys() <= {{
                "__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__path__", "__cached__",
            }}
            go_on.set()
            importing.join()
            print("done")
    """
    ran = program(source).run()
    assert (ran.stdout, ran.stderr) == ("done\n", "")


@pytest.mark.outside
def test_proxies_of_a_manager_are_at_home_in_a_worker(program: Callable[..., Program]) -> None:
    source = f"""
        import multiprocessing
        import tractor_host as th

        def work(found, again):
            found["calls"] = found.get("calls", 0) + 1
            if again is not None:
                th.spawn(work, found, None, backend=again).result()
            return found

        if __name__ == "__main__":
            with multiprocessing.Manager() as manager:
                for backend in {BACKENDS!r}:
                    found = manager.dict()
                    back = th.spawn(work, found, backend, backend=backend).result(timeout=20)
                    assert found.copy() == back.copy() == {{"calls": 2}}, (backend, found.copy())
                    with th.Executor(1, backend) as pool:
                        assert pool.submit(work, found, None).result(timeout=20).copy() == {{"calls": 3}}
            print("done")
    """
    ran = program(source).run()
    assert (ran.stdout, ran.stderr) == ("done\n", "")


def test_the_main_program_is_run_again_only_for_what_is_defined_in_it(
    backend: str, program: Callable[..., Program]
) -> None:
    found = program(
        """
        import sys, tractor_host as th
        print("main")
        print(th.spawn("math:sqrt", 16, backend=sys.argv[1]).result(timeout=30))
        """
    ).run(backend)
    good(found, "main\n4.0\n")


def _python(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE, **options
    )


def _dedent(code: str) -> str:
    import textwrap

    return textwrap.dedent(code)


def test_a_worker_knows_who_it_is(backend: str) -> None:
    found = th.spawn(targets.who, backend=backend, name="one").result(timeout=PATIENCE)
    assert (found.name, found.path, found.backend) == ("one", ("main", "one"), backend)
    assert (found.runtime, found.budget, found.parent) == ("sync", None, "main")
    assert th.spawn(targets.who_soon, backend=backend, runtime="trio").result(PATIENCE).runtime == "trio"
    below = th.spawn(targets.who_below, backend, backend=backend, name="one").result(timeout=PATIENCE)
    assert below.path == ("main", "one", "below")
    with th.Executor(1, backend) as pool:
        found = pool.submit(targets.who).result(PATIENCE)
        assert (found.name, found.runtime) == (pool.workers()[0].name, "sync")
    assert th.current_actor().path == ("main",)
