"""What a worker is to run: checked, described and packed on the spawning side. Knows no backend."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, final

from tractor_host._by_value import ByValue
from tractor_host._errors import add_note
from tractor_host._loaded import loaded
from tractor_host._parcel import Packed

if TYPE_CHECKING:
    from tractor_host._share import Passing

__all__ = ["Source", "Target"]


@final
class Source:
    """Python source text as a target.

    It runs in a module namespace of its own, as `__main__`, with the spawn's arguments as `args` and
    `kwargs`. Its value is that of its last statement, if that is an expression, else `None`.

        >>> import tractor_host as th
        >>> th.spawn(th.Source("import os\\nsum(args)"), 1, 2, 3).result(timeout=10)
        6
    """

    __slots__ = ("code", "filename")

    def __init__(self, code: str, *, filename: str = "<source>") -> None:
        if not isinstance(code, str):
            raise TypeError(f"source code must be a str, not {type(code).__name__}")
        self.code: Final = code
        self.filename: Final = filename

    def __repr__(self) -> str:
        first = self.code.strip().partition("\n")[0]
        return f"<Source {first[:40]!r}>"


_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@final
class Target:
    """A checked target with its packed arguments.

    Attributes:
        description: In words, and the key under which the supervisor remembers it.
        packed: Pickled, for `_child` to unpack.
        passed: The descriptors that are referred to. They are not its own.
    """

    __slots__ = ("_passing", "description", "packed")

    def __init__(
        self,
        target: str | Source | Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        reference: object
        if isinstance(target, str):
            if not _NAME.fullmatch(target):
                raise ValueError(
                    f"a target by name is written 'module:qualname' (such as 'math:sqrt'), not {target!r}"
                )
            kind, reference, self.description = "name", target, target
        elif isinstance(target, Source):
            kind, reference = "source", (target.code, target.filename)
            self.description = f"source:{target.filename}"
        elif callable(target):
            kind, reference, self.description = "callable", target, describe(target)
        else:
            raise TypeError(
                "a target is a callable, a 'module:qualname' string or a tractor_host.Source, "
                f"not {type(target).__name__}"
            )
        for key in kwargs:
            if not isinstance(key, str):
                raise TypeError(f"kwargs must have strings as keys, not {key!r}")
        try:
            self.packed, self._passing = _pack((kind, reference, tuple(args), dict(kwargs)))
        except Exception as error:
            blame = _blame(reference if kind == "callable" else None, args, kwargs)
            if blame is None:
                raise
            raise TypeError(blame) from error

    @classmethod
    def of_call(
        cls, function: object, args: Sequence[Any], kwargs: Mapping[str, Any], *, what: str | None = None
    ) -> Self:
        """What `_calls` carries out: a function with its arguments; `what` it is called, if not its name.

        Raises:
            Exception: It can't be pickled.
        """
        made = object.__new__(cls)
        made.description = describe(function) if what is None else what
        try:
            made.packed, made._passing = _pack((function, args, kwargs))
        except Exception as error:
            if (blame := _blame(function, args, kwargs)) is not None:
                add_note(error, blame)
            raise
        return made

    @property
    def passed(self) -> list[int]:
        return [] if self._passing is None else self._passing.numbers

    @property
    def needs_main(self) -> bool:
        """Whether something in it is looked up in `__main__` by the worker: pickle names the module."""
        return self.packed.names(b"__main__") or self.packed.names(b"__mp_main__")


def call_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Target, list[str] | None]:
    """A call that a worker can carry out, and the main module that it must make before, if any.

    A function that can't be imported by its name is sent by cloudpickle, where that is installed.

    Raises:
        Exception: It can't be pickled.
    """
    if isinstance(function, ByValue):
        return Target.of_call(function, args, kwargs, what=function.description), None
    try:
        target = Target.of_call(function, args, kwargs)
        if not target.needs_main:
            return target, None
        # What a worker makes of our main program comes back under this name, as with multiprocessing.
        sys.modules.setdefault("__mp_main__", sys.modules["__main__"])
        main = main_module()
        if main is None:
            raise TypeError(
                f"{target.description} or an argument is defined in __main__, and this __main__ "
                "has no file that a worker could run again (an interactive session?); define it in a "
                "module, or install cloudpickle"
            )
        return target, main
    except Exception:
        data = _cloudpickled(function)
        if data is None:
            raise
        what = describe(function)
        try:
            return Target.of_call(_ByValue(data), args, kwargs, what=what), None
        except Exception:
            whole = ByValue(functools.partial(function, *args, **kwargs), what)
            try:
                return Target.of_call(whole, (), {}, what=what), None
            except Exception:
                pass
            raise


class _ByValue:
    """A function as cloudpickle sends it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Any, ...]:
        import pickle

        return pickle.loads, (self._data,)


def _cloudpickled(function: Any) -> bytes | None:
    """`None` where cloudpickle is not installed, or can't send it either."""
    try:
        import cloudpickle  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        return None
    try:
        data: bytes = cloudpickle.dumps(function)
    except Exception:
        return None
    return data


def _pack(value: object) -> tuple[Packed, Passing | None]:
    # Loaded by whoever has anything to pass.
    share = loaded("tractor_host._share")
    if share is None and loaded("socket") is not None:
        from tractor_host import _share as share
    if share is None:
        return Packed(value), None
    passing: Passing = share.Passing()
    return Packed(value, passing.table()), passing


def describe(target: object) -> str:
    """`module:qualname` of a callable, or of its type."""
    inner: Any = getattr(target, "func", target)  # functools.partial
    inner = getattr(inner, "__func__", inner)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{getattr(named, '__module__', '?')}:{named.__qualname__}"


def _blame(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What of it can't be pickled, in words; `None` if each of the parts can."""
    if target is not None:
        try:
            _pack(target)
        except Exception as reason:
            return (
                f"the target {target!r} cannot be sent to a worker ({reason}); use a function that can be "
                "imported by its name (not a lambda or a local one), or a functools.partial of one"
            )
    named = [(f"argument {index}", value) for index, value in enumerate(args, 1)]
    named += [(f"argument {key!r}", value) for key, value in kwargs.items()]
    for name, value in named:
        try:
            _pack(value)
        except Exception as reason:
            return f"{name} of type {type(value).__qualname__} cannot be pickled: {reason}"
    return None


def main_module() -> list[str] | None:
    """How a worker can make this program's `__main__` again: `[kind, value]`; `None` if it has no source
    that a worker could run."""
    made_of: list[str] | None = getattr(loaded("tractor_host._child"), "made_of", None)
    if made_of is not None:
        return list(made_of)
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if isinstance(name, str) and name != "__main__":
        return ["module", name]
    path = getattr(main, "__file__", None)
    if isinstance(path, str) and os.path.exists(path):
        return ["path", fs_text(os.path.abspath(path))]
    code = _code_of(sys.orig_argv[1:]) if sys.argv[:1] == ["-c"] else None
    return None if code is None else ["code", code]


def _code_of(arguments: list[str]) -> str | None:
    """What follows the option `-c`, which may be the last one of several, as in `-Ic`."""
    for place, text in enumerate(arguments):
        # The others of those that take a value, which may have this letter in it.
        found = re.fullmatch("-[^-cWXm]*c(.*)", text, re.DOTALL)
        if found is not None:
            return found[1] or next(iter(arguments[place + 1 :]), None)
    return None


def fs_text(path: str | bytes | os.PathLike[str]) -> str:
    """A file name or environment string for the supervisor: one character a byte."""
    return os.fsencode(path).decode("latin-1")
