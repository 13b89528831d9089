"""What the engine counts, on its own thread."""

from collections import Counter
from dataclasses import dataclass, field, fields

from offload.daemon.requests import CachedTokens
from offload.daemon.state import Totals


def add(first: CachedTokens, second: CachedTokens) -> CachedTokens:
    """Return the sums, tier by tier."""
    return CachedTokens(
        first.device + second.device,
        first.host + second.host,
        first.disk + second.disk,
        first.remote + second.remote,
    )


@dataclass(slots=True)
class Tally:
    """Counters as in ``Totals``, which ``totals`` copies them to."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    cached: CachedTokens = field(default_factory=CachedTokens)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    restores: int = 0
    restored_bytes: int = 0
    persists: int = 0
    persisted_bytes: int = 0
    failed_persists: int = 0
    evictions: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0

    @property
    def prefill_s_per_token(self) -> float:
        """What a token of a prompt has taken, on average."""
        return self.prefill_s / self.computed_tokens if self.computed_tokens else 0.0

    def totals(self) -> Totals:
        """Return a copy that nobody changes."""
        counts = {each.name: getattr(self, each.name) for each in fields(self)}
        copies = {"evictions": dict(self.evictions), "misses": dict(self.misses)}
        saved_s = self.cached.total * self.prefill_s_per_token
        return Totals(**counts | copies, prefill_s_saved=saved_s)
