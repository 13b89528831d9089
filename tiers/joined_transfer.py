"""Several transfers as one."""

import time
from collections.abc import Sequence

from offload.errors import OffloadError
from offload.tiers.transfer import Transfer


class JoinedTransfer:
    """Transfers that were started together; it is done when all of them are.

    The first one to fail decides the error; the others are still awaited, so that no thread touches
    the buffers once ``wait`` has returned or raised (a timeout excepted). None is cancelled: one
    might start while another is being cancelled.

    Parameters
    ----------
    transfers : sequence of Transfer
        None at all is over at once.
    """

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self._transfers = list(transfers)

    @property
    def num_bytes(self) -> int:
        """Payload bytes of all."""
        return sum(each.num_bytes for each in self._transfers)

    def done(self) -> bool:  # noqa: D102 - docstring inherited
        return all(each.done() for each in self._transfers)

    def wait(self, timeout_s: float | None = None) -> None:  # noqa: D102 - docstring inherited
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        failure: OffloadError | None = None
        for each in self._transfers:
            try:
                each.wait(None if ends is None else max(0.0, ends - time.monotonic()))
            except TimeoutError:
                raise  # still under way
            except OffloadError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def cancel(self) -> bool:  # noqa: D102 - docstring inherited
        return False
