"""What a worker is to run: checked, described and packed on the spawning side. Knows no backend."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, final

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
            _blame(reference if kind == "callable" else None, args, kwargs, error)
            raise

    @property
    def passed(self) -> list[int]:
        return [] if self._passing is None else self._passing.numbers

    @property
    def needs_main(self) -> bool:
        """Whether something in it is looked up in `__main__` by the worker: pickle names the module."""
        return self.packed.names(b"__main__")


def _pack(value: object) -> tuple[Packed, Passing | None]:
    # Loaded by whoever has anything to pass.
    share = sys.modules.get("tractor_host._share")
    if share is None and "socket" in sys.modules:
        from tractor_host import _share as share
    if share is None:
        return Packed(value), None
    passing: Passing = share.Passing()
    return Packed(value, passing.table()), passing


def describe(target: Callable[..., Any]) -> str:
    """`module:qualname` of a callable, or of its type."""
    inner: Any = getattr(target, "func", target)  # functools.partial
    inner = getattr(inner, "__func__", inner)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{getattr(named, '__module__', '?')}:{named.__qualname__}"


def _blame(target: object, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> None:
    """Raises the TypeError that names what can't be pickled."""
    if target is not None:
        try:
            _pack(target)
        except Exception as reason:
            raise TypeError(
                f"the target {target!r} cannot be sent to a worker ({reason}); use a function that can be "
                "imported by its name (not a lambda or a local one), or a functools.partial of one"
            ) from error
    named = [(f"argument {index}", value) for index, value in enumerate(args, 1)]
    named += [(f"argument {key!r}", value) for key, value in kwargs.items()]
    for name, value in named:
        try:
            _pack(value)
        except Exception as reason:
            raise TypeError(
                f"{name} of type {type(value).__qualname__} cannot be pickled: {reason}"
            ) from error


def main_module() -> list[str] | None:
    """How a worker can make this program's `__main__` again: `[kind, value]`; `None` if it has no source
    that a worker could run."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if isinstance(name, str) and name != "__main__":
        return ["module", name]
    path = getattr(main, "__file__", None)
    if isinstance(path, str) and os.path.exists(path):
        return ["path", fs_text(os.path.abspath(path))]
    if "-c" in sys.orig_argv[1:] and sys.argv[:1] == ["-c"]:
        return ["code", sys.orig_argv[sys.orig_argv.index("-c") + 1]]
    return None


def fs_text(path: str | bytes | os.PathLike[str]) -> str:
    """A file name or environment string for the supervisor: one character a byte."""
    return os.fsencode(path).decode("latin-1")
