"""A process that is SGLang's own backend factory over our backend, and no GPU.

Run by ``tests/integration/test_sglang_hicache.py`` with an unpacked SGLang in ``PYTHONPATH``.
"""

import argparse
import json
import sys
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

PAGE_TOKENS = 4


class HostPool:
    """Host memory with the three methods of SGLang's pools that a backend calls."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.page_size = PAGE_TOKENS
        self.memory = torch.zeros(num_pages, page_bytes, dtype=torch.uint8)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self.memory[index // PAGE_TOKENS]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.memory[0])

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self.memory[index // PAGE_TOKENS] = data_page


def make_backend(root: str, quota: str, kv: HostPool, mamba: HostPool) -> Any:
    extra = {
        "backend_name": "offload",
        "module_path": "offload.plugins.sglang_hicache",
        "class_name": "OffloadHiCache",
        "interface_v1": 1,
        "root": root,
        "quota": quota,
    }
    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="test/model",
        extra_config=extra,
    )
    backend = StorageBackendFactory.create_backend("dynamic", config, kv)
    backend.register_mem_pool_host(kv)
    backend.register_mem_host_pool_v2(kv, PoolName.KV)
    backend.register_mem_host_pool_v2(mamba, PoolName.MAMBA)
    return backend


def content(num_pages: int, page_bytes: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    shape = (num_pages, page_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def transfers(keys: list[str], indices: torch.Tensor, **mamba: Any) -> list[PoolTransfer]:
    return [
        PoolTransfer(name=PoolName.KV, host_indices=indices, keys=keys),
        PoolTransfer(name=PoolName.MAMBA, host_indices=indices, keys=keys, **mamba),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", choices=("store", "load"))
    parser.add_argument("root")
    parser.add_argument("--count", type=int, default=1024)
    args = parser.parse_args()
    kv, mamba = HostPool(args.count, 65536), HostPool(args.count, 1000)
    backend = make_backend(args.root, "1GiB", kv, mamba)
    expected = [content(args.count, 65536, 1), content(args.count, 1000, 2)]
    keys = [f"page-{number}" for number in range(args.count)]
    indices = torch.arange(args.count * PAGE_TOKENS)
    result: dict[str, Any] = {}
    if args.run == "store":
        kv.memory[:], mamba.memory[:] = expected
        moved = backend.batch_set_v2(transfers(keys, indices))
        result["legacy"] = backend.set("legacy", expected[0][0])
    else:
        trailing = PoolTransfer(
            name=PoolName.MAMBA, keys=keys[:1], hit_policy=PoolHitPolicy.TRAILING_PAGES
        )
        found = backend.batch_exists_v2([*keys, "absent"], [trailing])
        moved = backend.batch_get_v2(transfers(keys, indices))
        pairs = zip((kv, mamba), expected, strict=True)
        same = [(pool.memory == want).all(dim=1) for pool, want in pairs]
        target = torch.zeros(65536, dtype=torch.uint8)
        legacy = backend.get("legacy", target)
        result |= {
            "hit_pages": found.kv_hit_pages,
            "equal": [int(each.sum()) for each in same],
            "legacy": legacy is not None and bool(torch.equal(target, expected[0][0])),
            "absent": backend.get("absent", target) is None,
            "prefix": backend.batch_exists([*keys[:5], "absent", keys[5]]),
        }
    result["moved"] = {str(name): sum(good) for name, good in moved.items()}
    backend.close()
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
