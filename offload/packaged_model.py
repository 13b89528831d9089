"""Models that come with the package."""

from importlib import resources
from typing import Any

import torch


def load_packaged(kind: str, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model and its tokenizer from the assets of the package; touches no network.

    Parameters
    ----------
    kind : str
        Name of its class in transformers.
    name : str
        Of its folder.
    dtype : torch.dtype

    Returns
    -------
    model, tokenizer
        The model on the CPU, in evaluation mode.
    """
    # Imported here because it takes seconds, and importing the package should not.
    import transformers
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a few megabytes are there at once
    try:
        with resources.as_file(resources.files("offload") / "assets" / name) as folder:
            model = getattr(transformers, kind).from_pretrained(
                folder, dtype=dtype, local_files_only=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    return model.eval(), tokenizer
