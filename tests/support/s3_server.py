"""A real S3 API on this machine: moto's server, one request at a time, in a process of its own."""

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

BUCKET = "bucket"

# Requests take turns: moto looks whether an object exists and then writes it, which S3 does in one.
_SERVER = """
import logging, sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
def one_at_a_time(environ, start_response):
    with turn:
        return list(app(environ, start_response))
server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
print(server.server_port, flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run a server with one empty bucket; yields its port. It ends with its standard input."""
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
            urllib.request.urlopen(make, timeout=30).close()
            yield port
        finally:
            server.stdin.close()
            server.wait(30)


def s3_options(port: int) -> dict[str, object]:
    """Return what ``Bucket`` needs to reach a server on this machine."""
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": "AKIAEXAMPLE",
        "secret_access_key": "a-secret-that-no-message-shows",
        "client_options": {"allow_http": True},
    }
