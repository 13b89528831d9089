"""What one layer of a three-tier pipeline takes: disk to host, host to device, compute. Pure.

While a layer is computed, the chunks of the next ones are read from the disk, decoded and moved
over the bus, each of these a stage with a buffer on either side, so that in the long run the
slowest stage sets the pace. Some share of what is on the disk is stored compressed: fewer bytes to
read, for the price of decoding them.

The equations are ours. LeoAM (arXiv:2506.20187) overlaps these three stages and compresses just as
much as hides the slowest link, but its equations could not be read; see ``docs/placement.md``. What
to do about the times (how much to compress, with which codec, what to leave) is in
``pipeline_plan``.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from offload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one layer of one step has to move, and what it may hide behind.

    Attributes
    ----------
    disk_bytes : float
        Of the chunks that are wanted and lie on the disk, as they are once decoded.
    host_bytes : float
        Of those that lie in host memory, which holds them decoded.
    num_reads : float
        Requests that reading the disk's part takes.
    compute_s : float
        Of one layer on the device: the window that transfers overlap with.
    layers_ahead : int
        A layer's transfers begin when the computation of the layer so many before it does, because
        only then is it known, or guessed, what will be wanted. 2 with double buffers.

    Raises
    ------
    ConfigError
        A number is negative or not finite, or ``layers_ahead`` is less than 1.
    """

    disk_bytes: float
    host_bytes: float
    num_reads: float
    compute_s: float
    layers_ahead: int = 2

    def __post_init__(self) -> None:
        amounts = (self.disk_bytes, self.host_bytes, self.num_reads, self.compute_s)
        if not all(0 <= amount < math.inf for amount in amounts):
            raise ConfigError(f"{self}: amounts of work are finite and not negative")
        if self.layers_ahead < 1:
            raise ConfigError(f"transfers begin {self.layers_ahead} layers ahead; at least 1")

    def with_share_of_disk(self, share: float) -> "LayerWork":
        """Return the same work with only a share, 0 to 1, of the disk's part."""
        return LayerWork(
            share * self.disk_bytes,
            self.host_bytes,
            share * self.num_reads,
            self.compute_s,
            self.layers_ahead,
        )


