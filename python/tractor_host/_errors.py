"""One exception per blame. Imports nothing: workers load it too."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tractor_host._worker import Exit


class WorkerError(Exception):
    """The result of a worker is not to be had. `exit` says how the worker ended."""

    exit: Exit

    def __init__(self, message: str, exit: Exit) -> None:
        super().__init__(message)
        self.exit = exit

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (*self.args, self.exit), self.__dict__)


class RemoteError(WorkerError):
    """The worker's target raised; the exception itself is `__cause__`.

    You do not get it when the worker died or was killed: then nobody raised anything.
    """

    #: The traceback in the worker, as text.
    traceback: str

    def __init__(self, message: str, exit: Exit, traceback: str = "") -> None:
        super().__init__(message, exit)
        self.traceback = traceback

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (*self.args, self.exit, self.traceback), self.__dict__)

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\n{self.traceback}" if self.traceback else text


class WorkerDied(WorkerError):
    """The worker ended without a result and nobody had asked for that: a crash, a signal, an exit code."""


class WorkerKilled(WorkerError):
    """The worker was ended on request: by `kill()`, its timeout, or the end of the program."""


class WorkerCancelled(WorkerKilled):
    """The worker was asked to stop, and stopped cleanly."""


class TaskTimeout(WorkerKilled, TimeoutError):
    """The task of a pool took longer than it may; its worker was ended."""


class BootTimeout(WorkerKilled, TimeoutError):
    """An actor was not ready in time, and was ended."""


class WorkerAbandoned(WorkerKilled):
    """The worker was to be ended and could not be."""


class Cancelled(BaseException):
    """Raised in a sync target that is cancelled, so that its `finally` blocks run.

    A `BaseException`, so that `except Exception` lets it through.
    """


def add_note(error: BaseException, note: str) -> None:
    """As the method of that name, and runs nothing of the exception's own, which may be frozen or raise."""
    attributes = _attributes(error)
    notes = attributes.get("__notes__")
    attributes["__notes__"] = [*notes, note] if isinstance(notes, list) else [note]


_attributes = BaseException.__dict__["__dict__"].__get__
