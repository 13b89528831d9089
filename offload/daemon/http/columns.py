"""Columns of ``HttpStore`` that tell what was said: as they are, or sealed for their row alone."""

import json

from offload.errors import CorruptChunk
from offload.tiers.sealing import Sealer

_PURPOSE = "http"


class Columns:
    """Writes and reads what is in such columns. Any thread.

    Parameters
    ----------
    sealer : Sealer or None
        None: content is stored as it is.
    """

    def __init__(self, sealer: Sealer | None) -> None:
        self._sealer = sealer

    def name(self, digest: str) -> str:
        """Return what stands for a digest of content, which is worth guessing at."""
        if self._sealer is None:
            return digest
        return self._sealer.derive("answer", digest.encode()).hex()

    def hide(self, content: bytes, *where: str) -> bytes:
        """Return bytes as they are stored; ``where`` names table, row and column."""
        if self._sealer is None:
            return content
        return self._sealer.seal(_PURPOSE, content, _context(where))

    def show(self, stored: bytes, *where: str) -> bytes:
        """Undo ``hide``.

        Raises
        ------
        CorruptChunk
            It is not what was stored there.
        """
        if self._sealer is None:
            return stored
        return self._sealer.open(_PURPOSE, stored, _context(where), f"stored {where[0]}")

    def hide_text(self, text: str, *where: str) -> str | bytes:
        """Return a text as it is stored."""
        return text if self._sealer is None else self.hide(text.encode(), *where)

    def show_text(self, stored: str | bytes, *where: str) -> str:
        """Undo ``hide_text``.

        Raises
        ------
        CorruptChunk
            It is not what was stored there.
        """
        if isinstance(stored, str):
            if self._sealer is not None:
                raise CorruptChunk(f"stored {where[0]}: a text that is not sealed")
            return stored
        return self.show(stored, *where).decode()


def _context(where: tuple[str, ...]) -> bytes:
    return json.dumps(where).encode()
