"""Heads to ask: made from parameters, or dumped from a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offload.errors import ConfigError
from offload.evals.parametric import FLAT, MEDIUM, SHARP, Shape, make_head
from offload.evals.problem import Problem, class_of, require_keys

FORMAT = "offload-qkv-1"
_TENSORS = ("keys", "values", "queries", "train_queries")


@dataclass(frozen=True, slots=True)
class Head:
    """A head to ask.

    Attributes
    ----------
    name : str
    head_class : {"flat", "medium", "sharp"}
        Of a parametric head by its temperature, of a dumped one by its concentration.
    problem : Problem
    """

    name: str
    head_class: str
    problem: Problem


def parametric_heads(
    num_keys: Sequence[int],
    temperatures: Sequence[float],
    num_queries: int,
    *,
    num_heads: int = 1,
    num_train_queries: int = 1024,
) -> Iterator[Head]:
    """Yield heads one after the other, so that only one is in memory.

    Parameters
    ----------
    num_keys, temperatures : sequence
        Every pair of them.
    num_queries : int
    num_heads : int
        Per pair, by their seed.
    num_train_queries : int
        For indexes that learn from them; at most half as many as keys.

    Raises
    ------
    ConfigError
        There are too few keys for anything to be left between sinks and window.
    """
    for count in num_keys:
        require_keys(count)
        for temperature in temperatures:
            for seed in range(num_heads):
                shape = Shape(
                    count,
                    num_queries=num_queries,
                    num_train_queries=min(num_train_queries, count // 2),
                    temperature=temperature,
                    seed=seed,
                )
                head = make_head(shape)
                name = f"temperature {temperature:g}, seed {seed}"
                problem = Problem(head.keys, head.values, head.queries, head.train_queries)
                yield Head(name, _class_of_temperature(temperature), problem)


def write_dump(
    file: Path, layers: Mapping[int, Mapping[str, Tensor]], scales: Mapping[int, float], about: str
) -> None:
    """Write what some layers of a model saw.

    Parameters
    ----------
    file : Path
    layers : mapping of int to mapping of str to Tensor
        For each layer ``keys`` and ``values`` [num_kv_heads, num_keys, dim], ``queries``
        [num_heads, num_queries, key_dim], asked after the last key, and ``train_queries``, which
        came before.
    scales : mapping of int to float
        Of the logits of each layer.
    about : str
        Model and text.
    """
    tensors = {
        f"layer{number}.{name}": tensor.contiguous()
        for number, layer in layers.items()
        for name, tensor in layer.items()
    }
    metadata = {"format": FORMAT, "about": about, "scales": json.dumps(dict(scales))}
    save_file(tensors, file, metadata)


def dumped_heads(file: Path, max_heads: int | None = None) -> Iterator[Head]:
    """Yield the query heads of a dump, each with the keys and values of its KV head.

    Only one head is in memory at a time.

    Parameters
    ----------
    file : Path
    max_heads : int, optional
        At most so many, spread over all; default: all.

    Raises
    ------
    ConfigError
        The file is no dump.
    """
    try:
        with safe_open(file, "pt") as dump:
            metadata = dump.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(f"{file} is no dump of queries, keys and values ({FORMAT})")
            scales: dict[str, float] = json.loads(metadata["scales"])
            places = [
                (layer, head)
                for layer in sorted(scales, key=int)
                for head in range(dump.get_slice(f"layer{layer}.queries").get_shape()[0])
            ]
            count = min(max_heads or len(places), len(places))
            for number in range(count):
                layer, head = places[number * len(places) // count]
                yield _head_of_dump(dump, layer, head, scales[layer])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} cannot be read as a dump: {error}") from error


def _head_of_dump(dump: Any, layer: str, head: int, scale: float) -> Head:
    slices = {name: dump.get_slice(f"layer{layer}.{name}") for name in _TENSORS}
    num_heads, num_kv_heads = (slices[name].get_shape()[0] for name in ("queries", "keys"))
    group = num_heads // num_kv_heads
    kv_head = head // group
    keys, values, queries = (
        slices[name][number]
        for name, number in (("keys", kv_head), ("values", kv_head), ("queries", head))
    )
    train = slices["train_queries"][kv_head * group : (kv_head + 1) * group].flatten(0, 1)
    problem = Problem(keys, values, queries, train, scale, keys.dtype)
    return Head(f"layer {layer}, head {head}", class_of(problem.concentration()), problem)


def _class_of_temperature(temperature: float) -> str:
    bounds = {"flat": (FLAT + MEDIUM) / 2, "medium": (MEDIUM + SHARP) / 2}
    return next((name for name, bound in bounds.items() if temperature < bound), "sharp")
