"""Runs of many blocks are read in one call."""

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.tiers.syscalls import VectoredCall
from offload.types import ChunkLayout
from tests.support.channels import assert_holds, find, open_store, put
from tests.support.disk import FlakyCall


@pytest.mark.parametrize(
    "call", [os.preadv, FlakyCall(os.preadv, lambda *_: 1 << 30)], ids=["batch", "one by one"]
)
def test_runs_of_more_files_than_are_open_at_a_time_come_in_one_call(
    tmp_path: Path, call: VectoredCall
) -> None:
    layout = ChunkLayout(2, 1024, 8, 4, torch.bfloat16)
    slots = range(280)
    with closing(open_store(tmp_path, layout=layout, memory_chunks=10000, preadv=call)) as store:
        for slot in slots:
            put(store, [slot], layout=layout)
            if slot % 4 < 2:
                store.flush()
        found = find(store, slots)
        assert found.is_file.sum() >= 129
        assert set(found.run_bytes.tolist()) == {1024, 3072}
        channels = np.array([[0, 3, 4], [1, 2, 7]])
        assert_holds(store, slots, channels, found=found, layout=layout)
        store.close(remove=True)
