"""Exceptions over a border: packed with their causes, notes and traceback text, unpacked as the same
types where those can be unpickled, and as a stand-in that says so where not."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

from tractor_host._parcel import unpack


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
    except Exception as broken:
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
    except Exception as broken:
        text = f"<the traceback of {summary(error)} could not be formatted: {summary(broken)}>"
    return pickle.dumps((nodes, text), 5)


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a worker's result must not end the program that looks at it
        error.add_note("raised while the worker's result was unpickled here")
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
    if text and error.__cause__ is None:
        error.__cause__ = RemoteTraceback(text)
    elif text:
        error.add_note(text)
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
            node["members"] = [place(inner) for inner in error.exceptions]
        if type(error) in (ExceptionGroup, BaseExceptionGroup):
            assert isinstance(error, BaseExceptionGroup)
            node["message"] = error.message
        else:
            node["pickled"] = _pickled(error)
        notes = getattr(error, "__notes__", None)
        node["notes"] = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
        node["summary"] = f"{type(error).__module__}.{summary(error)}"
        node["cause"] = place(error.__cause__)
        node["context"] = place(error.__context__)
        node["suppress"] = error.__suppress_context__
        nodes.append(node)
    return nodes


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error, 5)
    except Exception:
        return None


def _build(nodes: list[dict[str, Any]]) -> BaseException:
    made: list[BaseException | None] = [None] * len(nodes)
    # Members of a group come after it in the list, and must be made before it.
    for index in reversed(range(len(nodes))):
        error = made[index] = _make(nodes[index], made)
        if isinstance(error, BaseExceptionGroup):
            # Those that it has are the ones to be completed below.
            for place, member in zip(nodes[index].get("members", []), error.exceptions, strict=False):
                made[place] = member
    for node, made_error in zip(nodes, made, strict=True):
        assert made_error is not None
        if node["cause"] is not None:
            made_error.__cause__ = made[node["cause"]]
        if node["context"] is not None:
            made_error.__context__ = made[node["context"]]
        made_error.__suppress_context__ = node["suppress"]
        if node["notes"]:
            made_error.__notes__ = node["notes"]
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
        except KeyboardInterrupt:
            raise
        except BaseException as broken:
            return UnpicklableError(f"{node['summary']} (it does not unpickle here: {summary(broken)})")
    return UnpicklableError(f"{node['summary']} (it cannot be pickled)")
