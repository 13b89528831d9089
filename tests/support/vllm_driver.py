"""A process that is vLLM's own tiering manager over our tier, and no GPU.

Run by ``tests/integration/test_vllm_tier.py`` with an unpacked vLLM in ``PYTHONPATH``; it prints
one line of JSON. Everything but the configuration is vLLM's own: the factory that loads the tier by
name, the CPU tier in shared memory, and the manager that cascades, promotes and counts references.
"""

import argparse
import contextlib
import inspect
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload import config as engine
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

WAIT_S = 60.0


class Driver:
    """vLLM's manager with a small CPU tier, and what its scheduler and worker would do.

    Parameters
    ----------
    root, quota : str
    row_bytes, primary_chunks : int
    model : str
    deadline_s : float
    """

    def __init__(
        self,
        root: str,
        quota: str,
        row_bytes: int,
        primary_chunks: int,
        model: str,
        deadline_s: float,
    ) -> None:
        sizes = {
            "engine_id": f"offload-test-{secrets.token_hex(6)}",
            "rank": None,
            "cpu_page_size": row_bytes,
        }
        # Blocks were renamed to chunks in 0.32.
        known = inspect.signature(SharedOffloadRegion).parameters
        noun = "chunk" if "num_chunks" in known else "block"
        count = {f"num_{noun}s": primary_chunks}
        region = SharedOffloadRegion(**sizes, **count, **{f"kv_bytes_per_{noun}": row_bytes})
        os.unlink(region.mmap_path)  # else a killed process leaves it behind; it stays mapped
        primary = CPUPrimaryTierOffloadingManager(mmap_region=region, **count)
        view = primary.get_kv_memoryview()
        settings = {
            "type": "OffloadTier",
            "module_path": "offload.plugins.vllm_tier",
            "root": root,
            "quota": quota,
            "deadline_s": deadline_s,
        }
        self.tier = SecondaryTierFactory.create_secondary_tier(settings, view, _spec(model))
        self.manager = TieringOffloadingManager(primary, [self.tier])
        self.lock = getattr(self.manager, "lock", contextlib.nullcontext())
        self._memory = region._base.view(primary_chunks, row_bytes).numpy().view(np.uint8)
        self._chunk_ids = f"{noun}_ids"
        self._longest_s = 0.0

    def close(self) -> None:
        self._memory = None
        self.manager.shutdown()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call as the scheduler does, and remember the longest that it was kept waiting."""
        begun = time.monotonic()
        with self.lock:
            result = function(*args)
        self._longest_s = max(self._longest_s, time.monotonic() - begun)
        return result

    @property
    def longest_s(self) -> float:
        return self._longest_s

    def step(self) -> None:
        fields = {"new_req_ids": (), "preempted_req_ids": ()}
        known = {name: fields.get(name, ()) for name in ScheduleEndContext._fields}
        self.call(self.manager.on_schedule_end, ScheduleEndContext(**known))
        time.sleep(0.001)  # what a step of a model takes, at least

    def store(self, numbers: Sequence[int]) -> int:
        """Store blocks as a request that has computed them; return how many vLLM took."""
        context = ReqContext(req_id=f"store-{numbers[0]}")
        keys = [key_of(number) for number in numbers]
        self.call(self.manager.on_new_request, context)
        output = self.call(self.manager.prepare_store, keys, context)
        if output is not None and output.keys_to_store:
            places = getattr(output.store_spec, self._chunk_ids)
            wanted = dict(zip(keys, numbers, strict=True))
            for key, place in zip(output.keys_to_store, places, strict=True):
                self._memory[int(place)] = content(wanted[key], self._memory.shape[1])
            self.call(self.manager.complete_store, list(output.keys_to_store), context)
        self.call(self.manager.on_request_finished, context)
        return 0 if output is None else len(output.keys_to_store)

    def settle(self, timeout_s: float = WAIT_S) -> bool:
        """Step until no transfer is under way."""
        end = time.monotonic() + timeout_s
        while self.manager.has_pending_work() and time.monotonic() < end:
            self.step()
        return not self.manager.has_pending_work()

    def load(self, numbers: Sequence[int]) -> dict[str, int]:
        """Look blocks up as a request that needs them; count what came of it."""
        context = ReqContext(req_id=f"load-{numbers[0]}")
        self.call(self.manager.on_new_request, context)
        found = {"equal": 0, "wrong": 0, "miss": 0}
        waiting = list(numbers)
        promoted: list[int] = []
        end = time.monotonic() + WAIT_S
        while waiting and time.monotonic() < end:
            still: list[int] = []
            for number in waiting:
                result = self.call(self.manager.lookup, key_of(number), context)
                if result is LookupResult.HIT:
                    promoted.append(number)
                elif result is LookupResult.MISS:
                    found["miss"] += 1
                else:
                    still.append(number)
            waiting = still
            self.step()
        for number in promoted:
            spec = self.call(self.manager.prepare_load, [key_of(number)], context)
            [place] = getattr(spec, self._chunk_ids)
            same = np.array_equal(self._memory[int(place)], content(number, self._memory.shape[1]))
            found["equal" if same else "wrong"] += 1
            self.call(self.manager.complete_load, [key_of(number)], context)
        self.call(self.manager.on_request_finished, context)
        return found | {"late": len(waiting)}


def key_of(number: int) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), 0)


def content(number: int, size: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)


def groups_of(count: int, size: int, first: int = 0) -> list[list[int]]:
    numbers = list(range(first, first + count))
    return [numbers[start : start + size] for start in range(0, count, size)]


def _spec(model: str) -> Any:
    """Return the part of vLLM's specification that tiers read."""
    parallel = {
        name: 0 if "rank" in name or "index" in name else 1
        for name in engine.OffloadingParallelConfig.__dataclass_fields__
    } | {"is_parallelism_agnostic": True}
    group = {"tokens_per_block": 16, "layer_names": ("layer.0",)}
    if "group_id" in engine.OffloadingGroupConfig.__dataclass_fields__:
        group["group_id"] = 0
    config = engine.OffloadingConfig(
        groups=(engine.OffloadingGroupConfig(**group),),
        worker_kv_bytes_per_block=4096,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="test",
        model=engine.OffloadingModelConfig(name=model, dtype="bfloat16"),
        cache=engine.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=engine.OffloadingParallelConfig(**parallel),
    )
    return SimpleNamespace(config=config, blocks_per_chunk=1, extra_config={})


