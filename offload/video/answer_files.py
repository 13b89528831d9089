"""Files of answers: one JSON object on a line, appended as they come, resumed after a crash."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from offload.errors import ClosedError, ConfigError, StorageError
from offload.video.answer_records import Record, from_object, to_line
from offload.video.dataset_fields import parse_lines
from offload.video.types import Answer

_FIRST_BYTES = b'{"id": "'


class AnswerFile:
    """A file that answers are appended to, by one process at a time.

    Invariant: every line is a whole answer. An append that fails is taken back; what a crash has
    left of a line is cut off when the file is opened again. Not for several threads.

    Parameters
    ----------
    path : Path
        Made if it is not there, in a folder that is.
    sync : bool
        Make every answer survive a power cut, not only the end of the process.

    Raises
    ------
    ConfigError
        The file cannot be written, another process has it open, or it is no file of answers, in
        which case it is left as it is.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = path
        self._sync = sync
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise ConfigError(f"answers cannot be written to {path}: {error.strerror}") from error
        try:
            self._done = self._resume()
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> frozenset[str]:
        """Ids of the questions that have an answer in the file."""
        return frozenset(self._done)

    def append(
        self, answer: Answer, *, video_id: str | None = None, task: str | None = None
    ) -> None:
        """Write an answer; when this returns it is in the file.

        Raises
        ------
        DiskFull, StorageError
            The file is as it was.
        ClosedError
        """
        if self._fd < 0:
            raise ClosedError(f"{self.path} was closed before the answer to {answer.question.id!r}")
        self._write(to_line(Record(answer, video_id, task)))
        self._done.add(answer.question.id)

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _resume(self) -> set[str]:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is writing answers to {self.path}") from error
        content = self.path.read_bytes()
        whole, rest = _split(content, self.path)
        records = _parse(whole, self.path)
        if rest:
            os.ftruncate(self._fd, len(content) - len(rest))
        elif whole and not whole.endswith(b"\n"):
            self._write(b"\n")
        return {record.answer.question.id for record in records}

    def _write(self, content: bytes) -> None:
        size = os.fstat(self._fd).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            if self._sync:
                os.fsync(self._fd)
        except BaseException as error:
            os.ftruncate(self._fd, size)
            if isinstance(error, OSError):
                raise self._failure(error, len(content)) from error
            raise

    def _failure(self, error: OSError, num_bytes: int) -> StorageError:
        # Brings torch, which a scorer of answers does without.
        from offload.tiers.syscalls import as_storage_error

        return as_storage_error(error, f"write of {num_bytes} bytes to {self.path}")


def read_answers(path: Path) -> list[Record]:
    """Return what a file of answers has; a torn last line is left out, and left where it is.

    Of several answers to a question all are there, in the order of the file.

    Raises
    ------
    ConfigError
        The file cannot be read, or is no file of answers: names file, line and field.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(_split(content, path)[0], path)


def answers_by_id(records: Iterable[Record]) -> dict[str, Answer]:
    """Return answers by the id of their question; of several the last."""
    return {record.answer.question.id: record.answer for record in records}


def _split(content: bytes, path: Path) -> tuple[bytes, bytes]:
    """Return the whole lines and what there is of a torn one."""
    end = content.rfind(b"\n") + 1
    rest = content[end:]
    try:
        # Of an object only the whole is JSON, so nothing but its newline is missing.
        json.loads(rest)
    except ValueError:
        torn = rest.rstrip(b"\0")  # a power cut may leave zeros
        if not _FIRST_BYTES.startswith(torn[: len(_FIRST_BYTES)]):
            raise ConfigError(f"{path} is no file of answers: it ends with {rest[:40]!r}") from None
        return content[:end], rest
    return content, b""


def _parse(whole: bytes, path: Path) -> list[Record]:
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start} is {error.reason}") from error
    return [from_object(fields) for fields in parse_lines(text, str(path))]
