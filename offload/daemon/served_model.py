"""The model that a daemon serves, and what identifies it."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.identity import identify, text_config
from offload.local_model import RECALL, load_local_model


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, its tokenizer, and what requests are checked against.

    Attributes
    ----------
    name : str
        As clients call it.
    model : PreTrainedModel
        In evaluation mode; only the engine's thread runs it.
    tokenizer : PreTrainedTokenizerBase
        Fast ones may be used on any thread.
    eos_token_ids : frozenset of int
    max_context_tokens : int
    fingerprint : str
        Hex digest of weights, config, tokenizer and dtype; equal only for models that may read each
        other's keys and values.
    created_s : float
        When it was loaded, in seconds since 1970.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    max_context_tokens: int
    fingerprint: str
    created_s: float

    @property
    def vocab_size(self) -> int:
        """Token ids that the model takes, from 0 on."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])


def load_served_model(
    path_or_name: str = RECALL, dtype: str = "auto", device: str = "auto", name: str | None = None
) -> ServedModel:
    """Load a model from a folder, or the one that comes with the package.

    Parameters
    ----------
    path_or_name : str
        A folder that ``save_pretrained`` wrote, or ``"recall"``.
    dtype : {"auto", "float32", "bfloat16", "float16"}
    device : str
        As torch names it; ``"auto"``: the first CUDA device, or the CPU.
    name : str, optional
        As clients call it; default: the name of the folder.

    Raises
    ------
    ConfigError
        There is no such folder, model, dtype or device.
    """
    model, tokenizer = load_local_model(path_or_name, dtype, device)
    return serve(model, tokenizer, name or Path(path_or_name).name or path_or_name)


def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> ServedModel:
    """Return a model that was loaded already, to be served under a name."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    facts = dataclasses.asdict(identify(model))
    return ServedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_context_tokens=int(limit or tokenizer.model_max_length),
        fingerprint=_digest([facts, _vocabulary(tokenizer)]),
        created_s=time.time(),
    )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), text_config(model), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else map(int, ids))
    return frozenset(found)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what turns text into ids: with another, equal ids would be other text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
