"""Named benchmarks, each of one or more settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from offload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Suite:
    """Benchmarks that belong together.

    Attributes
    ----------
    about : str
        What they are to show.
    parts : sequence of mapping
        Changes of ``BenchSettings``, one benchmark each.
    needs_device : bool
        They make sense only with a CUDA device.
    """

    about: str
    parts: Sequence[Mapping[str, Any]]
    needs_device: bool = False


SUITES: Final = {
    "cpu-ram": Suite(
        "one layer of an 8B model, everything in host memory",
        [
            {
                "contexts": (8192, 32768, 131072),
                "contenders": ("dense", "exact", "adaptive:0.01"),
                "steps": 16,
                "rounds": 7,
            }
        ],
    ),
    "cpu-disk": Suite(
        "keys and values ten times as large as the host memory for them, the others on disk",
        [
            {
                "contexts": (32768,),
                "num_layers": 4,
                "ram_shares": (0.1,),
                "contenders": ("flexgen", "exact", "adaptive:0.01"),
                "steps": 8,
                "rounds": 5,
            }
        ],
    ),
    "device-overhead": Suite(
        "steps of a model whose keys and values fit on its device",
        [
            {
                "level": "decode",
                "contexts": (8192,),
                "num_layers": 2,
                "contenders": ("dynamic", "exact"),
                "device_share": 1.0,
                "steps": 16,
                "rounds": 7,
            }
        ],
    ),
    "gpu": Suite(
        "an 8B model's layers on a CUDA device, with a tenth of keys and values there",
        [
            {
                "contexts": (131072,),
                "num_layers": 8,
                "contenders": ("dense", "offloading", "exact", "adaptive:0.01"),
                "steps": 16,
                "seconds": 60.0,
            },
            {
                "contexts": (1048576,),
                "num_layers": 2,
                "device_share": 0.05,
                "contenders": ("dense", "adaptive:0.01"),
                "steps": 16,
                "seconds": 60.0,
            },
            {
                "level": "decode",
                "contexts": (131072,),
                "num_layers": 4,
                "contenders": ("dynamic", "offloading", "adaptive:0.01"),
                "steps": 8,
                "rounds": 3,
                "seconds": 60.0,
            },
            {
                "level": "decode",
                "contexts": (8192,),
                "num_layers": 4,
                "device_share": 1.0,
                "contenders": ("dynamic", "exact"),
                "steps": 32,
                "seconds": 30.0,
            },
        ],
        needs_device=True,
    ),
}
"""By name."""


def find_suite(name: str) -> Suite:
    """Return a suite.

    Raises
    ------
    ConfigError
        There is no such suite, or it needs a device that is missing.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; known: {', '.join(SUITES)}")
    suite = SUITES[name]
    if suite.needs_device and not torch.cuda.is_available():
        raise ConfigError(
            f"suite {name!r} needs a CUDA device, and torch {torch.__version__} sees none"
        )
    return suite
