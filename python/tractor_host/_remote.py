"""Exceptions over a border: packed with their causes, notes and traceback text, unpacked as the same
types where those can be unpickled, and as a stand-in that says so where not.

An exception may be anything: its attributes are read and written past its class, and what its methods raise,
`SystemExit` included, is told in its stead.
"""

from __future__ import annotations

import _thread
import pickle
import traceback
from typing import Any, Final

from tractor_host._errors import Cancelled, add_note
from tractor_host._loaded import loaded
from tractor_host._parcel import unpack

_ATTRIBUTES: Final = BaseException.__dict__["__dict__"]
_CAUSE: Final = BaseException.__dict__["__cause__"]
_CONTEXT: Final = BaseException.__dict__["__context__"]
_SUPPRESS: Final = BaseException.__dict__["__suppress_context__"]
_MEMBERS: Final = BaseExceptionGroup.__dict__["exceptions"]
_MESSAGE: Final = BaseExceptionGroup.__dict__["message"]


class UnpicklableError(Exception):
    """Stands in for an exception that could not be brought over: its type's name and its text."""


class RemoteTraceback(Exception):
    """The cause of an exception that a call in a worker has raised: where it did, as text."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


def summary(error: BaseException) -> str:
    """`Type: text`, on one line, whatever the exception's own methods do."""
    try:
        text = str(error)
    except BaseException as broken:
        if _is_for_us(broken):
            raise
        text = f"<its __str__ raised {type(broken).__name__}>"
    name = type(error).__qualname__
    line = f"{name}: {text.splitlines()[0]}" if text.strip() else name
    # Lone surrogates can go nowhere but into a Python string.
    return line.encode("utf-8", "backslashreplace").decode()


def dump(error: BaseException) -> bytes:
    """Packs an exception with everything that hangs on it."""
    nodes = _flatten(error)
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as broken:
        if _is_for_us(broken):
            raise
        text = f"<the traceback of {summary(error)} could not be formatted: {summary(broken)}>"
    return pickle.dumps((nodes, text), 5)


def _is_for_us(error: BaseException) -> bool:
    """Whether it tells this thread to stop, and was not raised by what it has called."""
    child = loaded("tractor_host._child")
    is_worker = child is not None and child.main_thread is not None
    if isinstance(error, Cancelled) or is_worker:
        return isinstance(error, Cancelled | KeyboardInterrupt) and (
            child is not None and child.main_thread == _thread.get_ident() and bool(child.was_cancelled())
        )
    if not isinstance(error, KeyboardInterrupt):
        return False
    import threading

    return _thread.get_ident() == threading.main_thread().ident


def load(payload: bytes | memoryview, *, raised: bool) -> tuple[bool, Any]:
    """Unpacks what a worker ended with.

    Returns:
        `(True, value)`, or `(False, (exception, traceback text))`.
    """
    try:
        content = unpack(payload)
        if not raised:
            return True, content
        nodes, text = content
        return False, (_build(nodes), text)
    except BaseException as error:  # a worker's result must not end the program that looks at it
        if _is_for_us(error):
            raise
        add_note(error, "raised while the worker's result was unpickled here")
        return False, (error, "")


def answer(payload: bytes | memoryview, *, returned: bool) -> tuple[bool, Any]:
    """What a call came to, from its worker's answer.

    Returns:
        `(True, value)`, or `(False, exception)`; where it was raised is the exception's cause, or a note.
    """
    good, value = load(payload, raised=not returned)
    if good:
        return True, value
    error, text = value
    if returned and not isinstance(error, Exception):
        what = RuntimeError(f"the result does not unpickle here: {summary(error)}")
        what.__cause__ = error
        error = what
    if text and _CAUSE.__get__(error) is None:
        _CAUSE.__set__(error, RemoteTraceback(text))
    elif text:
        add_note(error, text)
    return False, error


def _flatten(first: BaseException) -> list[dict[str, Any]]:
    """The exception and all that it refers to, as a list with places for references.

    No recursion: a chain can be longer than the stack is deep. Causes may form a loop.
    """
    found = [first]
    places = {id(first): 0}

    def place(error: BaseException | None) -> int | None:
        if error is None:
            return None
        if id(error) not in places:
            places[id(error)] = len(found)
            found.append(error)
        return places[id(error)]

    nodes = []
    for error in found:  # it grows meanwhile
        node: dict[str, Any] = {}
        if isinstance(error, BaseExceptionGroup):
            node["members"] = [place(inner) for inner in _MEMBERS.__get__(error)]
        if type(error) in (ExceptionGroup, BaseExceptionGroup):
            node["message"] = str.__str__(_MESSAGE.__get__(error))
        else:
            node["pickled"] = _pickled(error)
        notes = _ATTRIBUTES.__get__(error).get("__notes__")
        found_notes = notes if isinstance(notes, list) else []
        node["notes"] = [str.__str__(note) for note in found_notes if isinstance(note, str)]
        node["summary"] = f"{type(error).__module__}.{summary(error)}"
        node["cause"] = place(_CAUSE.__get__(error))
        node["context"] = place(_CONTEXT.__get__(error))
        node["suppress"] = _SUPPRESS.__get__(error)
        nodes.append(node)
    return nodes


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error, 5)
    except BaseException as broken:
        if _is_for_us(broken):
            raise
        return None


def _build(nodes: list[dict[str, Any]]) -> BaseException:
    made: list[BaseException | None] = [None] * len(nodes)
    # Members of a group come after it in the list, and must be made before it.
    for index in reversed(range(len(nodes))):
        error = made[index] = _make(nodes[index], made)
        if isinstance(error, BaseExceptionGroup):
            # Those that it has are the ones to be completed below.
            members = _MEMBERS.__get__(error)
            for place, member in zip(nodes[index].get("members", []), members, strict=False):
                made[place] = member
    for node, made_error in zip(nodes, made, strict=True):
        assert made_error is not None
        if node["cause"] is not None:
            _CAUSE.__set__(made_error, made[node["cause"]])
        if node["context"] is not None:
            _CONTEXT.__set__(made_error, made[node["context"]])
        _SUPPRESS.__set__(made_error, node["suppress"])
        if node["notes"]:
            _ATTRIBUTES.__get__(made_error)["__notes__"] = node["notes"]
    first = made[0]
    assert first is not None
    return first


def _make(node: dict[str, Any], made: list[BaseException | None]) -> BaseException:
    if "message" in node:
        inner = [made[place] or UnpicklableError("a member of its own group") for place in node["members"]]
        return BaseExceptionGroup(node["message"], inner)
    if node["pickled"] is not None:
        try:
            error = pickle.loads(node["pickled"])
            if isinstance(error, BaseException):
                return error
        except BaseException as broken:
            if _is_for_us(broken):
                raise
            return UnpicklableError(f"{node['summary']} (it does not unpickle here: {summary(broken)})")
    return UnpicklableError(f"{node['summary']} (it cannot be pickled)")
