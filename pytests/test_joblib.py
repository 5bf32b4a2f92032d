"""The backend `tractor_host` of joblib's, with the real joblib."""

from __future__ import annotations

import gc
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed

import parallels
import targets
import tractor_host as th
import tractor_host.joblib
from conftest import Program, pid_is_gone
from helpers import PATIENCE, until
from tractor_host._remote import UnpicklableError

#: Some run whole programs, and the others need not run twice either.
pytestmark = pytest.mark.outside

#: subint_forkserver is left out for what numpy, which joblib imports, says of subinterpreters.
BACKENDS = ("forkserver", "subint", "fork", "exec")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    tractor_host.joblib.register()
    assert joblib.parallel.BACKENDS["tractor_host"] is tractor_host.joblib.Backend


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    # Their backends are gone. (What has failed has frames, which refer to them in circles.)
    gc.collect()
    until(lambda: not th.workers(), "the end of the workers")


def using(n_jobs: int | None = 2, **options: Any) -> Any:
    return joblib.parallel_config("tractor_host", n_jobs=n_jobs, **options)


# -- calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spawn_backend", BACKENDS)
def test_calls_are_carried_out_in_order(spawn_backend: str) -> None:
    with using(spawn_backend=spawn_backend):
        assert Parallel()(delayed(operator.mul)(number, 2) for number in range(50)) == list(range(0, 100, 2))
        assert Parallel()(delayed(targets.echo)(1, key=2) for _ in range(2)) == [((1,), {"key": 2})] * 2
        assert Parallel()([]) == []
        pids = {*Parallel()(delayed(os.getpid)() for _ in range(4))}
        assert (os.getpid() in pids) == (spawn_backend == "subint")


def test_by_its_name_or_as_an_object() -> None:
    assert Parallel(n_jobs=2, backend="tractor_host")(delayed(abs)(-number) for number in range(3)) == [
        0,
        1,
        2,
    ]
    backend = tractor_host.joblib.Backend(spawn_backend="exec")
    with Parallel(n_jobs=2, backend=backend) as parallel:
        assert parallel(delayed(abs)(-number) for number in range(3)) == [0, 1, 2]
        assert {worker.backend for worker in th.workers()} == {"exec"}


def test_lambdas_and_what_they_close_over() -> None:
    offset = 10

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    with using():
        assert Parallel()(delayed(lambda number: number + offset)(one) for one in range(3)) == [10, 11, 12]
        results = Parallel()(delayed(Local)(number) for number in range(3))
    assert [type(result) for result in results] == [Local] * 3
    assert [result.value for result in results] == [0, 1, 2]


