"""Below which length a layer had better read everything."""

import torch

from offload.machine_model import model_machine
from offload.prefetch.planner import break_even_tokens
from offload.sparse.plan import SparsePlan
from offload.types import ChunkLayout


class BreakEven:
    """The length of context below which sparse attention does not pay, on this machine.

    It is found once, so that a cache does not change its mind in the middle of a text; costs are
    those of memory, which is where short contexts are.

    Parameters
    ----------
    plan : SparsePlan
    layout : ChunkLayout
    device : torch.device
        Where attention runs.
    """

    def __init__(self, plan: SparsePlan, layout: ChunkLayout, device: torch.device) -> None:
        self._plan = plan
        self._layout = layout
        self._device = device
        self._tokens = None if plan.dense_below == "auto" else plan.dense_below

    def is_dense(self, num_context: int, num_heads: int) -> bool:
        """Whether a context of so many tokens is better read as a whole.

        Parameters
        ----------
        num_context : int
        num_heads : int
            Of the query.
        """
        if self._tokens is None:
            group = num_heads // self._layout.num_kv_heads
            model = model_machine(self._layout, group, self._device, index=self._plan.index)
            self._tokens = break_even_tokens(self._plan.budget, model.rates())
        return num_context < self._tokens
