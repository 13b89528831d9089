"""``offload doctor``: what this machine offers, how fast it is, and the defaults that follow."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from offload.bandwidth import (
    PIECE_BYTES,
    DiskBandwidth,
    measure_disk,
    measure_memcpy,
    measure_memory_read,
)
from offload.config import format_size, parse_size
from offload.forecast import Forecast, forecast, forecast_rows
from offload.machine import Machine, default_capacities, existing_parent, survey
from offload.tiers.scratch import default_parent

_TIERS: Final = ("gpu", "cpu", "disk")
_PACKAGES: Final = ("kv-offload", "torch", "transformers", "numpy")


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What ``offload doctor`` found; ``--json`` prints it field by field.

    Attributes
    ----------
    versions : dict of str to str
        Python and the packages that matter.
    num_cpus : int
        Logical cores this process may use.
    machine : Machine
    disk_bandwidth : DiskBandwidth
    memcpy_bytes_per_s, memory_read_bytes_per_s : float
        Host to host, and of the host, on torch's threads.
    forecast : Forecast
    default_capacities : dict of str to int
        Bytes of each tier, where the user gives none.
    notes : list of str
        What a user should know or change, one sentence each.
    """

    versions: dict[str, str]
    num_cpus: int
    machine: Machine
    disk_bandwidth: DiskBandwidth
    memcpy_bytes_per_s: float
    memory_read_bytes_per_s: float
    forecast: Forecast
    default_capacities: dict[str, int]
    notes: list[str]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "doctor", help="show what this machine offers and the defaults that follow"
    )
    where = "where the disk tier would keep its files (default: the user's cache folder)"
    parser.add_argument("--dir", type=Path, metavar="DIR", help=where)
    size = "of the file that is written there, read and removed (default: %(default)s)"
    parser.add_argument("--probe", default="128MiB", metavar="SIZE", help=size)
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Raises
    ------
    ConfigError, StorageError
        The size is none, or the directory cannot be used.
    """
    report = examine(args.dir, parse_size(args.probe))
    if args.json:
        json.dump(dataclasses.asdict(report), sys.stdout, indent=2, default=str)
        print()
    else:
        print_report(report)
    return 0


def examine(directory: Path | None, probe_bytes: int) -> Report:
    """Survey and measure this machine. Takes a few seconds.

    Parameters
    ----------
    directory : Path or None
        Where the disk tier would keep its files; by default where it does. While it does not
        exist, the nearest directory above it is measured.
    probe_bytes : int
        Size of the file that is written and read to measure the disk.
    """
    machine = survey(default_parent() if directory is None else directory)
    disk_bandwidth = measure_disk(existing_parent(machine.disk.directory), probe_bytes)
    return Report(
        versions={"python": platform.python_version()} | _versions(),
        num_cpus=_num_cpus(),
        machine=machine,
        disk_bandwidth=disk_bandwidth,
        memcpy_bytes_per_s=measure_memcpy(),
        memory_read_bytes_per_s=measure_memory_read(torch.device("cpu")),
        forecast=forecast(machine, disk_bandwidth),
        default_capacities=default_capacities(machine, _TIERS),
        notes=list(find_notes(machine, disk_bandwidth)),
    )


def print_report(report: Report) -> None:
    """Print the report as a table."""
    table = Table("", "found", show_edge=False, header_style="bold")
    for name, value in _rows(report):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    memory, disk, speed = report.machine.memory, report.machine.disk, report.disk_bandwidth
    yield "versions", ", ".join(f"{name} {text}" for name, text in report.versions.items())
    yield "cores", str(report.num_cpus)
    yield "memory", _free_of(memory.available_bytes, memory.total_bytes)
    limit = memory.cgroup_limit_bytes
    yield "cgroup limit", "none" if limit is None else format_size(limit)
    yield "memory copy", _rate(report.memcpy_bytes_per_s)
    yield "memory read", _rate(report.memory_read_bytes_per_s)
    for gpu in report.machine.gpus:
        yield f"cuda:{gpu.index}", f"{gpu.name}, {_free_of(gpu.free_bytes, gpu.total_bytes)}"
    if not report.machine.gpus:
        yield "cuda", "none"
    yield "disk", f"{disk.directory} ({disk.file_system})"
    yield "disk space", _free_of(disk.free_bytes, disk.total_bytes)
    yield "O_DIRECT", "accepted" if speed.is_direct else "refused"
    yield "disk read", _rate(speed.read_bytes_per_s)
    yield "disk write", _rate(speed.write_bytes_per_s)
    yield "disk latency", f"{speed.read_latency_s * 1e6:.0f} µs"
    pieces = f"{speed.pieces_per_s:,.0f} reads/s of {PIECE_BYTES >> 10} KiB"
    yield "disk, at random", f"{pieces}, {_rate(speed.pieces_per_s * PIECE_BYTES)}"
    for tier, capacity in report.default_capacities.items():
        yield f"default capacity, {tier}", format_size(capacity)
    yield from forecast_rows(report.forecast)


def find_notes(machine: Machine, disk_bandwidth: DiskBandwidth) -> Iterator[str]:
    """Yield what a user should know or change, one sentence each."""
    disk = machine.disk
    if not machine.gpus:
        yield "no CUDA device: the gpu tier is a pool in host memory"
    if disk.is_in_memory:
        yield f"{disk.directory} is in memory ({disk.file_system}); choose a real disk with --dir"
    elif not disk_bandwidth.is_direct:
        yield "O_DIRECT is refused: disk reads go through the page cache, and take memory for it"


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _free_of(free_bytes: int, total_bytes: int) -> str:
    return f"{format_size(free_bytes)} free of {format_size(total_bytes)}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