def test_as_many_workers_as_joblib_says() -> None:
    with using(1):  # which is the program itself, whatever the backend is
        assert Parallel()(delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2
    with using(None):
        assert Parallel()._effective_n_jobs() == 1
    with using(-1):
        assert Parallel()._effective_n_jobs() == joblib.cpu_count()
    with using(-1000):
        assert Parallel()._effective_n_jobs() == 1
    with using(0), pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel()([])


@pytest.mark.parametrize("batch_size", ["auto", 7])
def test_small_calls_go_in_batches(batch_size: Any) -> None:
    with using(), Parallel(batch_size=batch_size) as parallel:
        for _ in range(3):
            assert parallel(delayed(abs)(number) for number in range(300)) == list(range(300))
        sizes = parallel._backend._effective_batch_size
    assert sizes > 1 or batch_size == 7


def test_a_block_keeps_its_workers() -> None:
    with using(), Parallel(pre_dispatch="all") as parallel:
        first = {*parallel(delayed(targets.return_after)(0.02, number) for number in range(6))}
        workers = {worker.id for worker in th.workers()}
        assert len(workers) == 2
        parallel(delayed(abs)(number) for number in range(6))
        assert {worker.id for worker in th.workers()} == workers
        assert first == set(range(6))


def test_workers_stay_for_the_next_call_and_end_with_the_block_of_the_configuration() -> None:
    gc.disable()
    try:
        with using():
            for _ in range(3):
                Parallel(pre_dispatch="all")(
                    delayed(targets.return_after)(0.02, number) for number in range(6)
                )
            workers = th.workers()
            assert len(workers) == 2
            assert {worker.name for worker in workers} == {"pool-1", "pool-2"}
            # Another number of them is another pool.
            Parallel(n_jobs=3)(delayed(abs)(number) for number in range(6))
            until(lambda: not {one.id for one in workers} & {one.id for one in th.workers()})
        until(lambda: not th.workers(), "the end of the workers")
        with using(idle_timeout=0.05):
            Parallel()(delayed(abs)(number) for number in range(6))
            until(lambda: not th.workers(), "the end of the workers")
            Parallel()(delayed(abs)(number) for number in range(6))
    finally:
        gc.enable()


def test_generators() -> None:
    with using():
        calls = [delayed(targets.return_after)(0.001 * number, number) for number in range(8)]
        assert list(Parallel(return_as="generator")(calls)) == list(range(8))
        assert sorted(Parallel(return_as="generator_unordered")(calls)) == list(range(8))
        # Two at a time share what is there, also where they want different numbers.
        one = Parallel(return_as="generator")(calls)
        two = Parallel(n_jobs=3, return_as="generator")(calls)
        assert [next(one), next(two), *one, *two] == [0, 0, *range(1, 8), *range(1, 8)]


def test_a_generator_that_nobody_wants_ends_its_tasks() -> None:
    with using(cancel_timeout=0.1):
        generator = Parallel(return_as="generator")(
            delayed(call)() for call in (targets.nothing, targets.spin, targets.spin)
        )
        assert next(generator) is None
        start = time.monotonic()
        with pytest.warns(UserWarning, match="tasks"):
            del generator
        assert time.monotonic() - start < PATIENCE / 2
        assert th.workers() == []


def test_nested_parallelism() -> None:
    with using():
        assert Parallel()(delayed(parallels.inner)(count) for count in (3, 4)) == [
            ("ThreadingBackend", 3),
            ("ThreadingBackend", 6),
        ]
        # A worker's workers, and they end with it.
        assert Parallel()(delayed(parallels.inner_by_name)(count) for count in (2, 3)) == [[0, 1], [0, 1, 2]]
    with using(spawn_backend="subint"):
        assert Parallel()(delayed(parallels.inner)(count) for count in (3, 4)) == [
            ("SequentialBackend", 3),
            ("SequentialBackend", 6),
        ]


def test_large_arrays_go_both_ways() -> None:
    array = np.arange(1_000_000)
    with using():
        for result in Parallel()(delayed(parallels.write)(array) for _ in range(3)):
            assert result[0] == 7
            assert (result[1:] == array[1:]).all()
            result[0] = 8
        assert array[0] == 0
        # In what is sent by value they go by files in memory as well.
        assert Parallel()(delayed(lambda: int(array.sum()))() for _ in range(2)) == [499999500000] * 2


def test_threads_of_libraries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    look = delayed(os.getenv)("OMP_NUM_THREADS")
    with using(inner_max_num_threads=3):
        assert Parallel()([look]) == ["3"]
    with using():
        assert Parallel()([look]) == [str(max(joblib.cpu_count() // 2, 1))]
    with using(env={"OMP_NUM_THREADS": "9", "OWN": "1"}):
        assert Parallel()([look, delayed(os.getenv)("OWN")])[1] == "1"
    assert "OMP_NUM_THREADS" not in os.environ


# -- failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spawn_backend", BACKENDS)
def test_what_a_call_raises_is_raised_with_where_it_did(spawn_backend: str) -> None:
    with using(spawn_backend=spawn_backend):
        with pytest.raises(LookupError, match="no 3") as caught:
            Parallel()(delayed(parallels.fail_at)(number, 3) for number in range(100))
        assert "in fail_at" in str(caught.value.__cause__)


def test_an_exception_of_a_class_that_can_not_be_imported() -> None:
    class Own(Exception):
        pass

    def fail() -> None:
        error = Own("mine")
        error.add_note("a note")
        raise error

    with using(), pytest.raises(Own, match="mine") as caught:
        Parallel()([delayed(fail)()])
    assert caught.value.__notes__ == ["a note"]
    assert "in fail" in str(caught.value.__cause__)


def test_an_exception_that_can_not_be_made_again_is_told_with_its_text() -> None:
    class Own(Exception):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(f"{code}: {text}")

    def fail() -> None:
        raise Own(404, "not found")

    with using(), pytest.raises(UnpicklableError, match="Own: 404: not found") as caught:
        Parallel()([delayed(fail)()])
    assert "in fail" in str(caught.value.__cause__)


def test_calls_that_another_one_s_end_ends_are_told_so(tmp_path: Path) -> None:
    backend = tractor_host.joblib.Backend(cancel_timeout=0.1)
    errors: list[BaseException] = []
    waiting: list[Parallel] = []

    def work(number: int) -> None:
        (tmp_path / str(number)).touch()
        time.sleep(1000)

    def wait() -> None:
        with joblib.parallel_config(backend=backend, n_jobs=2):
            waiting.append(Parallel())
            try:
                waiting[0](delayed(work)(number) for number in range(4))
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    # Two are carried out, and two wait.
    until(lambda: len(os.listdir(tmp_path)) == 2 and waiting[0].n_dispatched_tasks == 4, "its calls")
    with (
        joblib.parallel_config(backend=backend, n_jobs=2),
        pytest.raises(multiprocessing.TimeoutError),
    ):
        Parallel(timeout=0.1)([delayed(abs)(-1)])
    thread.join(PATIENCE)
    [error] = errors
    assert isinstance(error, CancelledError)
    assert "another joblib.Parallel" in str(error)
    waiting.clear()


def test_a_block_goes_on_after_a_failure() -> None:
    with using(), Parallel() as parallel:
        for bad in (1, 2):
            with pytest.raises(LookupError, match=f"no {bad}"):
                parallel(delayed(parallels.fail_at)(number, bad) for number in range(4))
        assert parallel(delayed(abs)(-number) for number in range(4)) == [0, 1, 2, 3]


def test_a_crash_says_who_and_why_and_the_next_call_works() -> None:
    with using(stdio="null"):
        with pytest.raises(th.WorkerDied, match="SIGABRT") as caught:
            Parallel()(delayed(parallels.crash_at)(number, 3) for number in range(20))
        assert "It was carrying out parallels:crash_at" in caught.value.__notes__[0]
        with Parallel(batch_size=1) as parallel:
            with pytest.raises(th.WorkerDied):
                parallel(delayed(parallels.crash_at)(number, 0) for number in range(4))
            assert parallel(delayed(parallels.crash_at)(number, 9) for number in range(4)) == [0, 1, 2, 3]


def test_a_result_that_can_not_be_pickled() -> None:
    with using(), pytest.raises(TypeError, match="pickle") as caught:
        Parallel()([delayed(threading.Lock)()])
    assert any("cannot be pickled" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("target", [targets.spin, targets.spin_and_swallow, targets.hog_in_c])
def test_the_time_limit_of_a_parallel_ends_its_workers(target: Callable[[], Any]) -> None:
    with using(cancel_timeout=0.1, kill_timeout=0.5):
        start = time.monotonic()
        # joblib's, which is not Python's own.
        with pytest.raises(multiprocessing.TimeoutError):
            Parallel(timeout=0.3)(delayed(target)() for _ in range(4))
        assert th.workers() == []
        assert time.monotonic() - start < PATIENCE / 2


def test_a_time_limit_for_each_call() -> None:
    # A new worker has time to import joblib.
    with using(task_timeout=2.0, cancel_timeout=0.1):
        # Together they take longer, whatever joblib would like to put into one batch.
        assert Parallel()(delayed(targets.return_after)(0.1, number) for number in range(50)) == [*range(50)]
        with pytest.raises(th.TaskTimeout, match=r"targets:spin took longer than 2(\.0)? s"):
            Parallel()(delayed(call)() for call in (targets.nothing, targets.spin))


@pytest.mark.outside
@pytest.mark.parametrize("stuck", ["while True: pass", "sum(range(10**12))"])
def test_ctrl_c_ends_the_program_and_the_workers(program: Callable[..., Program], stuck: str) -> None:
    source = f"""
        import joblib, os, tractor_host.joblib

        def work(number):
            print(os.getpid(), flush=True)
            {stuck}

        # No guard: its functions are sent by value, as joblib's users are used to.
        tractor_host.joblib.register()
        with joblib.parallel_config("tractor_host", n_jobs=2, cancel_timeout=0.1):
            joblib.Parallel()(joblib.delayed(work)(number) for number in range(4))
    """
    with program(source).start() as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert all(pid_is_gone(pid) for pid in pids)


# -- bad input -----------------------------------------------------------------------------------------------


def test_what_can_not_be_right_is_refused() -> None:
    with pytest.raises(TypeError, match="no option nonsense; it has .*spawn_backend, stdio, task_timeout"):
        using(nonsense=1)
    with pytest.raises(TypeError, match="no option max_workers"):
        using(max_workers=1)
    with pytest.raises(ValueError, match="no_such"):
        using(spawn_backend="no_such")
    with pytest.raises(ValueError, match="task_timeout"):
        using(task_timeout=-1)
    with (
        using(spawn_backend="subint", inner_max_num_threads=1),
        pytest.raises(ValueError, match="is for processes"),
    ):
        Parallel()([delayed(abs)(1)])
    with pytest.raises(ValueError, match="shared memory"), using():
        Parallel(require="sharedmem", backend="tractor_host")


@pytest.mark.outside
@pytest.mark.parametrize("missing", ["joblib", "cloudpickle"])
def test_without_joblib_it_says_what_it_needs(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try:\n    import tractor_host.joblib\nexcept ImportError as error:\n    print(error.name, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "joblib tractor_host.joblib is for programs that use joblib: pip install 'tractor-host[joblib]'\n"
    )
