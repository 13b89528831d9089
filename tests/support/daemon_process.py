"""A real ``offload serve`` in a process of its own, on a free port of loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

START_S = 90.0
"""Longest wait for a process to load the model, on a machine that others use too."""

_FROM_RAY = re.compile(r"^\x1b?\S*\((?P<who>\S+) pid=(?P<pid>\d+)\)\S* (?P<line>\{.*)")
"""What Ray writes before the lines of its processes."""

Line = dict[str, Any]


class DaemonProcess:
    """Runs until the block ends, whatever happens in it; then no process is left.

    Parameters
    ----------
    data_path : Path
        Also where a Unix socket goes.
    *options : str
        Of ``offload serve``.
    env : mapping of str to str, optional
        Next to the process's own.
    python : str
        Interpreter.
    start_s : float
        Longest wait for it to serve.

    Attributes
    ----------
    log : list of dict
        What it has logged, line by line; text that is no JSON as ``{"text": …}``, lines of other
        processes that Ray passes on with their ``pid``.
    """

    def __init__(
        self,
        data_path: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        start_s: float = START_S,
    ) -> None:
        self.log: list[Line] = []
        self._start_s = start_s
        self._changed = threading.Condition()
        self._is_over = False
        self._process = subprocess.Popen(
            [
                *(python, "-m", "offload.cli", "serve", "--port", "0"),
                *("--data-path", str(data_path), "--set", "model.threads=1", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, name="offload-daemon-log")
        self._reader.start()

    def __enter__(self) -> Self:
        try:
            self.address = str(self.wait_for_event("serving", self._start_s)["address"])
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, key: str | None = None, timeout_s: float = 60.0) -> httpx.Client:
        """Return a client that the caller closes."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        path = self.address.removeprefix("unix:")
        if path != self.address:
            transport = httpx.HTTPTransport(uds=path)
            return httpx.Client(
                transport=transport, base_url="http://localhost", headers=headers, timeout=timeout_s
            )
        return httpx.Client(base_url=self.address, headers=headers, timeout=timeout_s)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_for_event(self, event: str, timeout_s: float = 30.0) -> Line:
        """Return the first line of that event, waiting for it if need be."""
        return self.wait_for(lambda line: line.get("event") == event, timeout_s)

    def wait_for(self, is_wanted: Callable[[Line], bool], timeout_s: float = 30.0) -> Line:
        """Return the first line that is wanted, waiting for it if need be."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or any(map(is_wanted, self.log)), timeout_s
            )
            lines = [line for line in self.log if is_wanted(line)]
            assert lines, f"not in the log after {timeout_s} s: {self.log[-20:]}"
            return lines[0]

    def join(self, timeout_s: float = 60.0) -> int:
        """Wait until the process has ended, and return its status."""
        status = self._process.wait(timeout_s)
        self._reader.join()
        return status

    def kill(self) -> None:
        """End the process as a crash would. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self.join()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for text in self._process.stderr:
            line = _parsed(text)
            with self._changed:
                self.log.append(line)
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def _parsed(text: str) -> Line:
    found = _FROM_RAY.match(text)
    try:
        line: Line = json.loads(text if found is None else found["line"])
    except ValueError:
        return {"text": text}
    return line if found is None else line | {"pid": int(found["pid"])}


def chat_body(text: str, session: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a request of one user message; greedy and short unless told otherwise."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "temperature": 0}
    body |= {"max_tokens": 8} if session is None else {"max_tokens": 8, "session_id": session}
    return body | fields
