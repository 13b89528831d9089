"""Where the blocks of a simulated box are, and moving them: up before use, down behind it."""

from collections.abc import Sequence
from typing import Final

from offload.bench.sim_machine import TIERS, Box
from offload.bench.sim_tiers import BlockTier, Link

LINKS: Final = ("bus", "bus_out", "disk", "net_in", "net_out")
"""Of every box. ``disk`` reads and writes; the others go one way each."""


class Store:
    """The tier that all boxes share, and its links."""

    def __init__(self, box: Box, block_tokens: int) -> None:
        self.blocks = BlockTier(box.remote_bytes // (box.token_bytes * block_tokens))
        self.links = {"store_out": Link(), "store_in": Link()}


class Mover:
    """Tiers and links of one box.

    Every tier holds what was used last, whatever the others hold: what leaves one has been written
    to the next before. A block is read from the fastest tier that has it.

    Parameters
    ----------
    box : Box
    block_tokens : int
    store : Store
    """

    def __init__(self, box: Box, block_tokens: int, store: Store) -> None:
        self._box = box
        self._block_tokens = block_tokens
        self._block_bytes = box.token_bytes * block_tokens
        idle_s = {"device": box.idle_to_host_s, "host": box.idle_to_disk_s}
        self.tiers = {
            name: BlockTier(box.capacity_bytes(name) // self._block_bytes, idle_s.get(name))
            for name in TIERS[:-1]
        } | {"remote": store.blocks}
        self.links = {name: Link() for name in LINKS} | store.links

    def find(self, blocks: Sequence[int], input_tokens: int, now_s: float) -> list[str]:
        """Return the tier of each leading block that is known, and worth reading."""
        found = []
        for block in blocks[: input_tokens // self._block_tokens]:
            tier = next((name for name in TIERS if self.tiers[name].has(block, now_s)), None)
            if tier is None:
                break
            found.append(tier)
        return self._worthwhile(found, input_tokens, now_s) if self._box.is_choosy else found

    def tokens(self, found: Sequence[str], input_tokens: int) -> dict[str, int]:
        """Return how many tokens come from each tier; one at least is always computed."""
        hits = {tier: self._block_tokens * found.count(tier) for tier in TIERS}
        if found and sum(hits.values()) == input_tokens:
            hits[found[-1]] -= 1
        return hits

    def load(self, found: Sequence[str], now_s: float) -> float:
        """Bring blocks to the device; return when they are there."""
        return max(self._read(tier, found.count(tier), now_s) for tier in TIERS)

    def use(self, blocks: Sequence[int], found: Sequence[str], now_s: float) -> set[int]:
        """Note that blocks are used, in every tier that gets them.

        Returns
        -------
        set of int
            Blocks that stay on the host although they are used.
        """
        on_host = set[int]()
        if self._box.attends_on_host:
            on_host = {block for block, tier in zip(blocks, found, strict=False) if tier == "host"}
            self.tiers["device"].drop(on_host)
        self._touch(blocks[: len(found)], on_host, now_s)
        return on_host

    def save(self, blocks: Sequence[int], on_host: set[int], now_s: float) -> tuple[float, int]:
        """Write what lower tiers lack; return when it is there, and the disk's share in blocks."""
        ends, counts = [now_s], {}
        for tier in TIERS[1:]:
            is_there = self._box.capacity_bytes(tier) >= self._block_bytes
            lacking = [each for each in blocks if not self.tiers[tier].has(each, now_s)]
            counts[tier] = len(lacking) if is_there else 0
            ends.append(self._write(tier, counts[tier], now_s))
        self._touch(blocks, on_host, now_s)
        return max(ends), counts["disk"]

    def _touch(self, blocks: Sequence[int], on_host: set[int], now_s: float) -> None:
        for name, tier in self.tiers.items():
            is_all = name != "device" or not on_host
            tier.use(blocks if is_all else (each for each in blocks if each not in on_host), now_s)

    def _read(self, tier: str, count: int, now_s: float) -> float:
        if not count or tier == "device":
            return now_s
        box, num_bytes = self._box, count * self._block_bytes
        ends = [self._send("bus", num_bytes / box.bus_bytes_per_s, count, now_s)]
        if tier == "disk":
            service_s = box.disk_latency_s + num_bytes / box.disk_read_bytes_per_s
            ends.append(self._send("disk", service_s, count, now_s))
        if tier == "remote":
            ends.append(self._send("net_in", num_bytes / box.net_bytes_per_s, count, now_s))
            ends.append(self._send("store_out", num_bytes / box.store_bytes_per_s, count, now_s))
        # Bytes flow through: the slowest link of the way decides.
        return max(ends) + (box.remote_latency_s if tier == "remote" else 0.0)

    def _write(self, tier: str, count: int, now_s: float) -> float:
        if not count:
            return now_s
        box, num_bytes = self._box, count * self._block_bytes
        if tier == "host":
            return self._send("bus_out", num_bytes / box.bus_bytes_per_s, count, now_s)
        if tier == "disk":
            return self._send("disk", num_bytes / box.disk_write_bytes_per_s, count, now_s)
        return max(
            self._send("net_out", num_bytes / box.net_bytes_per_s, count, now_s),
            self._send("store_in", num_bytes / box.store_bytes_per_s, count, now_s),
        )

    def _send(self, link: str, service_s: float, count: int, now_s: float) -> float:
        return self.links[link].use(now_s, service_s, count * self._block_bytes, count)

    def _worthwhile(self, found: list[str], input_tokens: int, now_s: float) -> list[str]:
        """Return the blocks before the first that is computed sooner than read."""
        for tier in ("remote", "disk"):
            if tier not in found:
                continue
            cut = found.index(tier)
            begun = cut * self._block_tokens
            spared = min(len(found) * self._block_tokens, input_tokens) - begun
            if self._wait_s(tier, found.count(tier), now_s) > self._box.prompt_s(spared, begun):
                found = found[:cut]
        return found

    def _wait_s(self, tier: str, count: int, now_s: float) -> float:
        box, num_bytes = self._box, count * self._block_bytes
        if tier == "disk":
            ways = [("disk", box.disk_read_bytes_per_s)]
        else:
            ways = [("net_in", box.net_bytes_per_s), ("store_out", box.store_bytes_per_s)]
        latency_s = box.disk_latency_s if tier == "disk" else box.remote_latency_s
        return latency_s + max(
            self.links[name].begin_s(now_s) - now_s + num_bytes / speed for name, speed in ways
        )
