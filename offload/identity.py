"""Which model made some keys and values, told so that no other model ever reads them.

Whatever differs costs a prefill, and a wrong match costs wrong answers. So what is known not to
change between two loads of one checkpoint is left alone, even where it hardly matters: weights of
the output head, of an image encoder, rates of dropout. Not noticed: hooks that change activations,
and code of the model that changes while its config does not.
"""

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from offload.errors import ConfigError

_VOLATILE = {
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Config fields that depend on who loads a checkpoint, and how; private ones do too."""

_PIECE_BYTES = 1 << 26
_NUM_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Facts that are equal for two models only if one may read the cache of the other.

    The same in every process, on every device, on every day.

    Attributes
    ----------
    config : str
        Hex digest of the text config, without rotary embeddings and without what depends on how a
        checkpoint was loaded: paths, versions, dtype, attention implementation, token ids, outputs.
    rotary : str
        What the text config says of rotary embeddings and lengths, as JSON, for people to read.
    weights : str
        Hex digest of parameters and persistent buffers, or of the id given instead.
    dtype : str
        Such as ``"bfloat16"``.
    """

    config: str
    rotary: str
    weights: str
    dtype: str


def identify(model: PreTrainedModel, weights_id: str | None = None) -> ModelIdentity:
    """Return the identity of a model.

    Reads every byte of the weights once, 0.05 s/GB on one core and the copy to the host where they
    are elsewhere; a sum on the device would be no cheaper on the host, and would miss exchanged
    rows. The digest is kept until a tensor is added, removed, replaced or written to, which takes
    milliseconds to find out. Writes through ``Tensor.data``, as by merging adapters, are known by
    64 samples of each tensor, so one that changes only a few elements may be missed.

    Parameters
    ----------
    model : PreTrainedModel
        Also one with adapters: their weights, scales and whether they are active count.
    weights_id : str, optional
        Stands for the weights, which are then not read: the revision of a checkpoint, say, changed
        whenever its weights or adapters are.

    Raises
    ------
    ConfigError
        The weights cannot be read: they are on the meta device, or in no plain tensors.
    """
    rotary, rest = _split(_canonical(text_config(model).to_dict()))
    weights = _weights(model) if weights_id is None else _digest(["weights_id", weights_id])
    return ModelIdentity(
        config=_digest(rest),
        rotary=_json(rotary),
        weights=weights,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def text_config(model: PreTrainedModel) -> Any:
    """Return the part of the model's config that describes its decoder of text."""
    return model.config.get_text_config(decoder=True)


def find_model(config: Any) -> PreTrainedModel:
    """Return the live model that has this very config object, in itself or in a part of it.

    Looks at every object of the process (0.4 s per million), so it is not for every step.

    Raises
    ------
    ConfigError
        There is none, or several.
    """
    # isinstance would ask lazy modules and dead proxies for their class, and they object.
    alive = gc.get_objects()
    models: list[PreTrainedModel]
    models = [each for each in alive if issubclass(type(each), PreTrainedModel)]
    users = [model for model in models if _uses(model, config)]
    parts = {id(part) for model in users for part in model.modules() if part is not model}
    found = [model for model in users if id(model) not in parts]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} live models have the {type(config).__name__} of this cache; pass model="
        )
    return found[0]


def _uses(model: PreTrainedModel, config: Any) -> bool:
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(each is config for own in configs for each in (own, *vars(own).values()))


def _canonical(value: Any) -> Any:
    """Return what JSON would make of a value, without what is volatile.

    ``None`` is a field that is not there, and 1.0 is 1: configs come with either.
    """
    if isinstance(value, Mapping):
        is_config = "model_type" in value
        names = {str(key): key for key in value if value[key] is not None}
        kept = sorted(name for name in names if not (is_config and _is_volatile(name)))
        return {name: _canonical(value[names[name]]) for name in kept}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, torch.dtype):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"the model's config holds {value!r}, a {type(value).__name__}, which JSON cannot say, so "
        "sessions of this model cannot be told from others"
    )


def _is_volatile(name: str) -> bool:
    return name in _VOLATILE or name.startswith(("_", "output_")) or name.endswith("_token_id")


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part what concerns rotary embeddings, some of which scale with the length, from the rest."""
    words = ("rope", "rotary", "max_position_embeddings")
    rotary = {name: config[name] for name in config if any(word in name for word in words)}
    return rotary, {name: config[name] for name in config if name not in rotary}


_known: WeakKeyDictionary[PreTrainedModel, tuple[str, str]] = WeakKeyDictionary()
"""Validity stamp and digest of the weights of a model."""


def _weights(model: PreTrainedModel) -> str:
    tensors = dict(sorted(_tensors(model)))
    adapters = _adapters(model)
    stamp = _digest([adapters, {name: _stamp(tensor) for name, tensor in tensors.items()}])
    before = _known.get(model)
    if before is not None and before[0] == stamp:
        return before[1]
    hashes: dict[tuple[Any, ...], str] = {}
    rows = []
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in hashes:  # tied weights are read once
            hashes[place] = _hash(tensor)
        rows.append([name, list(tensor.shape), str(tensor.dtype), hashes[place]])
    digest = _digest([adapters, rows])
    _known[model] = stamp, digest
    return digest


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint of the model would hold, and refuse what has no bytes here."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or hasattr(tensor, "__tensor_flatten__"):
            kind = f"a {type(tensor).__name__}"
        elif tensor.is_meta or tensor.layout != torch.strided:
            kind = f"a {tensor.layout} tensor on {tensor.device}"
        else:
            yield name, tensor
            continue
        raise ConfigError(
            f"{name} of {type(model).__name__} is {kind}, whose bytes cannot be read, so the model "
            "cannot be told from others; pass weights_id=, such as its revision"
        )


def _adapters(model: PreTrainedModel) -> Any:
    """Return what the layers of PEFT know beside their tensors: which act, and how strongly."""
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    return [
        [path, *(_canonical(getattr(layer, name, None)) for name in names)]
        for path, layer in model.named_modules()
        if hasattr(layer, "_active_adapter")
    ]


def _stamp(tensor: Tensor) -> list[Any]:
    version = 0 if tensor.is_inference() else tensor._version
    # An odd stride does not stay in one column.
    samples = tensor.reshape(-1)[:: tensor.numel() // _NUM_SAMPLES | 1]
    return [tensor.data_ptr(), version, list(tensor.shape), str(tensor.dtype), _hash(samples)]


def _hash(tensor: Tensor) -> str:
    """Return the XXH3 hash of the elements of a tensor in row-major order."""
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    hasher = xxhash.xxh3_128()
    for piece in content.split(_PIECE_BYTES):
        hasher.update(piece.cpu().numpy().data)
    return hasher.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(_json(value).encode(), digest_size=16).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
