"""Responses that are computed while nobody waits."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

from offload.daemon.errors import QueueFull

MAX_RUNNING: Final = 256
_RETRY_AFTER_S: Final = 5.0


class Background:
    """Responses under way, by tenant and id. Used on one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._bodies: dict[tuple[str, str], dict[str, Any]] = {}

    def start(self, tenant: str, body: dict[str, Any], work: Coroutine[Any, Any, None]) -> None:
        """Begin a response.

        Raises
        ------
        QueueFull
            As many are under way as may be.
        """
        if len(self._tasks) >= MAX_RUNNING:
            work.close()
            message = f"{len(self._tasks)} responses run in the background, {MAX_RUNNING} may"
            raise QueueFull(message, _RETRY_AFTER_S)
        key = (tenant, body["id"])
        self._bodies[key] = body
        self._tasks[key] = asyncio.create_task(work)
        self._tasks[key].add_done_callback(lambda _: self._forget(key))

    def find(self, tenant: str, response_id: str) -> dict[str, Any] | None:
        """Return a response that is under way."""
        return self._bodies.get((tenant, response_id))

    async def cancel(self, tenant: str, response_id: str) -> dict[str, Any] | None:
        """End a response, and return what it was; None: it is not under way."""
        body = self._bodies.get((tenant, response_id))
        task = self._tasks.get((tenant, response_id))
        if body is None or task is None:
            return None
        task.cancel()
        await asyncio.wait({task})
        return body | {"status": "cancelled"}

    async def close(self) -> None:
        """End all."""
        tasks = set(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _forget(self, key: tuple[str, str]) -> None:
        self._tasks.pop(key)
        self._bodies.pop(key)
