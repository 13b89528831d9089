"""What is compared: policies with budgets, processing questions sparsely or exactly."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from offload.engine_config import AUTO
from offload.errors import ConfigError
from offload.presets import PRESETS, Preset, customised
from offload.tiers.codec_ladder import find_codec

Protocol = Literal["B", "A"]

PROTOCOLS = {
    "B": "the document is processed exactly, question and answer sparsely",
    "A": "document and question are processed exactly, the answer sparsely",
}

EXACT = "exact"

_OPTIONS = {
    "error": "error",
    "wait_us": "max_wait_us",
    "early": "early_budget",
    "channels": "channel_share",
    "group": "group_tokens",
    "block": "block_tokens",
    "memory": "memory_bytes",
    "workers": "workers_per_path",
}
"""What may be written ``NAME=NUMBER`` after a policy, and what ``customised`` calls it."""

_DENSE = "dense"
"""Written after a policy that attends beside the disk: everything is read there."""

_CODEC = "codec="


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy as it takes part.

    Attributes
    ----------
    name : str
        As the user wrote it.
    preset : Preset
        With the budget, and processing questions as the protocol says.
    asks_exactly : bool
        A question is processed exactly, in one forward pass.
    codec : str
        How the disk stores keys and values.
    """

    name: str
    preset: Preset
    asks_exactly: bool
    codec: str = "raw"

    @property
    def piece_tokens(self) -> int | None:
        """Most tokens of one forward pass that is to be sparse; None if none is."""
        if self.preset.near is not None:
            return self.preset.near.max_queries
        return None if self.preset.sparse is None else self.preset.sparse.max_queries


def find_contender(name: str, protocol: Protocol) -> Contender:
    """Read ``POLICY`` and, after colons, a budget, ``dense``, or options such as ``codec=``.

    Parameters
    ----------
    name : str
        A budget with a point is a share of the context, one without is a number of tokens.
    protocol : {"B", "A"}

    Raises
    ------
    ConfigError
        There is no such policy, or it takes no such budget or option.
    """
    policy, *texts = name.split(":")
    codecs = [text.removeprefix(_CODEC) for text in texts if text.startswith(_CODEC)]
    texts = [text for text in texts if not text.startswith(_CODEC)]
    if policy not in PRESETS:
        raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[policy]
    options = dict(_read_option(name, text) for text in texts)
    if options:
        preset = customised(policy, **options)
    if preset.near is not None and protocol == "A":
        preset = replace(preset, near=replace(preset.near, max_queries=1))
    if preset.sparse is not None and protocol == "A":
        # A call with more queries than this is exact, and a question has more than one token.
        preset = replace(preset, sparse=replace(preset.sparse, max_queries=1))
    codec = codecs[-1] if codecs else "raw"
    if codec != AUTO:
        find_codec(codec)
    return Contender(name, preset, protocol == "A", codec)


def _read_option(name: str, text: str) -> tuple[str, Any]:
    """Return what ``customised`` calls an option, and its value."""
    if text == _DENSE:
        return "mode", _DENSE
    key, equals, number = text.rpartition("=")
    if not equals:
        return "budget", _read_number(name, text)
    if key not in _OPTIONS:
        raise ConfigError(f"{name!r}: unknown option {key!r}; known: {', '.join(_OPTIONS)}, codec")
    return _OPTIONS[key], _read_number(name, number)


def _read_number(name: str, text: str) -> float | int:
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{name!r} is no policy with a budget: {text!r} is no number")
    return number
