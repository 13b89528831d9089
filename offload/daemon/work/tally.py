"""What the engine counts, on its own thread."""

from collections import Counter
from dataclasses import dataclass, field

from offload.daemon.requests import CachedTokens
from offload.daemon.state import Totals


def add(first: CachedTokens, second: CachedTokens) -> CachedTokens:
    """Return the sums, tier by tier."""
    return CachedTokens(
        first.device + second.device, first.host + second.host, first.disk + second.disk
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
        return Totals(
            requests=self.requests,
            cancelled=self.cancelled,
            failed=self.failed,
            prompt_tokens=self.prompt_tokens,
            computed_tokens=self.computed_tokens,
            generated_tokens=self.generated_tokens,
            cached=self.cached,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            prefill_s_saved=self.cached.total * self.prefill_s_per_token,
            restores=self.restores,
            restored_bytes=self.restored_bytes,
            persists=self.persists,
            persisted_bytes=self.persisted_bytes,
            failed_persists=self.failed_persists,
            evictions=dict(self.evictions),
            misses=dict(self.misses),
            preemptions=self.preemptions,
        )
