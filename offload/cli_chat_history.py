"""What was said in ``offload chat``, so that a session can be gone on with another day."""

import hashlib
import json
from pathlib import Path
from typing import Any

from offload.errors import StorageError


class ChatHistory:
    """Conversations by session, one private file each.

    Parameters
    ----------
    folder : Path
        Made, 0700, when the first is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, session: str) -> list[dict[str, Any]]:
        """Return the messages of a session; none if nothing was said.

        Raises
        ------
        StorageError
            There is a file, and it cannot be read.
        """
        path = self._path(session)
        try:
            messages: list[dict[str, Any]] = json.loads(path.read_text())["messages"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"cannot read {path}: {error}") from error
        return messages

    def write(self, session: str, messages: list[dict[str, Any]]) -> None:
        """Keep the messages of a session, in place of what was kept.

        Raises
        ------
        StorageError
            The disk refuses.
        """
        path = self._path(session)
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps({"session": session, "messages": messages}))
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    def _path(self, session: str) -> Path:
        # A name may be anything, and no part of a path.
        return self._folder / f"{hashlib.sha256(session.encode()).hexdigest()[:32]}.json"
