"""Exceptions over a border: packed with their causes, notes and traceback text, unpacked as the same
types where those can be unpickled, and as a stand-in that says so where not."""

from __future__ import annotations

import pickle
import traceback
from typing import Any


class UnpicklableError(Exception):
    """Stands in for an exception that could not be brought over: its type's name and its text."""


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
    nodes: list[dict[str, Any]] = []
    _add(error, nodes, {})
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as broken:
        text = f"<the traceback of {summary(error)} could not be formatted: {summary(broken)}>"
    return pickle.dumps((nodes, text), 5)


def load(payload: bytes, *, raised: bool) -> tuple[bool, Any]:
    """Unpacks what a worker ended with.

    Returns:
        `(True, value)`, or `(False, (exception, traceback text))`.
    """
    try:
        content = pickle.loads(payload)
        if not raised:
            return True, content
        nodes, text = content
        return False, (_build(nodes), text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a worker's result must not end the program that looks at it
        error.add_note("raised while the worker's result was unpickled here")
        return False, (error, "")


def _add(error: BaseException | None, nodes: list[dict[str, Any]], known: dict[int, int]) -> int | None:
    """Adds an exception to the list, and returns its place. Causes may form a loop."""
    if error is None:
        return None
    if id(error) in known:
        return known[id(error)]
    index = known[id(error)] = len(nodes)
    node: dict[str, Any] = {}
    nodes.append(node)
    is_group = type(error) in (ExceptionGroup, BaseExceptionGroup)
    if is_group:
        assert isinstance(error, BaseExceptionGroup)
        node["group"] = (error.message, [_add(inner, nodes, known) for inner in error.exceptions])
    node["pickled"] = None if is_group else _pickled(error)
    node["summary"] = f"{type(error).__module__}.{summary(error)}"
    node["notes"] = [note for note in getattr(error, "__notes__", []) if isinstance(note, str)]
    node["cause"] = _add(error.__cause__, nodes, known)
    node["context"] = _add(error.__context__, nodes, known)
    node["suppress"] = error.__suppress_context__
    return index


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error, 5)
    except Exception:
        return None


def _build(nodes: list[dict[str, Any]]) -> BaseException:
    made: list[BaseException | None] = [None] * len(nodes)
    # Members of a group come after it in the list, and must be made before it.
    for index in reversed(range(len(nodes))):
        made[index] = _make(nodes[index], made)
    for node, error in zip(nodes, made, strict=True):
        assert error is not None
        if node["cause"] is not None:
            error.__cause__ = made[node["cause"]]
        if node["context"] is not None:
            error.__context__ = made[node["context"]]
        error.__suppress_context__ = node["suppress"]
        if node["notes"]:
            error.__notes__ = node["notes"]
    first = made[0]
    assert first is not None
    return first


def _make(node: dict[str, Any], made: list[BaseException | None]) -> BaseException:
    if "group" in node:
        message, members = node["group"]
        inner = [made[member] or UnpicklableError("a member of its own group") for member in members]
        return BaseExceptionGroup(message, inner)
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
