"""Modules that are made use of only where they are loaded already. Workers load this too, so it imports
nothing that it can do without."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def loaded(name: str) -> Any:
    """The module of that name, or `None`: also while it is being loaded.

    Another thread may be at that just now; then `sys.modules` has a module that lacks most of itself, and
    nobody has made anything of it yet.
    """
    return None if is_being_loaded(name) else sys.modules.get(name)


def is_being_loaded(name: str) -> bool:
    """Whether somebody is in the middle of that, as the import system sees it itself."""
    # A stand-in for a module need not have a specification.
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)
