"""Hold a bound on the error by what the self-check finds."""

import math

_STEP = 0.2
_SHARE_ABOVE = 0.1
_LEAST, _MOST = 0.05, 4.0


class ErrorSteering:
    """Says how much of an error target the index's own expectation may use.

    What an index expects is right on average over heads and wrong for each of them, in a way that
    the text decides. So expectations are held to ``factor`` times the target, and the factor goes
    down by nine steps after a check that missed the target and up by one after a check that kept
    it: it comes to rest where one check in ten misses. This is stochastic approximation of a
    quantile (Robbins and Monro 1951), of the log of the factor.

    Attributes
    ----------
    factor : float
    """

    def __init__(self, factor: float = 0.4) -> None:
        self.factor = factor

    def observe(self, error: float, target: float) -> None:
        """Take note of one measured error."""
        step = _STEP * (_SHARE_ABOVE - (error > target))
        self.factor = min(_MOST, max(_LEAST, self.factor * math.exp(step)))
