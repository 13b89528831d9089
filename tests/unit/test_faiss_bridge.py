import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from offload.errors import ConfigError
from offload.index.ann import AnnIndex
from offload.index.faiss_bridge import faiss_module, from_bytes, shared_workers, to_bytes

_NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

_FORK = """
import os
import torch
from offload.index.ann import AnnIndex

torch.set_num_threads(1)
keys, query = torch.randn(2, 900, 64), torch.randn(2, 2, 64)
index = AnnIndex.build(keys, keys)
expected = index.search(query, 30).ids
child = os.fork()
if child == 0:
    same = torch.equal(index.search(query, 30).ids, expected)
    again = torch.equal(AnnIndex.build(keys, keys).search(query, 30).ids, expected)
    os._exit(0 if same and again else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(index.search(query, 30).ids, expected)
"""

# In a process of its own, where no other test has left an index.
_THREADS_END = """
import gc
import threading
import torch
from offload.index.ann import AnnIndex

keys = torch.randn(2, 40, 8)
index = AnnIndex.build(keys, keys)
other = AnnIndex.join([index, index])
threads = [t for t in threading.enumerate() if t.name.startswith("offload-faiss")]
assert threads
del index
gc.collect()
assert all(thread.is_alive() for thread in threads)
del other
gc.collect()
for thread in threads:
    thread.join(10)
    assert not thread.is_alive()
"""

_LAZY = """
import sys
import offload
import offload.index.ann
import offload.index.projection
assert "faiss" not in sys.modules
"""


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def faiss_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("offload-faiss")]


def run(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_build_without_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="install the package faiss-cpu, or faiss-gpu"):
        AnnIndex.build(rows(1, 40, 8), rows(1, 40, 8))


def test_import_of_our_modules_does_not_import_faiss() -> None:
    run(_LAZY)


@_NEEDS_FORK
def test_forked_child_searches_the_index_it_inherited_and_builds_its_own() -> None:
    run(_FORK)


def test_threads_end_with_the_last_index_that_uses_them() -> None:
    run(_THREADS_END)


def test_all_indexes_share_the_same_threads() -> None:
    workers = shared_workers()
    indexes = [AnnIndex.build(rows(4, 40, 8), rows(4, 40, 8)) for _ in range(5)]
    for index in indexes:
        index.search(rows(4, 1, 8), 10)
    assert shared_workers() is workers
    assert len(faiss_threads()) <= (os.cpu_count() or 1)


def test_thread_numbers_of_torch_and_of_the_caller_s_faiss_stay_as_they_were() -> None:
    faiss = faiss_module()
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    AnnIndex.build(rows(2, 400, 8), rows(2, 400, 8)).search(rows(2, 2, 8), 10)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


def test_our_threads_use_one_thread_each() -> None:
    workers, faiss = shared_workers(), faiss_module()
    counts = workers.map(lambda _: int(faiss.omp_get_max_threads()), range(8))
    assert set(counts) == {1}


def test_index_read_back_from_bytes_owns_what_it_holds() -> None:
    faiss = faiss_module()
    keys = rows(30, 8).numpy()
    index = faiss.IndexFlatIP(8)
    index.add(keys)
    data = to_bytes(index)
    copy = from_bytes(data)
    data.zero_()
    np.testing.assert_array_equal(copy.search(keys[:3], 5)[1], index.search(keys[:3], 5)[1])
