"""Save and restore the layers that are not offloaded: sliding windows and recurrent states."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from offload.errors import ConfigError

_OURS = frozenset({"_core", "_index", "_binder"})
_KIND, _VALUE = "kind", "value"


def pack_layer(layer: Any, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of a layer as named tensors and JSON.

    Parameters
    ----------
    layer : object
        Its attributes are tensors, numbers, texts, dtypes, devices, and lists, tuples and dicts of
        these.
    prefix : str
        Of the names of the tensors.

    Raises
    ------
    ConfigError
        An attribute is something else.
    """
    tensors: dict[str, Tensor] = {}
    state = {
        name: _pack(value, f"{prefix}.{name}", tensors)
        for name, value in vars(layer).items()
        if name not in _OURS
    }
    return tensors, state


def restore_layer(
    layer: Any, state: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Give a layer that was just made the state that ``pack_layer`` returned."""
    for name, value in state.items():
        setattr(layer, name, _unpack(value, tensors, device))


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return {_KIND: "plain", _VALUE: value}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone()
        return {_KIND: "tensor", _VALUE: name}
    if isinstance(value, torch.dtype):
        return {_KIND: "dtype", _VALUE: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {_KIND: "device", _VALUE: None}  # that of whoever loads it
    if isinstance(value, list | tuple | dict):
        kind = type(value).__name__
        items = [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in _items(value)]
        return {_KIND: kind, _VALUE: items}
    raise ConfigError(f"{name} is a {type(value).__name__}, which a session cannot hold")


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items()) if isinstance(value, dict) else iter(enumerate(value))


def _unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    kind, value = packed[_KIND], packed[_VALUE]
    if kind == "plain":
        return value
    if kind == "tensor":
        return tensors[value].to(device)
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return device
    items = [(key, _unpack(item, tensors, device)) for key, item in value]
    if kind == "dict":
        return dict(items)
    unpacked = [item for _, item in items]
    return tuple(unpacked) if kind == "tuple" else unpacked
