"""The one place that knows how transformers versions differ.

Supported: 5.4 and newer. Older ones pass ``cache_position`` around and ask for masks differently.
"""

import transformers
from packaging.version import Version

from offload.errors import ConfigError

OLDEST = "5.4"
VERSION = Version(transformers.__version__).release

if Version(OLDEST).release > VERSION:
    raise ConfigError(
        f"transformers {transformers.__version__} is installed; offload needs {OLDEST} or newer, "
        "where the cache interface changed: pip install -U transformers"
    )

CROP_IS_RELATIVE = VERSION >= (5, 18)
"""Whether ``Cache.crop(n)`` only takes ``-tokens_to_remove``; before, ``n > 0`` was a length."""

CACHES_LATENTS = VERSION >= (5, 15)
"""Whether MLA models hand compressed latents to the cache and expand them after ``update``."""


def collects_attentions() -> bool:
    """Whether the running forward pass records attention weights (``output_attentions=True``)."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # older releases say so in the keyword arguments only
        return False
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected
