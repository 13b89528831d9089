"""Models from folders: what can be loaded, and what is said about what cannot."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.errors import ConfigError
from offload.local_model import load_local_model
from offload.recall_model import load_recall_model
from tests.support.models import make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in bfloat16 with the tokenizer of the shipped model."""
    path = tmp_path / "model"
    model: Any = copy.deepcopy(make_model("llama"))  # the original is shared
    model.to(torch.bfloat16).save_pretrained(path)
    load_recall_model()[1].save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_model_from_a_folder_has_the_dtype_asked_for(
    folder: Path, dtype: str, expected: torch.dtype
) -> None:
    model, tokenizer = load_local_model(str(folder), dtype, "cpu")
    assert model.dtype == expected
    assert not model.training
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_recall_model_has_the_dtype_asked_for(dtype: str, expected: torch.dtype) -> None:
    model, _ = load_local_model("recall", dtype, "cpu")
    assert model.dtype == expected


def _remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _name_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def _name_unknown_code(folder: Path) -> None:
    config = '{"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "novel.Novel"}}'
    (folder / "config.json").write_text(config)
    (folder / "novel.py").write_text("raise SystemExit('code of the folder was run')")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove_all, "no such folder; give a local folder or 'recall'"),
        (_remove_config, "no config.json in it; give a local folder or 'recall'"),
        (_remove_tokenizer, "no usable tokenizer: "),
        (_remove_weights, "no usable causal language model: Error no file named model"),
        (_truncate_weights, "no usable causal language model: Error while deserializing"),
        (_name_another_kind, "no usable causal language model: Unrecognized configuration"),
        (_name_unknown_code, "no usable causal language model: "),
    ],
)
def test_model_from_an_incomplete_folder_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder)
    start = re.escape(f"model {str(folder)!r}: {reason}")
    with pytest.raises(ConfigError, match=f"^{start}.*$") as refused:
        load_local_model(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_model_without_tokenizer_is_refused_also_where_transformers_makes_one_up(
    architecture: str, tmp_path: Path
) -> None:
    make_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_local_model(str(tmp_path))


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        ("float8", "cpu", "unknown dtype 'float8'; known: auto, float32, bfloat16, float16"),
        ("auto", "abacus", "device 'abacus' cannot be used: "),
        ("auto", "cuda:99", "device 'cuda:99' cannot be used: "),
    ],
)
def test_model_with_an_impossible_dtype_or_device_is_refused(
    dtype: str, device: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load_local_model("recall", dtype, device)
