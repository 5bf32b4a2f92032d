"""Ctrl-C for a program in a subinterpreter: how KeyboardInterrupt is to rise in its main thread.

Run in that interpreter by a thread of the launcher, in a namespace of its own; `interrupt.rs` embeds
this file and calls `prepare`. An exception that is thrown into an event loop's own code breaks the
loop, and one that waits for events does not see it at all: so a loop is asked to raise it itself.
"""

import sys


def prepare(main_thread, delivered):
    """Prepares for KeyboardInterrupt in the thread with the ident `main_thread`.

    Args:
        main_thread: The ident.
        delivered: Called there when the program reacts.

    Returns:
        The class to raise there, and whether a loop that runs there has been asked to do it.
    """

    class Interrupt(KeyboardInterrupt):
        # What is raised is a plain KeyboardInterrupt; making it tells that it has arrived.
        def __new__(cls):
            delivered()
            return KeyboardInterrupt()

    try:
        asked = ask_loop(sys._current_frames().get(main_thread), delivered)
    except Exception:  # a loop of another version, or one that ends just now
        asked = False
    return Interrupt, asked


def ask_loop(frame, delivered):
    """Looks for the innermost event loop among the frames and asks it; whether there is one."""
    bare = None
    while frame is not None:
        place = frame.f_globals.get("__name__"), frame.f_code.co_qualname
        if place == ("trio._core._run", "run"):
            return ask_trio(frame.f_locals["runner"], delivered)
        if place == ("asyncio.runners", "Runner.run"):
            return ask_asyncio(frame.f_locals["self"], frame.f_locals["task"], delivered)
        if place == ("asyncio.base_events", "BaseEventLoop.run_forever"):
            bare = frame.f_locals["self"]  # most probably of a Runner
        frame = frame.f_back
    return bare is not None and ask_bare_asyncio(bare, delivered)


def ask_trio(runner, delivered):
    """As trio's own signal handler does while trio's code runs."""
    runner.entry_queue.run_sync_soon(delivered)
    runner.deliver_ki()
    return True


def ask_asyncio(runner, task, delivered):
    """As the signal handler does that `asyncio.run` installs where it can."""

    def interrupt():
        delivered()
        runner._on_sigint(2, None, main_task=task)

    runner.get_loop().call_soon_threadsafe(interrupt)
    return True


def ask_bare_asyncio(loop, delivered):
    """As the default signal handler does: KeyboardInterrupt out of `run_forever`."""

    def interrupt():
        delivered()
        raise KeyboardInterrupt

    loop.call_soon_threadsafe(interrupt)
    return True
