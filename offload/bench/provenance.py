"""Where numbers come from: the machine, its software, and the state of the source."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil
import torch

import offload
from offload.machine import read_gpus, read_memory

_PACKAGES: Final = ("kv-offload", "torch", "transformers", "numpy", "numba", "triton")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made some numbers.

    Attributes
    ----------
    date : str
        UTC, to the second.
    commit : str or None
        Of the source, with ``+`` if it has been changed since; None outside of a checkout.
    processor : str
    num_cores, num_threads : int
        Cores of the machine, and threads of torch.
    memory_bytes : int
    gpus : tuple of str
    load_average : float
        Of the last minute, at the start.
    versions : dict of str to str
    """

    date: str
    commit: str | None
    processor: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    gpus: tuple[str, ...]
    load_average: float
    versions: dict[str, str]


def read_provenance() -> Provenance:
    """Look at this machine now."""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(Path(offload.__file__).resolve().parents[1]),
        processor=_processor(),
        num_cores=psutil.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        memory_bytes=read_memory().total_bytes,
        gpus=tuple(gpu.name for gpu in read_gpus()),
        load_average=os.getloadavg()[0],
        versions={"python": platform.python_version()} | _versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    try:
        head = _git(checkout, "rev-parse", "--short=12", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changed else head


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
