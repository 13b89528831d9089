"""Cameras for tests: one sends files to whoever connects when it is told to, one publishes RTSP.

They are processes, since libav and a sender in threads of one process have been seen to wait for
each other. Orders are lines on standard input, carried out one after the other.
"""

import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self


class Camera:
    """Starts the process and gives it orders, none of which waits. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.live_video"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout is not None
        self.url = f"tcp://127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def accept(self) -> None:
        """Wait for somebody to connect."""
        self._order("accept")

    def send(self, path: Path) -> None:
        """Send a file to them."""
        self._order(f"send {path}")

    def hang_up(self) -> None:
        """Close the connection, as at the end of a stream."""
        self._order("hang_up")

    def break_off(self) -> None:
        """Reset the connection, as when a machine fails."""
        self._order("break_off")

    def go_away(self) -> None:
        """Refuse connections from now on."""
        self._order("go_away")

    def serve(self, path: Path) -> None:
        """Send a file to everybody who connects from now on; this is the last order."""
        self._order(f"serve {path}")

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def _serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        peer = socket.socket()
        for line in sys.stdin:
            order, _, argument = line.strip().partition(" ")
            if order == "accept":
                peer, _ = listener.accept()
            elif order == "send":
                peer.sendall(Path(argument).read_bytes())
            elif order == "hang_up":
                # To close with something unread would reset the connection.
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
                peer.close()
            elif order == "break_off":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.close()
            elif order == "serve":
                _serve_everybody(listener, Path(argument).read_bytes())
            else:
                listener.close()


def _serve_everybody(listener: socket.socket, content: bytes) -> None:
    peers = []
    while True:
        peer, _ = listener.accept()
        # Whoever has given up in the meantime is not there to take it.
        with contextlib.suppress(ConnectionError):
            peer.sendall(content)
        peers.append(peer)


@contextlib.contextmanager
def publisher(path: Path, url: str) -> Iterator[None]:
    """Publish a video by RTSP, once, as soon as somebody listens at the address."""
    command = [sys.executable, "-m", "tests.support.live_video", str(path), url]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        try:
            yield
        finally:
            process.kill()


def _publish(path: str, url: str) -> None:
    import av

    with av.open(path) as video:
        while True:
            container = av.open(url, "w", format="rtsp", options={"rtsp_transport": "tcp"})
            stream = container.add_stream_from_template(video.streams.video[0])
            with contextlib.suppress(av.ConnectionRefusedError):
                container.start_encoding()
                break
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
        container.close()


if __name__ == "__main__":
    _publish(*sys.argv[1:]) if sys.argv[1:] else _serve()
