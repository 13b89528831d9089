"""A proxy on this machine that does to requests what networks and object stores do."""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WAIT_S = 30.0

_REFUSALS = {
    "slow down": (503, "SlowDown"),
    "internal error": (500, "InternalError"),
    "expired": (403, "ExpiredToken"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "denied": (403, "AccessDenied"),
    "conflict": (409, "ConditionalRequestConflict"),
}


class FaultyProxy:
    """Passes requests on to a port of this machine, except those that a fault strikes.

    Faults: those of ``_REFUSALS``; ``cut`` passes half of the answer's body on; ``lost`` passes the
    request on and no answer; ``flip`` flips a bit in the middle of the answer; ``hang`` answers
    nothing until the proxy ends.

    Attributes
    ----------
    requests : list of str
        Method and path of each, in the order of arrival.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.requests: list[str] = []
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._faults: list[tuple[str, str, int]] = []

    def strike(self, fault: str, times: int, where: str = "") -> None:
        """Let the next requests suffer whose method and path contain ``where``."""
        with self._lock:
            self._faults.append((fault, where, times))

    def relent(self) -> None:
        """Forget the faults that have not struck."""
        with self._lock:
            self._faults.clear()

    def fault_of(self, request: str) -> str | None:
        """Note a request, and return the fault that strikes it."""
        with self._lock:
            self.requests.append(request)
            for number, (fault, where, times) in enumerate(self._faults):
                if where in request:
                    self._faults[number] = (fault, where, times - 1)
                    if times == 1:
                        del self._faults[number]
                    return fault
        return None


@contextlib.contextmanager
def faulty_proxy(upstream: int) -> Iterator[tuple[FaultyProxy, int]]:
    """Run a proxy; yields it and its port."""
    proxy = FaultyProxy(upstream)

    class Handler(_Handler):
        rules = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield proxy, server.server_port
    finally:
        proxy.ending.set()
        server.shutdown()
        thread.join(WAIT_S)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    rules: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.rules.fault_of(f"{self.command} {self.path}")
        self.close_connection = True
        if fault == "hang":
            assert self.rules.ending.wait(WAIT_S)
        elif fault in _REFUSALS:
            status, code = _REFUSALS[fault]
            self._answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
        else:
            self._pass_on(body, fault)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.rules.upstream, timeout=WAIT_S)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault == "lost":
            return
        if fault == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        kept = content[: len(content) // 2] if fault == "cut" else content
        self._answer(answer.status, dict(answer.getheaders()), kept, len(content))

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, num_bytes: int | None = None
    ) -> None:
        self.send_response(status)
        dropped = {"content-length", "connection", "transfer-encoding", "server", "date"}
        for name, value in headers.items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("content-length", length or str(num_bytes or len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked may have gone
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve
