"""Attention to the rows that a search has found, the next ones on their way meanwhile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.index.base import NO_TOKEN, Hits, KeyIndex
from offload.kernels import dispatch
from offload.kernels.reference import merge
from offload.kernels.rows import attend_to
from offload.sparse.importance import ImportanceWatch
from offload.sparse.outlook import Run
from offload.sparse.row_demand import Sought
from offload.sparse.row_keys import Ints
from offload.sparse.row_reader import RowReader
from offload.sparse.self_check import SelfCheck
from offload.types import ChunkLayout, Partial


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What some KV heads of one row ask at one position, and what a search said to read.

    Attributes
    ----------
    query : Tensor, shape (len(heads), group_size, key_dim)
        Scaled.
    index : KeyIndex
    run : Run
    hits : Hits
    likely : Tensor, int64 [len(heads), num_tokens]
        The ids of the hits, and of what is just below the cut, if it is to be read ahead.
    """

    query: Tensor
    index: KeyIndex
    run: Run
    hits: Hits
    likely: Tensor


class RowAttention:
    """Reads what questions name, and attends to it.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    rows : RowReader
    layout : ChunkLayout
    has_tail : bool
        Whether what is not read is estimated.
    max_wait_s : float or None
        Longest wait for one question; what has not arrived is estimated.
    check : SelfCheck
    watch : ImportanceWatch, optional
    """

    def __init__(
        self,
        rows: RowReader,
        layout: ChunkLayout,
        has_tail: bool,
        max_wait_s: float | None,
        check: SelfCheck,
        watch: ImportanceWatch | None = None,
    ) -> None:
        self._rows = rows
        self._layout = layout
        self._has_tail = has_tail
        self._max_wait_s = max_wait_s
        self._check = check
        self._watch = watch

    def begin(self, question: Question) -> Sought:
        """Begin to read. Several questions may be begun before the first one is answered."""
        return self._rows.begin(*question.run, question.hits.ids.cpu().numpy())

    def finish(self, question: Question, sought: Sought) -> Partial:
        """Wait for what was begun, and attend to it; ``out`` is [heads, group_size, value_dim]."""
        layout, query, index = self._layout, question.query, question.index
        run, hits = question.run, question.hits
        found = self._rows.finish(sought, deadline_s=self._max_wait_s)
        addresses = torch.from_numpy(found).to(query.device)
        if index.tail_takes_values and self._has_tail:
            rows = dispatch.read_rows(addresses, layout.row_dim, layout.dtype).float()
            values = rows[..., layout.key_dim :]
            read = attend_to(query, rows, addresses != 0)
        else:
            values = query.new_empty(*addresses.shape, 0)
            read = dispatch.attend_rows(query, addresses, layout.value_dim, layout.dtype)
        tail = index.tail(query, hits, addresses != 0, values) if self._has_tail else None
        merged = read if tail is None else merge([read, tail])
        if self._watch is not None:
            self._watch.add(query, run, hits.ids, addresses, merged.lse)
        if question.likely is not hits.ids:
            # Late ones first, then those just below the cut.
            self._rows.prefetch(*run, _unread(question.likely.cpu().numpy(), found))
        drawn = self._check.draw(len(run.heads))
        if drawn is not None:
            answer = Partial(merged.out[drawn], merged.lse[drawn])
            self._check.start(run.heads[drawn], query[drawn], run.chunks, answer)
        return merged

    def release(self) -> None:
        """Declare that nobody needs what was begun or read any more."""
        self._rows.release()


def _unread(likely: Ints, addresses: Ints) -> Ints:
    """Return ids without those that have an address, the first ones; -1 in their place."""
    ids = likely.copy()
    ids[:, : addresses.shape[1]][addresses != 0] = NO_TOKEN
    return ids
