"""Our backend under SGLang's own factory, if ``OFFLOAD_TEST_SGLANG`` names an unpacked wheel.

``OFFLOAD_TEST_SGLANG_PYTHON`` is an interpreter with what it imports. See ``docs/plugins.md``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SGLANG = os.environ.get("OFFLOAD_TEST_SGLANG", "")
PYTHON = os.environ.get("OFFLOAD_TEST_SGLANG_PYTHON", sys.executable)
WAIT_S = 110.0

pytestmark = [
    pytest.mark.skipif(not SGLANG, reason="OFFLOAD_TEST_SGLANG names no unpacked SGLang"),
    pytest.mark.slow,
]


def run(what: str, root: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": f"{SGLANG}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "tests.support.sglang_driver", what, str(root)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_pages_of_two_pools_stored_then_loaded_by_another_process_are_equal(
    tmp_path: Path,
) -> None:
    stored, loaded = run("store", tmp_path), run("load", tmp_path)
    assert stored == {"legacy": True, "moved": {"kv": 1024, "mamba": 1024}}
    assert loaded["equal"] == [1024, 1024]
    assert loaded["moved"] == {"kv": 1024, "mamba": 1024}
    assert loaded["hit_pages"] == 1024
    assert loaded["prefix"] == 5
    assert loaded["legacy"]
    assert loaded["absent"]
