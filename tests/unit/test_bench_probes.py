"""Bandwidths, dense attention, and where numbers come from."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from offload.bench.dense import FORMS, DenseCache
from offload.bench.provenance import read_provenance
from offload.bench.yardstick import DiskProbe, Yardstick
from offload.errors import ConfigError, StorageError
from offload.kernels.reference import partial_attention
from offload.machine import read_disk

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize("form", FORMS)
def test_form_of_dense_attention_gives_the_answer_of_the_reference(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 1, 32, generator=generator)
    keys, values = (torch.randn(2, 2, 50, 32, generator=generator) for _ in range(2))
    chunks = (keys.unsqueeze(1), values.unsqueeze(1))
    expected = partial_attention(query, *chunks, scale=32**-0.5).out.transpose(1, 2)
    torch.testing.assert_close(FORMS[form](query, keys, values), expected)


def test_dense_cache_returns_all_tokens_in_the_order_of_updates() -> None:
    cache = DenseCache(2, 1, 2, 6, 4, torch.float32, CPU)
    states = torch.arange(48.0).view(1, 2, 6, 4)
    cache.update(states[:, :, :5], -states[:, :, :5], 1)
    keys, values = cache.update(states[:, :, 5:], -states[:, :, 5:], 1)
    assert torch.equal(keys, states)
    assert torch.equal(values, -states)


def test_dense_cache_chooses_one_of_the_forms() -> None:
    cache = DenseCache(1, 1, 2, 64, 32, torch.float32, CPU)
    keys, values = torch.randn(2, 1, 2, 64, 32)
    cache.update(keys, values, 0)
    cache.choose_form(torch.randn(1, 4, 1, 32))
    assert cache.form in FORMS


@pytest.mark.leaks
def test_yardstick_measures_memory_and_disk_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    with Yardstick(CPU, directory, has_disk=True) as yardstick:
        found = [yardstick.measure() for _ in range(2)]
        assert len(list(directory.iterdir())) == 1
    assert all(each.memory > 0 and each.disk is not None and each.disk > 0 for each in found)
    assert list(directory.iterdir()) == []


def test_yardstick_without_a_disk_measures_none() -> None:
    with Yardstick(CPU) as yardstick:
        assert yardstick.measure().disk is None


@pytest.mark.leaks
def test_disk_probe_of_a_short_read_raises_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    with DiskProbe(directory, 8 * MIB) as probe:
        monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 7)
        with pytest.raises(StorageError, match=f"read 7 of {MIB} bytes"):
            probe.measure()
    assert list(directory.iterdir()) == []


def test_disk_probe_without_room_refuses_before_it_writes(tmp_path: Path) -> None:
    probe = DiskProbe(tmp_path, read_disk(tmp_path).free_bytes)
    with pytest.raises(ConfigError, match="leaves as many free"), probe:
        pass
    assert list(tmp_path.iterdir()) == []


def test_provenance_names_software_and_fits_into_json() -> None:
    found = read_provenance()
    assert found.versions["torch"] == torch.__version__
    assert found.num_threads == torch.get_num_threads()
    assert json.loads(json.dumps(asdict(found)))["num_cores"] == found.num_cores
