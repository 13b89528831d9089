"""A copy in flight, and the simplest ways to have one."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Protocol

from offload.errors import TransferCancelled, TransferTimeout


class Transfer(Protocol):
    """A copy in flight. Waiting returns or raises; a failure is never a value.

    Any thread may call any method. Until ``done`` is true the buffers of the transfer belong to it.
    """

    @property
    def num_bytes(self) -> int:
        """Payload bytes that this transfer moves."""
        ...

    def done(self) -> bool:
        """Whether the transfer has ended, well or badly. Never blocks."""
        ...

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the transfer ends.

        Raises
        ------
        TransferTimeout
            Not done within ``timeout_s``. The transfer goes on.
        TransferCancelled, StorageError
            The transfer ended without moving the data.
        """
        ...

    def cancel(self) -> bool:
        """Give the transfer up, unless any of it has started.

        Returns
        -------
        bool
            True: nothing was or will be moved, and ``wait`` raises TransferCancelled.
            False: nothing has changed, the transfer goes on to its end.
        """
        ...


class CompletedTransfer:
    """A transfer that was over when it was handed out."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def done(self) -> bool:  # noqa: D102 - docstring inherited
        return True

    def wait(self, timeout_s: float | None = None) -> None:  # noqa: D102 - docstring inherited
        return

    def cancel(self) -> bool:  # noqa: D102 - docstring inherited
        return False


class FutureTransfer:
    """A transfer made of jobs on a thread pool; it is done when all of them are.

    Parameters
    ----------
    what : str
        Names the transfer in the message of a missed deadline.
    num_bytes : int
        Payload bytes.
    futures : list of Future
        The jobs. The first one to fail decides the error; the others are still awaited, so that
        no thread touches the buffers once ``wait`` has returned or raised (a timeout excepted).
    finish : callable, optional
        Runs once, in the first ``wait`` that sees every job done, whether or not one failed.
    withdraw : callable, optional
        Cancels all of the jobs or none; True if it did. Without it, several jobs cannot be
        cancelled, because one might start while another is being cancelled.
    """

    def __init__(
        self,
        what: str,
        num_bytes: int,
        futures: list[Future[None]],
        finish: Callable[[], None] | None = None,
        *,
        withdraw: Callable[[Sequence[Future[None]]], bool] | None = None,
    ) -> None:
        self.what = what
        self.num_bytes = num_bytes
        self._futures = futures
        self._finish = finish
        self._withdraw = withdraw or _cancel_only_job

    def done(self) -> bool:  # noqa: D102 - docstring inherited
        return all(future.done() for future in self._futures)

    def wait(self, timeout_s: float | None = None) -> None:  # noqa: D102 - docstring inherited
        # Done includes cancelled, which ``wait`` sees only when a thread comes across the job.
        _, pending = wait([job for job in self._futures if not job.done()], timeout=timeout_s)
        if pending:
            raise TransferTimeout(
                f"{self.what}: not done after {timeout_s} s "
                f"({len(pending)} of {len(self._futures)} jobs left, {self.num_bytes} bytes in all)"
            )
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        if any(future.cancelled() for future in self._futures):
            raise TransferCancelled(f"{self.what}: cancelled")
        for future in self._futures:
            future.result()

    def cancel(self) -> bool:  # noqa: D102 - docstring inherited
        return bool(self._futures) and self._withdraw(self._futures)


def _cancel_only_job(futures: Sequence[Future[None]]) -> bool:
    return len(futures) == 1 and futures[0].cancel()
