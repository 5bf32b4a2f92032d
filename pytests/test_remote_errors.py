"""Exceptions come back as they were: type, arguments, state, notes, cause, context, groups; and with the
worker's traceback as text. Where one can't, it says so."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import pytest

import targets
import tractor_host as th
from conftest import PATIENCE
from tractor_host._remote import _CAUSE, UnpicklableError

pytestmark = pytest.mark.outside


def error_of(target: Any, *args: Any, **options: Any) -> th.RemoteError:
    with pytest.raises(th.RemoteError) as caught:
        th.spawn(target, *args, **options).result(timeout=PATIENCE)
    return caught.value


def cause_of(target: Any, *args: Any, **options: Any) -> BaseException:
    cause = error_of(target, *args, **options).__cause__
    assert cause is not None
    return cause


def test_its_type_arguments_and_state(backend: str) -> None:
    cause = cause_of(targets.raise_with_state, backend=backend)
    assert type(cause) is targets.WithState
    assert cause.args == ("a text", 42)
    assert vars(cause) == {"number": 42, "extra": "kept"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        KeyError("key"),
        StopIteration(3),
        SyntaxError("bad", ("file", 1, 2, "text", 1, 3)),
        ImportError("text", name="module", path="path"),
        AttributeError("text", name="name", obj=3),
        GeneratorExit(),
        KeyboardInterrupt("text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_builtin_exceptions(backend: str, error: BaseException) -> None:
    worker = th.spawn(th.Source("raise args[0]"), error, backend=backend)
    with pytest.raises(th.RemoteError) as caught:
        worker.result(timeout=PATIENCE)
    cause = caught.value.__cause__
    assert type(cause) is type(error)
    assert repr(cause) == repr(error)
    for name in ("errno", "filename", "name", "path", "lineno", "text", "start"):
        assert getattr(cause, name, None) == getattr(error, name, None)


def test_its_notes(backend: str) -> None:
    cause = cause_of(targets.raise_with_notes, backend=backend)
    assert repr(cause) == "ValueError('noted', 1)"
    assert cause.__notes__ == ["first note", "second note"]


def test_its_cause(backend: str) -> None:
    error = cause_of(targets.raise_from_cause, backend=backend)
    assert repr(error) == "ValueError('the effect')"
    assert repr(error.__cause__) == "KeyError('the cause')"
    assert error.__context__ is error.__cause__
    assert error.__suppress_context__


@pytest.mark.parametrize("from_cause", [False, True])
def test_what_can_not_be_written_to(backend: str, from_cause: bool) -> None:
    cause = cause_of(targets.raise_frozen, from_cause, backend=backend)
    assert cause == targets.Frozen(3)
    with th.Executor(1, backend) as pool:
        error = pool.submit(targets.raise_frozen, from_cause).exception(PATIENCE)
    assert error == targets.Frozen(3)
    assert error is not None
    if from_cause:
        assert repr(error.__cause__) == "KeyError('the cause')"
        assert "in raise_frozen" in error.__notes__[-1]
    else:
        assert "in raise_frozen" in str(error.__cause__)


@pytest.mark.parametrize("where", ["anywhere", "text", "reduce", "unpickled"])
def test_what_raises_whatever_it_is_asked(backend: str, where: str) -> None:
    """It is told of, and ends neither its worker nor a thread that takes it in."""
    kind = targets.Hostile if where in ("anywhere", "text") else UnpicklableError
    if where != "unpickled":  # in the main thread an interrupt is taken for one
        assert type(cause_of(targets.raise_hostile, where, backend=backend)) is kind
    with th.Executor(1, backend) as pool:
        worker = pool.submit(targets.nothing).result(PATIENCE) or pool.workers()[0]
        error = pool.submit(targets.raise_hostile, where).exception(PATIENCE)
        assert type(error) is kind
        assert repr(_CAUSE.__get__(error)) == "KeyError('the cause')"
        error = pool.submit(targets.hostile_when_unpickled).exception(PATIENCE)
        assert type(error) is targets.Hostile
        error = pool.submit(targets.grenade, "KeyboardInterrupt").exception(PATIENCE)
        assert isinstance(error, RuntimeError)
        assert "does not unpickle here: KeyboardInterrupt: exploded" in str(error)
        assert pool.submit(targets.add, 1, 2).result(PATIENCE) == 3
        assert [one.id for one in pool.workers()] == [worker.id]


def test_its_context(backend: str) -> None:
    error = cause_of(targets.raise_in_context, backend=backend)
    assert repr(error) == "ValueError('the second')"
    assert error.__cause__ is None
    assert repr(error.__context__) == "KeyError('the context')"
    assert not error.__suppress_context__


def test_its_context_that_was_suppressed(backend: str) -> None:
    error = cause_of(targets.raise_from_none, backend=backend)
    assert repr(error) == "ValueError('shown')"
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert repr(error.__context__) == "KeyError('hidden')"


def test_groups_in_groups(backend: str) -> None:
    outer = cause_of(targets.raise_group, backend=backend)
    assert type(outer) is ExceptionGroup
    assert outer.message == "outer"
    inner, odd = outer.exceptions
    assert type(inner) is ExceptionGroup
    assert inner.message == "inner"
    assert inner.__notes__ == ["a note of the inner group"]
    deep, known = inner.exceptions
    assert repr(deep) == "TypeError('deep')"
    assert (type(known), known.args, known.filename) == (FileNotFoundError, (2, "No such file"), "name")  # type: ignore[attr-defined]
    # One of it can't be brought over, the rest is.
    assert "targets.Unreducible: in a group" in str(odd)
    assert "cannot be pickled" in str(odd)


def test_a_group_of_base_exceptions(backend: str) -> None:
    group = cause_of(targets.raise_base_group, backend=backend)
    assert type(group) is BaseExceptionGroup
    assert [repr(member) for member in group.exceptions] == [
        "KeyboardInterrupt()",
        "ValueError('one of them')",
    ]


def test_a_group_of_a_type_of_one_s_own(backend: str) -> None:
    group = cause_of(targets.raise_own_group, backend=backend)
    assert type(group) is targets.OwnGroup
    assert (group.message, group.code) == ("mine", 7)
    (member,) = group.exceptions
    assert repr(member) == "ValueError('inside')"
    assert member.__notes__ == ["of a member"]
    assert repr(member.__cause__) == "KeyError('of a member')"


def test_the_same_exception_twice_stays_the_same(backend: str) -> None:
    code = "error = ValueError(1)\nraise ExceptionGroup('twice', [error, error]) from error"
    group = cause_of(th.Source(code), backend=backend)
    assert isinstance(group, ExceptionGroup)
    assert group.exceptions[0] is group.exceptions[1] is group.__cause__


def test_causes_that_form_a_loop(backend: str) -> None:
    first = cause_of(targets.raise_cycle, backend=backend)
    assert repr(first) == "ValueError('first')"
    assert repr(first.__cause__) == "ValueError('second')"
    assert first.__cause__ is not None
    assert first.__cause__.__cause__ is first


def test_a_group_that_is_the_cause_of_its_member(backend: str) -> None:
    code = "error = ValueError(1)\ngroup = ExceptionGroup('group', [error])\nerror.__cause__ = group\nraise group"
    group = cause_of(th.Source(code), backend=backend)
    assert isinstance(group, ExceptionGroup)
    assert group.exceptions[0].__cause__ is group


@pytest.mark.parametrize("length", [50, 5000])
def test_a_long_chain(backend: str, length: int) -> None:
    """Longer than Python's own recursion goes: what can be brought over is, and in any case it raises."""
    error: BaseException | None = cause_of(targets.raise_long_chain, length, backend=backend)
    assert repr(error) == f"ValueError({length - 1})"
    seen = 0
    while error is not None:
        error, seen = error.__context__, seen + 1
    assert seen == length if length <= 50 else seen >= 50


def test_deep_groups(backend: str) -> None:
    code = "error = ValueError(1)\nfor _ in range(400): error = ExceptionGroup('g', [error])\nraise error"
    group = cause_of(th.Source(code), backend=backend)
    depth = 0
    while isinstance(group, ExceptionGroup):
        group, depth = group.exceptions[0], depth + 1
    assert depth == 400
    assert repr(group) == "ValueError(1)"


def test_a_recursion_error(backend: str) -> None:
    error = error_of(th.Source("def f(): f()\nf()"), backend=backend)
    assert isinstance(error.__cause__, RecursionError)
    assert "in f" in error.traceback


def test_an_exception_whose_pickle_is_another_object(backend: str) -> None:
    cause = cause_of(targets.raise_pickled_as_a_number, backend=backend)
    assert isinstance(cause, BaseException)
    assert "PickledAsANumber" in str(cause)


def test_an_exception_that_ends_the_program_when_it_is_unpickled(backend: str) -> None:
    cause = cause_of(targets.raise_exit_when_unpickled, backend=backend)
    assert "ExitWhenUnpickled" in str(cause)


def test_notes_that_are_no_notes(backend: str) -> None:
    code = "error = ValueError(1)\nerror.__notes__ = 3\nraise error"
    cause = cause_of(th.Source(code), backend=backend)
    assert repr(cause) == "ValueError(1)"


# -- its traceback -------------------------------------------------------------------------------------------


def test_the_traceback_names_file_line_and_function(backend: str) -> None:
    error = error_of(targets.raise_from_cause, backend=backend)
    line = targets.raise_from_cause.__code__.co_firstlineno
    where = f'File "{targets.__file__}", line %d, in raise_from_cause'
    assert where % (line + 2) in error.traceback
    assert where % (line + 4) in error.traceback
    assert "The above exception was the direct cause of the following exception" in error.traceback
    assert error.traceback.rstrip().endswith("ValueError: the effect")
    assert '    raise KeyError("the cause")' in error.traceback


def test_its_text_is_all_that_one_needs(backend: str) -> None:
    worker = th.spawn(targets.raise_with_notes, backend=backend, name="noter")
    with pytest.raises(th.RemoteError) as caught:
        worker.result(timeout=PATIENCE)
    text = str(caught.value)
    first = f"worker 'noter' ({backend}, targets:raise_with_notes) raised ValueError: ('noted', 1)"
    assert text.startswith(f"{first}\n\nTraceback (most recent call last):\n")
    assert text.rstrip().endswith("ValueError: ('noted', 1)\nfirst note\nsecond note")


def test_a_printed_remote_error_shows_the_worker_s_traceback(backend: str) -> None:
    error = error_of(targets.raise_in_context, backend=backend)
    shown = "".join(traceback.format_exception(error))
    assert "in raise_in_context" in shown
    assert "tractor_host._errors.RemoteError: worker " in shown


def test_groups_are_shown_with_their_members(backend: str) -> None:
    error = error_of(targets.raise_group, backend=backend)
    for text in ("outer (2 sub-exceptions)", "inner (2 sub-exceptions)", "TypeError: deep"):
        assert text in error.traceback


def test_the_traceback_of_a_failed_start(backend: str) -> None:
    error = error_of("nowhere:nothing", backend=backend)
    assert (
        str(error).splitlines()[0].endswith("failed to start: ModuleNotFoundError: No module named 'nowhere'")
    )
    assert "ModuleNotFoundError: No module named 'nowhere'" in error.traceback


# -- the errors themselves ------------------------------------------------------------------------------------


def test_every_kind_of_error_can_be_pickled(backend: str) -> None:
    """A worker of a worker fails, and the worker lets that through."""
    errors: list[th.WorkerError] = [error_of(targets.raise_with_notes, backend=backend)]
    worker = th.spawn(targets.sys_exit, 3, backend=backend)
    with pytest.raises(th.WorkerDied) as died:
        worker.result(timeout=PATIENCE)
    errors.append(died.value)
    with th.spawn(targets.spin, backend=backend) as other:
        pass
    with pytest.raises(th.WorkerKilled) as killed:
        other.result()
    errors.append(killed.value)
    errors += [
        kind("text", died.value.exit) for kind in (th.WorkerError, th.WorkerCancelled, th.WorkerAbandoned)
    ]
    for error in errors:
        error.add_note("a note")
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            back = pickle.loads(pickle.dumps(error, protocol))
            assert type(back) is type(error)
            assert (str(back), back.args, back.exit) == (str(error), error.args, error.exit)
            assert back.__notes__ == ["a note"]
            if isinstance(error, th.RemoteError):
                assert back.traceback == error.traceback


def test_an_error_of_a_worker_s_worker_comes_through_with_its_cause(backend: str) -> None:
    code = "import tractor_host as th, targets; th.spawn(targets.raise_with_notes, backend='fork').result(timeout=30)"
    outer = error_of(th.Source(code), backend=backend)
    inner = outer.__cause__
    assert isinstance(inner, th.RemoteError)
    assert inner.exit.kind == "raised"
    assert repr(inner.__cause__) == "ValueError('noted', 1)"
    assert inner.__cause__ is not None
    assert inner.__cause__.__notes__ == ["first note", "second note"]
    assert "in raise_with_notes" in inner.traceback
    assert "in raise_with_notes" in outer.traceback


def test_an_exit_can_be_pickled(backend: str) -> None:
    found = th.spawn(targets.nothing, backend=backend).wait(timeout=PATIENCE)
    assert pickle.loads(pickle.dumps(found)) == found


def test_the_cause_is_raised_anew_for_everyone_who_asks(backend: str) -> None:
    """Raising one object from two places would mix their tracebacks up."""
    worker = th.spawn(targets.raise_with_notes, backend=backend)
    errors = []
    for _ in range(2):
        with pytest.raises(th.RemoteError) as caught:
            worker.result(timeout=PATIENCE)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert repr(errors[0].__cause__) == repr(errors[1].__cause__)
