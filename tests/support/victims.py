"""Modules that run as processes of their own, to be killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

Victim = AbstractContextManager["subprocess.Popen[str]"]


@contextmanager
def victim_of(module: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a module, with its standard output read; it is killed at the end, if not before."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
