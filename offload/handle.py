"""What ``Cache.update`` hands to the model instead of the whole cache.

An unmodified attention layer passes what ``update`` returned straight to the attention function.
So ``update`` may return stand-ins: tensors of the full logical shape on the meta device, which take
no memory, carry a handle that the attention dispatcher recognises, and make any other use of them
fail loudly instead of computing something wrong.
"""

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offload.core import CacheCore
from offload.exact import AttentionCall
from offload.sequence import Appended

_ATTRIBUTE = "_offload_handle"


@dataclass(frozen=True, slots=True)
class Handle:
    """The keys and values of one layer, as of one ``update``.

    Attributes
    ----------
    core : CacheCore
    layer : int
    appended : Appended
    """

    core: CacheCore
    layer: int
    appended: Appended

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend with the layer's queries; see ``Runtime.attend``."""
        return self.core.attend(self.layer, call, self.appended)

    def expanded(self, keys: Tensor, values: Tensor) -> "Handle":
        """Return the handle with the new latents replaced by what the model made of them."""
        if self.appended.keys is None:
            return self
        return replace(self, appended=replace(self.appended, keys=keys, values=values))


def stand_ins(
    handle: Handle, keys: Tensor, values: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return meta tensors ``[batch, num_kv_heads, num_tokens, dim]`` that carry the handle."""
    result = []
    for new in (keys, values):
        shape = (*new.shape[:2], num_tokens, new.shape[3])
        stand_in = torch.empty(shape, dtype=new.dtype, device="meta")
        setattr(stand_in, _ATTRIBUTE, handle)
        result.append(stand_in)
    return result[0], result[1]


class _Latents(threading.local):
    """The latents that an MLA layer on this thread has cached and not yet attended to.

    Such a layer expands what ``update`` returned before it calls attention, so a stand-in would not
    get through. It is given its new latents as they are, and attention finds the handle here. The
    weak reference tells whether the layer that asked is still running: it holds the tensor.
    """

    def __init__(self) -> None:
        self.handle: Handle | None = None
        self.returned: weakref.ref[Tensor] | None = None


_latents = _Latents()


def leave_latents(handle: Handle, returned: Tensor) -> None:
    """Leave a handle for the attention call of the MLA layer that is running on this thread."""
    _latents.handle = handle
    _latents.returned = weakref.ref(returned)


def find_handle(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Handle | None:
    """Return the handle behind the keys of an attention call; None if they are plain tensors.

    Raises
    ------
    RuntimeError
        One of them is a stand-in that lost its handle: the model edits it after ``update``.
    """
    handle: Handle | None = getattr(key, _ATTRIBUTE, None)
    if handle is not None and getattr(value, _ATTRIBUTE, None) is handle:
        return handle
    if (key.is_meta or value.is_meta) and not query.is_meta:
        raise RuntimeError(
            f"{type(module).__name__} changes keys or values after Cache.update, which "
            "OffloadedCache cannot follow; use DynamicCache(offloading=True) with this model"
        )
    handle, returned = _latents.handle, _latents.returned
    if handle is None or not hasattr(module, "expand_kv"):
        return None
    if returned is None or returned() is None or module.layer_idx != handle.layer:
        return None
    _latents.handle = _latents.returned = None
    return handle
