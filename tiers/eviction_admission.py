"""Which chunks are worth moving up: those that are read a second time."""

from collections import OrderedDict
from collections.abc import Iterable

from offload.errors import ConfigError
from offload.types import ChunkId


class SecondHit:
    """Lets a chunk up once it was read in two steps that are close to each other.

    Most chunks that are read from below are not read again soon; each of them would cost a copy up
    and push another one down. Remembers what was read in the last ``window_steps`` steps, nothing
    more. Not thread-safe.

    Parameters
    ----------
    window_steps : int
        Steps between the two reads, at most. 0: everything is let up at once.

    Raises
    ------
    ConfigError
        ``window_steps`` is negative.
    """

    def __init__(self, window_steps: int = 8) -> None:
        if window_steps < 0:
            raise ConfigError(f"two reads cannot be {window_steps} steps apart")
        self._window_steps = window_steps
        self._step = 0
        self._last_read: OrderedDict[ChunkId, int] = OrderedDict()

    def admit(self, chunks: Iterable[ChunkId]) -> list[ChunkId]:
        """Return those to move up, in the order given; called once a step.

        Parameters
        ----------
        chunks : iterable of ChunkId
            What was read from the tiers below in this step, each chunk once.
        """
        self._step += 1
        oldest = self._step - self._window_steps
        while self._last_read and next(iter(self._last_read.values())) < oldest:
            self._last_read.popitem(last=False)
        if self._window_steps == 0:
            return list(chunks)
        admitted = []
        for chunk in chunks:
            if self._last_read.pop(chunk, None) is not None:
                admitted.append(chunk)
            else:
                self._last_read[chunk] = self._step
        return admitted
