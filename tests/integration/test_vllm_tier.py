"""Our tier under vLLM's own factory and tiering manager, for every vLLM that is named.

``OFFLOAD_TEST_VLLM`` is one or more folders of unpacked wheels, with colons between them, and
``OFFLOAD_TEST_VLLM_PYTHON`` an interpreter with the packages they import. See ``docs/plugins.md``.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = [path for path in os.environ.get("OFFLOAD_TEST_VLLM", "").split(":") if path]
PYTHON = os.environ.get("OFFLOAD_TEST_VLLM_PYTHON", sys.executable)
WAIT_S = 110.0
ROW_BYTES = 65536
RECORD_BYTES = ROW_BYTES + 4096

pytestmark = [
    pytest.mark.skipif(not UNPACKED, reason="OFFLOAD_TEST_VLLM names no unpacked vLLM"),
    pytest.mark.slow,
]


@pytest.fixture(params=UNPACKED, ids=lambda path: Path(path).name)
def vllm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(vllm: str, *arguments: object) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": f"{vllm}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "tests.support.vllm_driver", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(vllm: str, *arguments: object) -> dict[str, Any]:
    """Run a driver to its end and return what it reports."""
    with start(vllm, *arguments) as process:
        out, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, error[-3000:]
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


def segments(root: Path) -> Iterator[Path]:
    yield from sorted(root.rglob("*.kvseg"))


def allocated(root: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())


def test_thousand_chunks_cascaded_then_promoted_by_another_process_are_equal(
    vllm: str, tmp_path: Path
) -> None:
    stored = run(vllm, "store", tmp_path)
    loaded = run(vllm, "load", tmp_path)
    assert (stored["taken"], loaded["num_found"]) == (1024, 1024)
    assert [loaded[name] for name in ("equal", "wrong", "miss", "late")] == [1024, 0, 0, 0]


def test_flipped_bytes_are_misses_and_never_content(vllm: str, tmp_path: Path) -> None:
    run(vllm, "store", tmp_path, "--count", 64)
    [segment] = segments(tmp_path)
    with segment.open("r+b") as file:
        for slot in range(0, 64, 4):
            place = slot * RECORD_BYTES + 4096 + slot * 997
            file.seek(place)
            [byte] = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1]))
    first = run(vllm, "load", tmp_path, "--count", 64)
    again = run(vllm, "load", tmp_path, "--count", 64)
    assert [first[name] for name in ("equal", "wrong", "miss", "late")] == [48, 0, 16, 0]
    assert first["stats"]["vllm:kv_offload_disk_blocks_corrupt"] == 16
    assert (again["num_found"], again["equal"], again["miss"]) == (48, 48, 16)
    assert 0 < len(list(tmp_path.rglob("quarantine/*.kvrecord"))) <= 4


def test_quota_holds_and_the_latest_chunks_are_there(vllm: str, tmp_path: Path) -> None:
    quota = 100 * RECORD_BYTES
    stored = run(vllm, "store", tmp_path, "--quota", quota, "--count", 320)
    latest = run(vllm, "load", tmp_path, "--quota", quota, "--count", 80, "--first", 240)
    assert stored["num_blocks"] == 96
    assert allocated(tmp_path) <= quota + 8192  # and the files that say whose it is
    assert latest["equal"] == 80


def test_another_model_finds_nothing(vllm: str, tmp_path: Path) -> None:
    run(vllm, "store", tmp_path, "--count", 32)
    other = run(vllm, "load", tmp_path, "--count", 32, "--model", "test/other")
    assert (other["num_found"], other["equal"], other["miss"]) == (0, 0, 32)


def test_kill_in_mid_store_loses_nothing_that_was_reported(vllm: str, tmp_path: Path) -> None:
    with start(vllm, "kill", tmp_path, "--count", 100_000, "--quota", "64MiB") as process:
        assert process.stdout is not None
        reported = 0
        while reported < 300:
            line = process.stdout.readline().strip()  # some versions log here
            reported = int(line) if line.isdigit() else reported
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=WAIT_S)
    after = run(vllm, "load", tmp_path, "--count", reported + 1, "--quota", "64MiB")
    assert [after[name] for name in ("equal", "wrong", "miss", "late")] == [reported + 1, 0, 0, 0]


def test_hung_disk_is_misses_and_never_keeps_the_scheduler_waiting(
    vllm: str, tmp_path: Path
) -> None:
    report = run(vllm, "hang", tmp_path, "--count", 128, "--deadline-s", 1.0)
    nothing = {"equal": 0, "wrong": 0, "miss": 16, "late": 0}
    assert report["while_hanging"] == report["again"] == nothing
    assert report["settled"]
    assert report["longest_s"] < 0.5  # half of the deadline: no call waited for the disk
    assert report["after"] == {"equal": 16, "wrong": 0, "miss": 0, "late": 0}
