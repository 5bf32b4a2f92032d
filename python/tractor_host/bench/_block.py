"""What `bench share` and `bench calls` send, and have workers do. Workers import it, whoever started them."""

from __future__ import annotations

import pickle
from typing import Any


class Block:
    """Bytes that pickle as a numpy array does: out of band, where there is a way for that."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Block, (pickle.PickleBuffer(self.data),)

    def read(self) -> int:
        """Reads a byte of every page; how many there were."""
        return len(memoryview(self.data)[::4096].tobytes())


def there(block: Any) -> int:
    """Takes a block, or a shared one, and reads it."""
    return int((block if isinstance(block, Block) else block.get()).read())


def there_and_back(block: Block) -> Block:
    """Takes a block, reads it, and gives it back."""
    block.read()
    return block


def same(value: Any) -> Any:
    """Takes anything, reads it if it is a block, and gives it back."""
    return there_and_back(value) if isinstance(value, Block) else value


async def same_in_loop(value: Any) -> Any:
    """The same, in an event loop."""
    return same(value)


def over_pipe(pipe: Any) -> None:
    """A `multiprocessing` worker for one call."""
    function, block = pipe.recv()
    pipe.send(function(block))
    pipe.close()
