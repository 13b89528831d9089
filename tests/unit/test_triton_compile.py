"""Triton kernels compiled for a Hopper GPU: what the interpreter does not see."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

KERNELS = {
    "_attend_bytes",
    "_attend_chunks",
    "_attend_nibbles",
    "_attend_rows",
    "_bound_chunks",
    "_choose_clusters",
    "_gather_rows",
    "_merge_splits",
    "_own_places",
    "_rank_places",
    "_score_boxes",
    "_score_clusters",
    "_score_places",
    "_sum_clusters",
    "_sum_residuals",
    "_take_hits",
    "_weigh_rows",
}
STREAMING = ("_attend_chunks", "_attend_rows", "_gather_rows", "_bound_chunks", "_score_boxes")
"""Bound by memory, in rows of at least 16 bytes."""


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compile in a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_compile"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_every_kernel_compiles_and_keeps_its_numbers_in_registers(
    variants: list[dict[str, Any]],
) -> None:
    assert {kernel["name"] for kernel in variants} == KERNELS
    assert [kernel for kernel in variants if kernel["stack_bytes"]] == []


@pytest.mark.parametrize("name", STREAMING)
def test_streaming_kernel_loads_sixteen_bytes_at_a_time(
    variants: list[dict[str, Any]], name: str
) -> None:
    own = [kernel for kernel in variants if kernel["name"] == name]
    assert own
    assert all(kernel["wide_loads"] >= 4 for kernel in own)


def test_two_programs_of_a_streaming_kernel_fit_on_a_processor(
    variants: list[dict[str, Any]],
) -> None:
    assert max(kernel["shared_bytes"] for kernel in variants) <= 227 * 1024 // 2


def test_dispatch_does_not_import_triton_where_nothing_needs_it() -> None:
    code = "import sys, offload.kernels.dispatch; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
