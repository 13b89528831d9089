"""Check what the user asked for before any work is done."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

import torch

from offload.config import parse_size
from offload.engine_config import AUTO, BY_IMPORTANCE, EngineConfig
from offload.errors import ConfigError
from offload.machine import default_capacities, survey
from offload.placement import FIRST, check_placement
from offload.presets import Preset, customised
from offload.tiers.codec_fixed import find_fixed
from offload.tiers.codec_ladder import find_codec
from offload.tiers.scratch import ScratchDir, default_parent
from offload.tiers.sealing import Sealer

TIERS = ("gpu", "cpu", "disk", "remote")

_ENCODING = ("cpu", "disk")

_REMOTE_BYTES = 1 << 40
"""Capacity of an object store unless given: it has no end that could be measured, but a price."""


class CacheOptions(TypedDict, total=False):
    """Arguments that ``OffloadedCache`` and ``OffloadedCache.load`` share; see the former."""

    policy: str | Preset
    budget: float | int | None
    error: float | None
    max_wait_us: float | None
    codec: str | Mapping[str, str]
    placement: str
    capacity: Mapping[str, int | str] | None
    disk_path: str | Path | Sequence[str | Path] | None
    remote_url: str | None
    encrypted: bool


def check_tiers(tiers: object) -> tuple[str, ...]:
    """Return the tiers as a tuple, or raise ConfigError saying what is wrong with them."""
    if isinstance(tiers, str) or not isinstance(tiers, Sequence):
        raise ConfigError(f"tiers must be a list such as {list(TIERS)}, not {tiers!r}")
    if not tiers:
        raise ConfigError(f"tiers is empty; choose at least one of {list(TIERS)}")
    for tier in tiers:
        if tier not in TIERS:
            raise ConfigError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
    if len(set(tiers)) < len(tiers):
        raise ConfigError(f"a tier appears twice in {list(tiers)}")
    ordered = tuple(tier for tier in TIERS if tier in tiers)
    if tuple(tiers) != ordered:
        raise ConfigError(f"tiers {list(tiers)} are not in order; fastest first: {list(ordered)}")
    return ordered


def check_chunk_tokens(chunk_tokens: object) -> int:
    """Return ``chunk_tokens``, or raise ConfigError if it is not a positive integer."""
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be a positive integer, not {chunk_tokens!r}")
    return chunk_tokens


def check_capacity(
    tiers: Sequence[str], capacity: Mapping[str, int | str] | None, disk_path: Path | None
) -> dict[str, int]:
    """Return the capacity of every tier in bytes, measuring the machine for those not given."""
    given = {}
    if capacity is not None and not isinstance(capacity, Mapping):
        raise ConfigError(f"capacity must map tiers to sizes, not {capacity!r}")
    for tier, size in (capacity or {}).items():
        if tier not in tiers:
            raise ConfigError(f"capacity names tier {tier!r}, but the tiers are {list(tiers)}")
        given[tier] = parse_size(size)
    defaults = {"remote": _REMOTE_BYTES, **given}
    if not all(tier in defaults for tier in tiers):
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        local = [tier for tier in tiers if tier != "remote"]
        machine = survey(disk_path or default_parent(), gpus)
        defaults = {**defaults, **default_capacities(machine, local, *gpus), **given}
    return {tier: defaults[tier] for tier in tiers}


def split_codec(codec: object, tiers: Sequence[str]) -> tuple[str, str]:
    """Return how the host and the disk encode, or raise ConfigError saying what is wrong.

    One name is the disk's; a mapping names tiers.
    """
    if not isinstance(codec, str | Mapping):
        raise ConfigError(f"codec must be a name, or map 'cpu' and 'disk' to names, not {codec!r}")
    if isinstance(codec, str):
        return "raw", codec
    for tier in codec:
        if tier not in _ENCODING:
            raise ConfigError(
                f"codec names tier {tier!r}; those that encode: {', '.join(_ENCODING)}"
            )
        if tier not in tiers:
            raise ConfigError(f"codec names tier {tier!r}, but the tiers are {list(tiers)}")
    host, disk = (codec.get(tier, "raw") for tier in _ENCODING)
    if host != "raw":
        find_fixed(host)
    return host, disk


def check_codec(codec: str, tiers: Sequence[str], placement: str = FIRST) -> None:
    """Raise ConfigError if there is no such codec, or no tier that could use it."""
    if (codec in (AUTO, BY_IMPORTANCE) or find_codec(codec).number) and "disk" not in tiers:
        raise ConfigError(f"codec={codec!r} is for the tier 'disk'; tiers: {list(tiers)}")
    if codec == BY_IMPORTANCE and placement == FIRST:
        raise ConfigError(
            f"codec={codec!r} is for chunks that move by importance, such as by placement='mass'; "
            f"with placement={placement!r} they stay where they were put"
        )


def check_moves(placement: str, preset: Preset, tiers: Sequence[str]) -> None:
    """Raise ConfigError unless chunks can move between tiers as a placement wants it."""
    if check_placement(placement) == FIRST:
        return
    if preset.sparse is None or preset.sparse.index is None:
        raise ConfigError(
            f"placement={placement!r} is for policies that choose what to read; {preset.name!r} "
            f"always reads the same, and the best is {FIRST!r}"
        )
    if "disk" not in tiers or len(tiers) < 2:
        raise ConfigError(
            f"placement={placement!r} moves chunks between memory and disk; tiers: {list(tiers)}"
        )


def check_paths(disk_path: object, preset: Preset) -> list[Path | None]:
    """Return the folders of the disk tier, or raise ConfigError saying what is wrong with them."""
    several = isinstance(disk_path, Sequence) and not isinstance(disk_path, str | bytes)
    paths: list[Any] = list(disk_path) if several else [disk_path]  # type: ignore[call-overload]
    if not paths or not all(isinstance(path, str | PathLike | None) for path in paths):
        raise ConfigError(f"disk_path must be a path, or a list of paths, not {disk_path!r}")
    if len(paths) > 1 and preset.near is None:
        raise ConfigError(
            f"policy {preset.name!r} writes to one path, not {len(paths)}; those that attend "
            "beside the disk divide the heads among several: 'instinfer'"
        )
    return [None if path is None else Path(path) for path in paths]


def check_near(preset: Preset, tiers: Sequence[str], *codecs: str) -> None:
    """Raise ConfigError if a preset that attends beside the disk cannot."""
    if preset.near is None:
        return
    if "disk" not in tiers:
        raise ConfigError(
            f"policy {preset.name!r} attends beside the disk and needs the tier 'disk'; "
            f"tiers: {list(tiers)}"
        )
    for codec in codecs:
        if codec != "raw":
            raise ConfigError(f"policy {preset.name!r} reads chunks as they are; codec={codec!r}")
    if "remote" in tiers:
        raise ConfigError(f"policy {preset.name!r} attends beside the disk, not beside 'remote'")


def check_remote(remote_url: object, tiers: Sequence[str]) -> None:
    """Raise ConfigError if the remote tier is only half asked for, or cannot be opened."""
    if "remote" not in tiers:
        if remote_url is not None:
            raise ConfigError(f"remote_url needs the tier 'remote'; tiers: {list(tiers)}")
        return
    if "disk" not in tiers:
        raise ConfigError(f"'remote' takes what 'disk' has no room for; tiers: {list(tiers)}")
    if not isinstance(remote_url, str):
        raise ConfigError(
            f"the tier 'remote' needs remote_url, such as 's3://bucket/prefix', not {remote_url!r}"
        )
    if find_spec("obstore") is None:
        raise ConfigError("the tier 'remote' needs obstore: pip install 'kv-offload[remote]'")
    from offload.tiers.remote_bucket import Bucket  # with obstore, which is optional

    Bucket(remote_url).close()


def check_encrypted(preset: Preset, tiers: Sequence[str]) -> None:
    """Raise ConfigError if something would be written that is not encrypted."""
    if "disk" not in tiers:
        raise ConfigError(f"encrypted=True is for the tier 'disk'; tiers: {list(tiers)}")
    if "remote" in tiers:
        raise ConfigError("encrypted=True does not reach the tier 'remote'; leave out one of them")
    if preset.near is not None:
        raise ConfigError(
            f"policy {preset.name!r} attends beside the disk, whose workers read plain records: "
            "not with encrypted=True"
        )
    if preset.sparse is not None and preset.sparse.index and preset.sparse.abstracts == "disk":
        raise ConfigError("abstracts='disk' maps plain files into memory: not with encrypted=True")


def check_settings(
    tiers: object,
    policy: str | Preset,
    capacity: Mapping[str, int | str] | None,
    disk_path: str | Path | Sequence[str | Path] | None,
    chunk_tokens: object,
    codec: str | Mapping[str, str] = "raw",
    placement: str = FIRST,
    remote_url: str | None = None,
    encrypted: bool = False,
) -> EngineConfig:
    """Turn the arguments of ``OffloadedCache`` into an engine's configuration.

    The private folder of the disk tier is made here, so that a path that cannot be written is an
    error before the model runs.

    Raises
    ------
    ConfigError
        Says what was given and what would do.
    """
    names = check_tiers(tiers)
    preset = customised(policy)
    tokens = check_chunk_tokens(chunk_tokens)
    if disk_path is not None and "disk" not in names:
        raise ConfigError(f"disk_path={str(disk_path)!r} needs the tier 'disk'; tiers: {names}")
    paths = check_paths(disk_path, preset)
    check_moves(placement, preset, names)
    host_codec, disk_codec = split_codec(codec, names)
    check_codec(disk_codec, names, placement)
    check_near(preset, names, host_codec, disk_codec)
    check_remote(remote_url, names)
    if encrypted:
        check_encrypted(preset, names)
    sealer = Sealer.of_this_process() if encrypted else None
    capacities = check_capacity(names, capacity, paths[0])
    scratches = [ScratchDir(path) for path in paths] if "disk" in names else [None]
    return EngineConfig(
        capacities,
        preset,
        tokens,
        scratches[0],
        codec=disk_codec,
        host_codec=host_codec,
        placement=placement,
        more_scratch=tuple(scratch for scratch in scratches[1:] if scratch is not None),
        remote_url=remote_url,
        sealer=sealer,
    )
