"""Questions over a socket of this machine: JSONL in, JSONL out, any number of times."""

import json
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from offload.errors import ConfigError
from offload.video.answer_records import Record, to_line
from offload.video.dataset_fields import parse_lines
from offload.video.listening import Address, listen
from offload.video.question_files import question_of
from offload.video.types import Answer, Question

_LOG = logging.getLogger(__name__)

_GRACE_S = 5.0
"""For a thread that was woken to end."""


@dataclass(slots=True)
class _Client:
    number: int
    peer: socket.socket
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_waiting: int = 0
    is_silent: bool = False
    """Whether it has said that it asks no more; it may still want its answers."""


class QuestionSocket:
    """Takes questions from clients, and gives each its answers.

    A client sends a question on a line, with the fields of ``read_questions``, and gets a line for
    each: the fields of an answer, or ``{"id", "error"}``. Ids are its own; inside they are
    ``CLIENT/ID``. Nothing here waits for a client: one that does not read its answers is let go.

    Threads of its own accept and read; one other thread takes and answers.

    Parameters
    ----------
    address : str
        ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``localhost:PORT``, where port 0 is any that is free,
        or ``unix:PATH``.
    max_clients : int
    max_waiting : int
        Questions that nobody has taken yet, of all clients.
    max_line_bytes : int
        A client with a longer line is told, and let go.

    Raises
    ------
    ConfigError
        Others than this machine could reach the address, or it cannot be listened at.
    """

    def __init__(
        self,
        address: str,
        *,
        max_clients: int = 16,
        max_waiting: int = 64,
        max_line_bytes: int = 1 << 16,
    ) -> None:
        self._max_clients = max_clients
        self._max_line_bytes = max_line_bytes
        self._waiting: queue.Queue[Question] = queue.Queue(max_waiting)
        self._clients: dict[int, _Client] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._address = Address.parse(address)
        self._listener = listen(self._address)
        self.address = self._address.of(self._listener)
        """Where it listens, the port included."""
        self._start(self._accept, "offload-questions")

    def take(self) -> Question:
        """Wait for a question, and return it."""
        return self._waiting.get()

    def take_all(self) -> Iterator[Question]:
        """Yield the questions that have come by now."""
        with suppress(queue.Empty):
            while True:
                yield self._waiting.get_nowait()

    def give(self, answer: Answer, **facts: str | None) -> None:
        """Send an answer to whoever asked; ``facts`` are those of ``Record``."""
        name = _own_name(answer.question)
        own = replace(answer, question=replace(answer.question, id=name))
        self._end(answer.question, to_line(Record(own, **facts)))

    def refuse(self, question: Question, reason: str) -> None:
        """Say that there will be no answer."""
        self._end(question, _error(_own_name(question), reason))

    def close(self, reason: str = "no more questions are answered") -> None:
        """Refuse what waits, let go of all clients, and end the threads. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close alone does not wake who accepts
        self._listener.close()
        self._address.remove()
        for question in self.take_all():
            self.refuse(question, reason)
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            with suppress(OSError):
                client.peer.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(_GRACE_S)
        for client in clients:
            client.peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, question: Question, line: bytes) -> None:
        """Send the last line about a question, if whoever asked is still there."""
        with self._lock:
            client = self._clients.get(int(question.id.partition("/")[0]))
        if client is not None:
            self._send(client, line)
            self._let_go(client, num_answered=1)

    def _let_go(self, client: _Client, *, num_answered: int = 0) -> None:
        """Close the connection to a client that asks no more and has all its answers."""
        with self._lock:
            client.num_waiting -= num_answered
            if not client.is_silent or client.num_waiting:
                return
            self._clients.pop(client.number, None)
        client.peer.close()

    def _start(self, target: Any, name: str, *args: Any) -> None:
        thread = threading.Thread(target=target, name=name, args=args, daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        while not self._is_closed:
            try:
                peer, _ = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    _LOG.warning("%s: a client could not be accepted: %s", self.address, error)
                continue
            number += 1
            client = _Client(number, peer)
            with self._lock:
                is_full = len(self._clients) >= self._max_clients
                if not is_full:
                    self._clients[number] = client
            if is_full:
                self._send(client, _error(None, f"{self._max_clients} clients are connected"))
                peer.close()
            else:
                self._start(self._serve, f"{threading.current_thread().name}-{number}", client)

    def _serve(self, client: _Client) -> None:
        """Read the lines of a client until it ends."""
        limit, count = self._max_line_bytes, 0
        try:
            with client.peer.makefile("rb") as lines, suppress(OSError):
                while line := lines.readline(limit + 1):
                    if len(line) > limit:
                        self._send(client, _error(None, f"a line has more than {limit} bytes"))
                        return
                    if line.strip():
                        count += 1
                        self._enqueue(client, line, f"q{count}")
        finally:
            client.is_silent = True
            self._let_go(client)

    def _enqueue(self, client: _Client, line: bytes, name: str) -> None:
        try:
            [entry] = parse_lines(line.decode(), "this line")
            name = entry.text("id") if entry.has("id") else name
            question = question_of(entry, f"{client.number}/{name}")
            with self._lock:
                self._waiting.put_nowait(question)
                client.num_waiting += 1
        except (ConfigError, UnicodeDecodeError) as error:
            self._send(client, _error(name, str(error)))
        except queue.Full:
            reason = f"{self._waiting.maxsize} questions wait already; ask again later"
            self._send(client, _error(name, reason))

    def _send(self, client: _Client, line: bytes) -> None:
        """Send a line whole and at once, or let go of who does not take it."""
        with client.lock, suppress(OSError):
            sent = 0
            with suppress(BlockingIOError):
                sent = client.peer.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            if sent < len(line):
                _LOG.warning("%s: client %d does not read", self.address, client.number)
                client.peer.shutdown(socket.SHUT_RDWR)


def _own_name(question: Question) -> str:
    return question.id.partition("/")[2]


def _error(name: str | None, reason: str) -> bytes:
    return json.dumps({"id": name, "error": reason}, ensure_ascii=False).encode() + b"\n"