def run_store(driver: Driver, args: argparse.Namespace) -> dict[str, Any]:
    taken = 0
    begun = time.monotonic()
    for group in groups_of(args.count, args.group, args.first):
        taken += driver.store(group)
        assert driver.settle()
    return {"taken": taken, "store_s": time.monotonic() - begun}


def run_load(driver: Driver, args: argparse.Namespace) -> dict[str, Any]:
    total: dict[str, int] = {}
    begun = time.monotonic()
    for group in groups_of(args.count, args.group, args.first):
        for name, number in driver.load(group).items():
            total[name] = total.get(name, 0) + number
    return total | {"load_s": time.monotonic() - begun}


def run_kill(driver: Driver, args: argparse.Namespace) -> dict[str, Any]:
    """Store for ever, and say after each request that its blocks are there."""
    for group in groups_of(args.count, args.group, args.first):
        driver.store(group)
        driver.settle()
        print(group[-1], flush=True)
    signal.pause()
    return {}


def run_hang(driver: Driver, args: argparse.Namespace) -> dict[str, Any]:
    """Store and look up while the disk hangs, then again when it answers."""
    groups = groups_of(args.count, args.group)
    for group in groups[: len(groups) // 2]:
        driver.store(group)
        assert driver.settle()
    gate = threading.Event()
    files = driver.tier.store._files

    def hung_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        gate.wait()
        return os.preadv(fd, buffers, offset)

    def hung_write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        gate.wait()
        return os.pwritev(fd, buffers, offset)

    files.io.preadv, files._pwritev = hung_read, hung_write
    driver._longest_s = 0.0
    while_hanging = driver.load(groups[0])
    driver.store(groups[-1])
    settled = driver.settle()
    again = driver.load(groups[1])
    longest = driver.longest_s
    gate.set()
    end = time.monotonic() + WAIT_S
    while driver.tier.store.is_hanging and time.monotonic() < end:
        driver.step()
    return {
        "while_hanging": while_hanging,
        "again": again,
        "settled": settled,
        "longest_s": longest,
        "after": driver.load(groups[2]),
    }


RUNS = {"store": run_store, "load": run_load, "kill": run_kill, "hang": run_hang}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("root")
    parser.add_argument("--quota", default="1GiB")
    parser.add_argument("--row-bytes", type=int, default=65536)
    parser.add_argument("--primary", type=int, default=48)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--model", default="test/model")
    parser.add_argument("--deadline-s", type=float, default=30.0)
    args = parser.parse_args()
    driver = Driver(
        args.root, args.quota, args.row_bytes, args.primary, args.model, args.deadline_s
    )
    num_found = driver.tier.store.num_blocks
    result = RUNS[args.run](driver, args)
    stats = driver.manager.get_stats()
    blocks = driver.tier.store.num_blocks
    driver.close()
    report = {"num_found": num_found, "num_blocks": blocks, "longest_s": driver.longest_s}
    counters = {} if stats is None else {k: v for k, v in stats.reduce().items() if "disk" in k}
    sys.stdout.write(json.dumps(report | {"stats": counters} | result) + "\n")


if __name__ == "__main__":
    main()
