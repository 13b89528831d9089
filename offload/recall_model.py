"""Loading the recall model that ships with the package. For what it is: docs/recall-model.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offload.packaged_model import load_packaged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_recall_model(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its byte-level tokenizer from the installed package.

    Reads local files only and touches no network. Both are ordinary ``transformers`` objects.

    Parameters
    ----------
    dtype : torch.dtype
        Of the weights and hence of the KV cache: ``float32`` or ``bfloat16``.

    Returns
    -------
    model : PreTrainedModel
        A ``Qwen3ForCausalLM`` on the CPU, in evaluation mode: four full-attention layers, two KV
        heads of 64 dimensions each.
    tokenizer : PreTrainedTokenizerBase
        One token per byte; it adds no special tokens. ``build_document`` works without it.
    """
    return load_packaged("AutoModelForCausalLM", "recall_model", dtype)
