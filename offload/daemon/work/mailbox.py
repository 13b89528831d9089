"""How what the engine's thread makes reaches the event loop that waits for it."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Mailbox(Generic[T]):
    """A queue that one thread fills and one task of an event loop empties.

    Made by that task. ``put`` never waits; who fills it looks at ``backlog`` and stops in time.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._filled = asyncio.Event()
        self._is_woken = False

        self._is_closed = False

    @property
    def backlog(self) -> int:
        """Items that wait to be taken."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item, from any thread. One that nobody can take any more is dropped."""
        if self._is_closed:
            return
        self._items.append(item)
        if self._is_woken:
            return  # by the item before, which has not been seen yet
        self._is_woken = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop has been closed
            self.close()

    def close(self) -> None:
        """Drop what there is, and what comes. Any thread may call."""
        self._is_closed = True
        self._items.clear()

    async def take(self) -> T:
        """Return the oldest item, waiting for one."""
        while not self._items:
            self._filled.clear()
            # One may have come between the two lines above; its ``set`` is still to run.
            if not self._items:
                await self._filled.wait()
        return self._items.popleft()

    def _wake(self) -> None:
        self._is_woken = False
        self._filled.set()


async def ask(post: Callable[[Callable[[], object]], None], job: Callable[..., R], *args: Any) -> R:
    """Have the thread behind ``post`` run a job; return its result, or raise its error."""
    answer: Mailbox[tuple[R | None, BaseException | None]] = Mailbox()

    def run() -> None:
        try:
            answer.put((job(*args), None))
        except Exception as error:
            answer.put((None, error))

    post(run)
    result, error = await answer.take()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