@dataclass(frozen=True, slots=True)
class Links:
    """How fast the links are.

    Attributes
    ----------
    disk_bytes_per_s, bus_bytes_per_s : float
    read_s : float
        Of each read from the disk, on top of its bytes.
    is_shared : bool
        Whether host and device are the same cores, as on a machine without an accelerator: copies,
        decoding and compute then take turns, and only the disk works beside them.

    Raises
    ------
    ConfigError
        A speed is not positive, or ``read_s`` is negative or not finite.
    """

    disk_bytes_per_s: float
    read_s: float
    bus_bytes_per_s: float
    is_shared: bool = False

    def __post_init__(self) -> None:
        if not (self.disk_bytes_per_s > 0 and self.bus_bytes_per_s > 0):
            raise ConfigError(f"{self}: links move more than 0 bytes/s")
        if not 0 <= self.read_s < math.inf:
            raise ConfigError(f"a read cannot take {self.read_s} s")


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What a codec saves and costs.

    Attributes
    ----------
    name : str
    ratio : float
        Bytes before over bytes after encoding.
    decode_bytes_per_s : float
        Decoded bytes.
    decodes_on : {"host", "device"}
        On the host before the bus, or on the device after it.
    error : float
        Of what comes back, in any unit that orders codecs; 0 is lossless.

    Raises
    ------
    ConfigError
        Ratio or speed is not positive, or the error is negative.
    """

    name: str
    ratio: float
    decode_bytes_per_s: float
    decodes_on: Literal["host", "device"] = "host"
    error: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.ratio < math.inf and self.decode_bytes_per_s > 0 and self.error >= 0):
            raise ConfigError(f"{self}: ratio and speed are positive, the error is not negative")


RAW: Final = CodecCost("raw", ratio=1.0, decode_bytes_per_s=math.inf)
"""Chunks as they are in memory."""


class StageTimes(NamedTuple):
    """Seconds of each stage for one layer.

    Attributes
    ----------
    disk_s, decode_s, bus_s, compute_s : float
    before_s : float
        From the beginning of a layer's transfers until it can be computed, if nothing is in the
        way: the stages in front of the device, one after the other.
    lanes : tuple of float
        What sets the pace: the work of everything that works by itself, and the time between two
        layers that ``layers_ahead`` leaves. Of one length for one machine and codec, and each
        entry a straight line over the share that is compressed.
    """

    disk_s: float
    decode_s: float
    bus_s: float
    compute_s: float
    before_s: float
    lanes: tuple[float, ...]

    @property
    def layer_s(self) -> float:
        """Seconds per layer in the long run: the slowest lane."""
        return max(self.lanes)


def stage_times(
    work: LayerWork, links: Links, codec: CodecCost = RAW, share: float = 0.0
) -> StageTimes:
    """Return how long every stage takes if ``share`` of the disk's bytes are stored encoded.

    With D bytes wanted from the disk in n reads and H from the host, x the share, r the ratio::

        stored  = D (1 − x + x/r)
        disk    = n · read_s + stored / disk_bytes_per_s
        bus     = (H + stored) / bus_bytes_per_s       if decoded on the device, else (H + D) / …
        decode  = x D / decode_bytes_per_s
        before  = disk + bus  (+ decode on the host)
        layer   = max(disk, bus, decode, compute, before / layers_ahead)
                      decode on the device:  decode + compute are one of them
                      shared cores:          bus + decode + compute are one of them

    The last of the maximum is what a pipeline too short for its stages waits: with one layer ahead
    there is no more overlap than between a layer's transfers and its predecessor's computation.

    Parameters
    ----------
    work : LayerWork
    links : Links
    codec : CodecCost
    share : float
        0 to 1.

    Raises
    ------
    ConfigError
        ``share`` is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a share of {share} of the chunks cannot be compressed")
    is_on_device = codec.decodes_on == "device"
    stored = work.disk_bytes * (1 - share + share / codec.ratio)
    moved = work.host_bytes + (stored if is_on_device else work.disk_bytes)
    disk_s = work.num_reads * links.read_s + stored / links.disk_bytes_per_s
    bus_s = moved / links.bus_bytes_per_s
    decode_s = share * work.disk_bytes / codec.decode_bytes_per_s
    before_s = disk_s + bus_s + (0.0 if is_on_device else decode_s)
    wait_s = before_s / work.layers_ahead
    lanes: tuple[float, ...]
    if links.is_shared:
        lanes = (disk_s, bus_s + decode_s + work.compute_s, wait_s)
    elif is_on_device:
        lanes = (disk_s, bus_s, decode_s + work.compute_s, wait_s)
    else:
        lanes = (disk_s, bus_s, decode_s, work.compute_s, wait_s)
    return StageTimes(disk_s, decode_s, bus_s, work.compute_s, before_s, lanes)


def layer_seconds(
    work: LayerWork, links: Links, codec: CodecCost = RAW, share: float = 0.0
) -> float:
    """Return how long a layer takes in the long run; see ``stage_times``."""
    return stage_times(work, links, codec, share).layer_s


def total_seconds(
    work: LayerWork,
    links: Links,
    num_layers: int,
    codec: CodecCost = RAW,
    share: float = 0.0,
) -> float:
    """Return how long so many equal layers take, the first of which nothing hides.

    ``before + decode on the device + compute + (num_layers − 1) · layer``.

    Parameters
    ----------
    work : LayerWork
        Of each layer.
    links : Links
    num_layers : int
        Of none, nothing is to be done.
    codec : CodecCost
    share : float
    """
    if num_layers < 1:
        return 0.0
    times = stage_times(work, links, codec, share)
    last_s = times.compute_s + (times.decode_s if codec.decodes_on == "device" else 0.0)
    return times.before_s + last_s + (num_layers - 1) * times.layer_s
