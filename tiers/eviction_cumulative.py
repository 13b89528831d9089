"""The chunk with the least attention ever goes first: the score of H2O, as a baseline."""

from offload.tiers.eviction_ghosts import DEFAULT_GHOSTS
from offload.tiers.eviction_mass import LeastMass


class LeastCumulativeMass(LeastMass):
    """Ranks chunks by all the attention they ever got.

    What was important once stays so; ``LeastMass`` forgets.

    Parameters
    ----------
    num_ghosts : int
        Chunks of other tiers that are remembered.

    Notes
    -----
    Zhang et al., H2O (arXiv:2306.14048), over chunks instead of tokens, and what goes is not lost.
    Its other half, the most recent tokens, is the runtime's window, which is in no policy's hands.
    """

    def __init__(self, num_ghosts: int = DEFAULT_GHOSTS) -> None:
        super().__init__(decay=1.0, num_ghosts=num_ghosts)
