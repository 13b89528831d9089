"""Compile what calls of kernels would launch on a Hopper GPU, on a machine without one.

    python -m tests.support.triton_compile

Prints a JSON object per variant. Triton brings the assembler along. Not to be imported where
kernels are interpreted.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from offload.kernels.quantised import quantise
from offload.kernels.triton_bounds import bound_chunks, score_boxes
from offload.kernels.triton_chunks import attend_chunks
from offload.kernels.triton_clusters import choose_clusters, score_clusters
from offload.kernels.triton_gather import gather_rows
from offload.kernels.triton_merge import merge_splits
from offload.kernels.triton_places import score_places
from offload.kernels.triton_quantised import attend_quantised
from offload.kernels.triton_rows import addresses_of, attend_rows
from offload.kernels.triton_scan import scan
from tests.support.triton_tables import make_tables

_CAPABILITY = 90


class Compiled(NamedTuple):
    """One variant of a kernel; numbers as the assembler reports them, of one thread or program."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    """Of 16 bytes, straight to shared memory or not."""
    other_loads: int


class _AbsentDevice:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", _CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_calls(calls: Callable[[], None]) -> list[Compiled]:
    """Run calls whose kernels are compiled instead of launched, and say what came out."""
    assert not knobs.runtime.interpret
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, _measure(kernel))

    driver.set_active(_AbsentDevice())
    JITFunction.run = compile_only
    try:
        calls()
    finally:
        JITFunction.run = run
    return list(found.values())


def _measure(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", report)}
    copies = re.findall(r"cp\.async\.c[ag]\.shared.*?, (0x\w+|\d+)", kernel.asm["ptx"])
    loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
    wide = sum(bool(re.search(r"v4\.\w32|v2\.\w64", load)) for load in loads)
    wide += sum(int(size, 0) == 16 for size in copies)
    return Compiled(
        kernel.name,
        usage["REG"],
        usage["STACK"],
        kernel.metadata.shared,
        wide,
        len(loads) + len(copies) - wide,
    )


def call_all() -> None:
    """Ask every kernel for one step of a layer of 32 heads over 8 KV heads of 128 channels."""
    query = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16)
    pool = torch.zeros(1, 40, 8, 64, 256, dtype=torch.bfloat16)
    keys, values = pool.split(128, -1)
    slots = torch.arange(33).unsqueeze(0)
    attend_chunks(query, keys, values, scale=1.0)
    attend_chunks(query, keys, values, scale=1.0, slots=slots)
    attend_rows(query, addresses_of(pool[:, 0]), 128, scale=1.0)
    for num_bits in (8, 4):
        packed = (quantise(part, num_bits) for part in (keys, values))
        attend_quantised(query, *packed, scale=1.0, slots=slots)
    flat = pool[0, :, :, 0].flatten(0, 1)
    gather_rows(addresses_of(flat), torch.arange(len(flat)), torch.empty_like(flat))
    lower, upper = bound_chunks(keys[0, 0], 16)
    wide = torch.zeros(8, 4, 128)
    score_boxes(wide, lower, upper)
    tables, owner = make_tables(128, 2, num_heads=8)
    logits, hoped = score_clusters(tables, wide)
    score_places(tables, owner, wide, logits, choose_clusters(tables, hoped, 9, "max"))
    for group in ("max", "sum"):
        scan(tables, wide, 9, group)
    many = tables._replace(counts=torch.ones(8, 4096, dtype=torch.int16))
    choose_clusters(many, torch.zeros(8, 4, 4096), 9, "max")
    merge_splits(torch.zeros(1, 32, 1, 33, 128), torch.zeros(1, 32, 1, 33))


def main() -> int:
    for kernel in compile_calls(call_all):
        print(json.dumps(kernel._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
