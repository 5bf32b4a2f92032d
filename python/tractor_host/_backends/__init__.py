"""One file an event loop: the only ones that name it."""
