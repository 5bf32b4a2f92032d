"""Objects as cloudpickle sends them: with what in them can't be found by its name. Workers load this too."""

from __future__ import annotations

import _pickle as pickle
from typing import Any, final


@final
class ByValue:
    """Is unpickled as `value`, for which neither the main module nor any other of the program is needed.

    `description` says in words what it is. Large buffers are left out of the pickle, as ever.
    """

    __slots__ = ("_value", "description")

    def __init__(self, value: object, description: str) -> None:
        self._value = value
        self.description = description

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """For the type alone: what a worker calls is the value."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        import cloudpickle  # type: ignore[import-untyped, import-not-found, unused-ignore]

        buffers: list[pickle.PickleBuffer] = []
        data = cloudpickle.dumps(self._value, protocol=5, buffer_callback=buffers.append)
        return _load, (data, *buffers)


def _load(data: bytes, *buffers: Any) -> Any:
    return pickle.loads(data, buffers=buffers)
