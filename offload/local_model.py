"""Load a causal language model from a folder on this machine. Never downloads anything."""

import textwrap
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload.errors import ConfigError
from offload.recall_model import load_recall_model

RECALL: Final = "recall"
"""Names the model that ships with the package."""

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_local_model(
    name: str, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name : str
        A folder that ``save_pretrained`` wrote, or ``"recall"`` for the model in the package.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of weights and KV cache; ``"auto"`` is what the folder says.
    device : str
        As torch names it; ``"auto"`` is the first CUDA device, or the CPU where there is none.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    ConfigError
        No such folder, dtype or device; or the folder holds no causal language model of an
        architecture that transformers knows, or no tokenizer. Code in the folder is never run.
    """
    target = find_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    model: Any  # mypy takes the methods of a PreTrainedModel for tensors
    if name == RECALL:
        model, tokenizer = load_recall_model(DTYPES.get(dtype, torch.float32))
    else:
        model, tokenizer = _load_folder(Path(name), DTYPES.get(dtype, dtype))
    model = model.to(target).eval()
    return model, tokenizer


def find_device(name: str) -> torch.device:
    """Return the device of a name, or raise ConfigError if this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 120, placeholder=" …")
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error
    return device


def _load_folder(
    folder: Path, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (folder / "config.json").is_file():
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ConfigError(f"model {str(folder)!r}: {what}; give a local folder or {RECALL!r}")
    # Weights take minutes, a tokenizer does not: if it is missing, say so first.
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, folder, "tokenizer")
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty one up where the folder has none.
        raise ConfigError(f"model {str(folder)!r}: no usable tokenizer: it makes nothing of 'a'")
    model: PreTrainedModel = _load(
        AutoModelForCausalLM, folder, "causal language model", dtype=dtype
    )
    return model, tokenizer


def _load(auto: Any, folder: Path, what: str, **arguments: Any) -> Any:
    try:
        return auto.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **arguments
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise ConfigError(f"model {str(folder)!r}: no usable {what}: {reason}") from error
