"""What the shipped model makes of a text without any of our tiers."""

from typing import Any

import torch
from transformers import DynamicCache

from offload.recall_model import load_recall_model

NEW_TOKENS = 12


def continued(text: str) -> str:
    """Return what it generates, greedily, on a DynamicCache."""
    model, tokenizer = load_recall_model()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    call: Any = model.generate
    output = call(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=DynamicCache(config=model.config),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
