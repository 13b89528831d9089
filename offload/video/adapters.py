"""Which adapter goes with a model, and loading both from a folder, without any network."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from offload.errors import ConfigError
from offload.video.adapter import VideoAdapter
from offload.video.llava_next_video import LlavaNextVideo
from offload.video.llava_onevision import LlavaOnevision
from offload.video.qwen3_vl import Qwen3VL
from offload.video.qwen25_vl import Qwen25VL

ADAPTERS: Mapping[str, type[VideoAdapter]] = MappingProxyType(
    {
        "LlavaNextVideoForConditionalGeneration": LlavaNextVideo,
        "LlavaOnevisionForConditionalGeneration": LlavaOnevision,
        "Qwen2_5_VLForConditionalGeneration": Qwen25VL,
        "Qwen3VLForConditionalGeneration": Qwen3VL,
    }
)
"""By the name of the model's class in transformers."""

_PICTURES = ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json")
"""Where processors say what pictures they were trained on; the first that says it counts."""


def find_adapter(model: Any, tokenizer: Any, **options: Any) -> VideoAdapter:
    """Return the adapter of a model.

    Parameters
    ----------
    model : Module
        Of a class in ``ADAPTERS``, or of one that is derived from it.
    tokenizer
        The one of the model.
    **options
        What the adapter's class takes: ``templates``, ``mean``, ``std``, and ``min_tokens`` and
        ``max_tokens`` of Qwen's.

    Raises
    ------
    ConfigError
        There is none, or an option is impossible.
    """
    for base in type(model).__mro__:
        if base.__name__ in ADAPTERS:
            kind = ADAPTERS[base.__name__]
            unknown = options.keys() - kind.option_names
            if unknown:
                raise ConfigError(f"{kind.__name__} has no option {', '.join(sorted(unknown))}")
            return kind(model, tokenizer, **options)
    raise ConfigError(f"{type(model).__name__} is no video model that can be streamed; {_these()}")


def load_adapter(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    **options: Any,
) -> VideoAdapter:
    """Load a model, its tokenizer and what it knows of pictures from a folder.

    Nothing is looked up elsewhere, no code of the folder is run, and torchvision is not needed.

    Parameters
    ----------
    path : str or Path
        As ``save_pretrained`` of model and processor make it.
    dtype : torch.dtype
        Of the weights, and so of keys and values.
    device : str or torch.device
    **options
        As for ``find_adapter``; they win over what the folder says.

    Raises
    ------
    ConfigError
        The folder does not hold such a model, or an option is impossible.
    """
    import transformers

    folder = Path(path)
    known = _read(folder / "config.json")
    names = [name for name in known.get("architectures") or [] if name in ADAPTERS]
    if not names:
        found = ", ".join(known.get("architectures") or ["no architecture"])
        raise ConfigError(f"{folder} holds {found}, which cannot be streamed; {_these()}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = getattr(transformers, names[0]).from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from error
    return find_adapter(model.to(device), tokenizer, **{**_pictures(folder), **options})


def _these() -> str:
    return f"those that can are {', '.join(ADAPTERS)}"


def _pictures(folder: Path) -> dict[str, Any]:
    """Return the mean and deviation of the pictures a model was trained on, if the folder says."""
    for path in (folder / name for name in _PICTURES):
        said = _read(path) if path.is_file() else {}
        for part in (said.get("video_processor"), said.get("image_processor"), said):
            if part and "image_mean" in part and "image_std" in part:
                return {"mean": part["image_mean"], "std": part["image_std"]}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} holds a {type(said).__name__}; an object was expected")
    return said
