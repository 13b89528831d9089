"""What must be equal for one cache to read the keys and values of another."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offload.types import ChunkLayout

FORMAT = "1"
"""Of records, session files and keys together; another one is another namespace."""

_MODEL_FIELDS = ("format", "config", "rotary", "weights", "model_dtype", "salt")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Named facts about a model, its keys and values, and the tenant.

    Digests are BLAKE2b over canonical JSON: the same in every process, on every day.

    Attributes
    ----------
    fields : mapping of str to str
        ``format``, ``config``, ``rotary``, ``weights``, ``model_dtype``, ``salt``, and ``dtype``,
        ``layout``, ``layers`` of the keys and values.
    """

    fields: Mapping[str, str]

    @property
    def digest(self) -> bytes:
        """32 bytes that differ if any field does."""
        return _digest(dict(self.fields))

    @property
    def fingerprint(self) -> bytes:
        """The part of the digest that every record carries, 16 bytes."""
        return self.digest[:16]

    @property
    def model_digest(self) -> bytes:
        """32 bytes that differ if the model or the tenant does, whatever the layout of chunks."""
        return model_digest(self.fields)

    def difference(self, other: "Namespace") -> str | None:
        """Say which field of ``other`` is not as here; None if all are."""
        for name in sorted({*self.fields, *other.fields}):
            mine, theirs = self.fields.get(name), other.fields.get(name)
            if mine != theirs:
                return f"{name}: {mine!r}, not {theirs!r}"
        return None


def make_namespace(
    model: Mapping[str, str], layout: ChunkLayout, layers: list[int], salt: str
) -> Namespace:
    """Return the namespace of a cache.

    Parameters
    ----------
    model : mapping of str to str
        ``config``, ``rotary``, ``weights`` and ``dtype``.
    layout : ChunkLayout
    layers : list of int
        The offloaded layers.
    salt : str
        Of the tenant; only its digest is kept.
    """
    return Namespace(
        {
            **model_fields(model, salt),
            "dtype": str(layout.dtype).removeprefix("torch."),
            "layout": (
                f"{layout.num_kv_heads} KV heads, {layout.chunk_tokens} tokens, "
                f"{layout.key_dim}+{layout.value_dim} wide"
            ),
            "layers": ",".join(map(str, layers)),
        }
    )


def model_fields(model: Mapping[str, str], salt: str) -> dict[str, str]:
    """Return the fields that do not depend on the keys and values."""
    hidden = hashlib.blake2b(salt.encode(), digest_size=16).hexdigest()
    parts = {name: model[name] for name in ("config", "rotary", "weights")}
    return {"format": FORMAT, **parts, "model_dtype": model["dtype"], "salt": hidden}


def model_digest(fields: Mapping[str, str]) -> bytes:
    """Return 32 bytes that stand for the fields of ``model_fields``."""
    return _digest({name: fields[name] for name in _MODEL_FIELDS})


def layout_text(layout: ChunkLayout) -> str:
    """Return a layout as the catalog keeps it."""
    dtype = str(layout.dtype).removeprefix("torch.")
    numbers = (layout.num_kv_heads, layout.chunk_tokens, layout.key_dim, layout.value_dim)
    return json.dumps([*numbers, dtype])


def parse_layout(text: object) -> ChunkLayout | None:
    """Read what ``layout_text`` wrote; None if it is damaged."""
    try:
        *numbers, dtype = json.loads(str(text))
        heads, tokens, key_dim, value_dim = map(int, numbers)
        return ChunkLayout(heads, tokens, key_dim, value_dim, named_dtype(dtype))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return None


def named_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name such as ``bfloat16``; ValueError if there is none."""
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _digest(fields: dict[str, str]) -> bytes:
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()
