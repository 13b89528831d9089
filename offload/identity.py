"""Placeholder until the real one is written (another engineer)."""

import gc
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    config: str
    rotary: str
    weights: str
    dtype: str


def identify(model: PreTrainedModel, weights_id: str | None = None) -> ModelIdentity:
    h = hashlib.blake2b()
    for n, p in sorted(model.named_parameters()):
        h.update(n.encode() + p.detach().float().numpy().tobytes())
    d = model.config.to_dict()
    d.pop("dtype", None)
    c = hashlib.blake2b(json.dumps(d, sort_keys=True, default=str).encode()).hexdigest()
    return ModelIdentity(c, "", h.hexdigest(), str(model.dtype).removeprefix("torch."))


def find_model(config: Any) -> PreTrainedModel:
    return next(m for m in gc.get_objects() if type(m).__mro__[0:1] and isinstance(m, PreTrainedModel) and m.config is config)
