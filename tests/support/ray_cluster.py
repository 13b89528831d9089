"""``offload serve --ray`` with two replicas on this machine, and what can be seen of it."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml  # type: ignore[import-untyped]

from tests.support.daemon_process import DaemonProcess, Line

PYTHON = os.environ.get("OFFLOAD_TEST_RAY", "")
"""An interpreter that has Ray Serve and what the daemon needs; none: these tests are skipped."""

LEASE_S = 2
"""How long a session waits that a dead replica was writing."""

_SIZES = ("device", "64MiB"), ("host", "128MiB"), ("disk", "512MiB")


@dataclass
class Cluster:
    """Two replicas behind Serve.

    Attributes
    ----------
    daemon : DaemonProcess
        The process that started Ray.
    folder : Path
        Short, because Ray has sockets in it.
    config : Path
    """

    daemon: DaemonProcess
    folder: Path
    config: Path

    @property
    def data_path(self) -> Path:
        return self.folder / "data"

    def replica(self, number: int) -> httpx.Client:
        """Return a client of one replica's own socket, that the caller closes."""
        socket = self.data_path / f"replica-{number}" / "daemon.sock"
        transport = httpx.HTTPTransport(uds=str(socket))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=60)

    def requests(self, session: str) -> list[Line]:
        """Return what the replicas have logged of a session's requests."""
        lines = [line for line in self.daemon.log if line.get("event") == "request"]
        return [line for line in lines if line.get("session") == session]

    def pid_of(self, session: str) -> int:
        """Return the process that answered a session last."""

        def is_answered(line: Line) -> bool:
            return line.get("event") == "request" and line.get("session") == session

        self.daemon.wait_for(is_answered)
        return int(self.requests(session)[-1]["pid"])

    def slot_of(self, session: str) -> int:
        """Return the number of the replica that answered a session last."""
        pid = self.pid_of(session)
        lines = [line for line in self.daemon.log if line.get("pid") == pid]
        return int(next(line["slot"] for line in lines if line["event"] == "replica serving"))

    def wait_for_new(self, event: str, seen: int) -> Line:
        """Return the first line of an event after ``seen`` others, waiting for it."""
        return self.daemon.wait_for(
            lambda line: line.get("event") == event and self.daemon.log.index(line) >= seen, 120
        )

    def configure(self, **changes: Any) -> None:
        """Write the file of the configuration anew."""
        self.config.write_text(yaml.safe_dump(_values(self.folder) | changes))

    def redeploy(self) -> None:
        """Replace both replicas, one after the other, as a new version would."""
        arguments = {"config": str(self.config), "replicas": 2, "cpus": 0.5}
        arguments["set"] = {"data_path": str(self.data_path), "model.threads": "1"}
        subprocess.run(
            [PYTHON, "-m", "tests.support.ray_redeploy", json.dumps(arguments)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", **_environment(self.folder)},
            check=True,
            capture_output=True,
            timeout=300,
        )

    def processes(self) -> list[int]:
        """Return the processes of this Ray, which name its folder on their command lines."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._has(pid)]

    def wait_for_end(self) -> None:
        """Return when no process of this Ray is left; they end with the one that started it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            ended = [psutil.Process(pid) for pid in self.processes()]
            psutil.wait_procs(ended, 30)
        assert not self.processes()

    def is_slot_free(self, number: int) -> bool:
        with (self.data_path / f"replica-{number}" / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _has(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"RAY_TMPDIR={self.folder}/ray\0".encode() in environment


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Enter when both replicas serve; at the end nothing is left."""
    folder = Path(tempfile.mkdtemp(prefix="offload-ray-"))
    config, ray = folder / "offload.yaml", folder / "ray"
    for path in (ray, folder / "shared"):
        path.mkdir()
    config.write_text(yaml.safe_dump(_values(folder)))
    options = ("--ray", "--replicas", "2", "--cpus", "0.5", "--config", str(config))
    try:
        with DaemonProcess(
            folder / "data", *options, env=_environment(folder), python=PYTHON, start_s=240
        ) as daemon:
            running = Cluster(daemon, folder, config)
            yield running
        running.wait_for_end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    return {"RAY_TMPDIR": f"{folder}/ray", "RAY_COLOR_PREFIX": "0", "RAY_ADDRESS": ""}


def tier_sizes() -> dict[str, Any]:
    """Return what each daemon may use."""
    tiers: dict[str, Any] = {name: {"size": size} for name, size in _SIZES}
    tiers["disk"]["min_free"] = 0
    return tiers


def _values(folder: Path) -> dict[str, Any]:
    tiers = tier_sizes()
    tiers["remote"] = {
        "url": f"file://{folder}/shared",
        "secret_file": str(folder / "secret"),
        "lease": f"{LEASE_S}s",
    }
    return {"tiers": tiers, "sessions": {"persist_interval": "1s"}}
