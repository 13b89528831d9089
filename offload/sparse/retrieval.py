"""Sparse attention: search an index, read the tokens it names, estimate the others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.exact import AttentionCall
from offload.index.base import Hits, KeyIndex
from offload.sparse.break_even import BreakEven
from offload.sparse.calls import hidden_tokens, is_plain
from offload.sparse.importance import ImportanceWatch
from offload.sparse.indexes import Holder, LayerIndexes
from offload.sparse.outlook import Outlook, Run
from offload.sparse.plan import SparsePlan
from offload.sparse.queries import QuerySample
from offload.sparse.row_attention import Question, RowAttention
from offload.sparse.row_demand import Sought
from offload.sparse.row_keys import Ints
from offload.sparse.row_reader import RowReader
from offload.sparse.self_check import ErrorStats, SelfCheck
from offload.sparse.steering import ErrorSteering
from offload.store import ChunkStore
from offload.types import ChunkId, Partial

_TOGETHER = 8
"""Rows or positions that are searched for before the first one is waited for; what they read is
copied, and kept until all are attended to."""

_SPARE_PART = 4
"""One more token is searched for, and fetched for the next step, for so many that are read."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of one cache or fork, at one call.

    Attributes
    ----------
    owner : int
        Identity of the cache or fork.
    index : int
        Of the layer in the model.
    number : int
        Of the layer among those that are offloaded.
    version : int
        Changes with the rows.
    rows : sequence of sequence of ChunkId
        The full chunks of every row.
    num_past_chunks : int
        Those of them that come before the queries.
    num_context : int
        Tokens that the last query sees.
    """

    owner: int
    index: int
    number: int
    version: int
    rows: Sequence[Sequence[ChunkId]]
    num_past_chunks: int
    num_context: int


class Retrieval:
    """Sparse attention over one store, for all layers and forks.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    rows : RowReader or None
        Finds the tokens that are read; needed with an index only.
    device : torch.device
        Of the model.
    plan : SparsePlan
    max_wait_s : float or None
        Longest wait for rows, of one layer; what has not arrived is estimated.
    directory : Path or None
        On the disk, where indexes lie if the plan wants them there.
    watch : ImportanceWatch, optional
        Told what was read, and how much attention it got.

    Raises
    ------
    ConfigError
        Indexes are to lie on a disk, and there is none, or they are searched on a device.
    """

    def __init__(
        self,
        store: ChunkStore,
        rows: RowReader | None,
        device: torch.device,
        plan: SparsePlan,
        max_wait_s: float | None = None,
        directory: Path | None = None,
        watch: ImportanceWatch | None = None,
    ) -> None:
        self.plan = plan
        self._watch = watch
        self._store = store
        self._rows = rows
        self._break_even = BreakEven(plan, store.layout, device)
        self._keeps_rows = rows is not None and rows.num_lines > 0 and rows.reads_ahead
        self._device = device
        self._place = torch.device("cpu") if plan.placement == "host" else device
        self.indexes = self._open_indexes(directory)
        self._queries = QuerySample(plan.kept_queries)
        self._steering = ErrorSteering()
        self._check = SelfCheck(store, plan.check_every, self._observe)
        self._attention = (
            None
            if rows is None
            else RowAttention(rows, store.layout, plan.has_tail, max_wait_s, self._check, watch)
        )
        self._outlooks: dict[tuple[int, int], Outlook] = {}

    def _open_indexes(self, directory: Path | None) -> LayerIndexes | None:
        plan = self.plan
        if plan.index is None:
            return None
        if plan.abstracts == "ram":
            return LayerIndexes(self._store, self._place, plan.sizes)
        if directory is None or self._place.type != "cpu":
            raise ConfigError(
                f"abstracts='disk' needs the tier 'disk' and a search on the host; the tiers are "
                f"{[tier.name for tier in self._store.tiers]}, the search is on {self._place}"
            )
        return LayerIndexes(self._store, self._place, plan.sizes, directory)

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexes, and of the queries kept to build them."""
        built = 0 if self.indexes is None else self.indexes.num_bytes
        return built + self._queries.num_bytes

    @property
    def errors(self) -> ErrorStats:
        """How far off the answers were that were checked."""
        return self._check.stats()

    def settle(self) -> None:
        """Wait for what goes on in the background."""
        self._check.settle()
        if self._rows is not None:
            self._rows.settle()
        if self.indexes is not None:
            self.indexes.settle()

    def forget(self, owner: int) -> None:
        """Drop what is kept for one cache or fork."""
        if self._rows is not None:
            self._rows.forget(owner)
        if self.indexes is not None:
            self.indexes.forget(owner)
        if self._watch is not None:
            self._watch.forget(owner)
        self._outlooks = {key: kept for key, kept in self._outlooks.items() if key[0] != owner}

    def close(self) -> None:
        """Stop what goes on in the background. Idempotent."""
        self._check.close()
        if self.indexes is not None:
            self.indexes.close()

    def attend(self, layer: Layer, call: AttentionCall) -> tuple[list[Partial], range]:
        """Attend sparsely to the chunks that may be read so.

        Returns
        -------
        parts : list of Partial
            What that came to, ``out`` [batch, num_heads, num_queries, value_dim].
        covered : range
            The chunks it is about; the others are the caller's.
        """
        watch, num_positions = self._watch, call.query.shape[2]
        if watch is None or num_positions > self.plan.max_queries:
            return self._attend(layer, call)
        watch.begin(layer.owner, layer.number, num_positions * len(layer.rows))
        parts, covered = self._attend(layer, call)
        watch.add_whole(layer.rows, layer.num_past_chunks, covered)
        return parts, covered

    def _attend(self, layer: Layer, call: AttentionCall) -> tuple[list[Partial], range]:
        if layer.number < self.plan.dense_layers or not is_plain(call):
            return [], range(0)
        hidden = hidden_tokens(call.mask)
        if hidden is None:
            return [], range(0)
        size = self._store.layout.chunk_tokens
        ripe = self.plan.ripe(layer.num_past_chunks, size, layer.num_context, hidden)
        if call.query.shape[2] > self.plan.max_queries:
            self._prepare(layer, call, ripe)
            return [], range(0)
        covered = self.plan.covered(ripe, size)
        if covered and self._break_even.is_dense(layer.num_context, call.query.shape[1]):
            return [], range(0)
        if not covered or self.indexes is None:
            positions = call.query.shape[2] * len(layer.rows)
            self._store.counters.covered_tokens += (
                len(covered) * size * self._store.layout.num_kv_heads * positions
            )
            return [], covered
        outlook = self._outlooks.setdefault((layer.owner, layer.index), Outlook())
        outlook.follow(layer.version, ripe, covered)
        return [self._attend_rows(layer, call, outlook)], covered

    def _prepare(self, layer: Layer, call: AttentionCall, ripe: range) -> None:
        """Take note of a piece of a prompt, and begin to index what came before it."""
        for row, query in enumerate(call.query):
            self._queries.add((layer.index, row), query)
        heads = self._heads(layer)
        recipe = self.plan.recipe(layer.number)
        if self.indexes is not None and heads and recipe and not self.plan.kept_queries:
            for chunks in layer.rows:
                self.indexes.prepare(chunks[ripe.start : ripe.stop], heads, recipe)

    def _heads(self, layer: Layer) -> tuple[int, ...]:
        return self.plan.heads(layer.index, self._store.layout.num_kv_heads)

    def can_anticipate(self, layer: Layer) -> bool:
        """Whether a layer has the chunks it was last searched with, some of them in no memory."""
        outlook = self._outlooks.get((layer.owner, layer.index), Outlook())
        return outlook.version == layer.version and self._is_beyond_memory(layer, outlook)

    def anticipate(self, layer: Layer, query: Tensor) -> None:
        """Begin to read what a layer will probably choose, where it is in no memory.

        Does not wait and changes no result. Does nothing unless ``can_anticipate``; so it never
        builds an index.

        Parameters
        ----------
        layer : Layer
            As it is before the token that is asked about is appended.
        query : Tensor, shape (batch, num_heads, key_dim)
            An estimate of what the layer will ask, scaled: ``query @ key`` is the logit.
        """
        heads = self._heads(layer)
        if not heads or not self.can_anticipate(layer):
            return
        assert self._rows is not None
        outlook = self._outlooks[layer.owner, layer.index]
        groups = (self._store.layout.num_kv_heads, -1)
        for row in range(len(layer.rows)):
            index, run = self._open_row(layer, row, outlook, heads)
            asked = query[row].float().unflatten(0, groups)[list(heads)].to(self._place)
            past = outlook.past.get(row)
            ids = self._search(asked, index, layer, past, has_spares=True)[1].cpu().numpy()
            outlook.expected[row] = ids
            self._store.counters.anticipated_rows += int(np.count_nonzero(ids >= 0))
            self._rows.prefetch(*run, ids)

    def _is_beyond_memory(self, layer: Layer, outlook: Outlook) -> bool:
        """Whether rows may have to come from the disk, and may be read ahead into memory."""
        if self._keeps_rows and outlook.store_version != self._store.version:
            outlook.store_version = self._store.version
            table, disk = self._store.table, len(self._store.tiers) - 1
            outlook.is_beyond_memory = any(
                all(level == disk for level in table[chunk].slots)
                for row in layer.rows
                for chunk in reversed(row[outlook.covered.start : outlook.covered.stop])
            )
        return outlook.is_beyond_memory

    def _attend_rows(self, layer: Layer, call: AttentionCall, outlook: Outlook) -> Partial:
        """Attend for all rows, at all positions."""
        layout, heads = self._store.layout, list(self._heads(layer))
        query = call.query.float() * call.scale
        num_rows, num_heads, num_queries, _ = query.shape
        out = query.new_zeros(num_rows, num_heads, num_queries, layout.value_dim)
        lse = query.new_full((num_rows, num_heads, num_queries), -torch.inf)
        if not heads:
            return Partial(out, lse)
        assert self._attention is not None
        groups = (layout.num_kv_heads, num_heads // layout.num_kv_heads)
        outs, lses = out.unflatten(1, groups), lse.unflatten(1, groups)
        asked = query.unflatten(1, groups)[:, heads].to(self._place)
        questions = self._questions(layer, asked, outlook)
        try:
            # What several of them want is read at once: a disk is slow, or searches are.
            while some := list(islice(questions, _TOGETHER)):
                for row, position, question, sought in some:
                    found = self._attention.finish(question, sought)
                    outs[row, heads, :, position] = found.out.to(out.device)
                    lses[row, heads, :, position] = found.lse.to(lse.device)
                self._attention.release()
        finally:
            self._attention.release()
        return Partial(out, lse)

    def _questions(
        self, layer: Layer, asked: Tensor, outlook: Outlook
    ) -> Iterator[tuple[int, int, Question, Sought]]:
        """Search for every row and position, and begin to read what was found.

        A group shares what it reads; the queries of different positions look for other things.
        """
        assert self._attention is not None
        has_spares, heads = self._is_beyond_memory(layer, outlook), self._heads(layer)
        for row in range(len(layer.rows)):
            index, run = self._open_row(layer, row, outlook, heads)
            expected = outlook.expected.pop(row, None)
            for position in range(asked.shape[3]):
                one, past = asked[row, :, :, position], outlook.past.get(row)
                hits, likely = self._search(one, index, layer, past, has_spares=has_spares)
                outlook.remember(row, position, index, hits)
                self._count(hits, index, expected)
                question = Question(one, index, run, hits, likely)
                yield row, position, question, self._attention.begin(question)

    def _open_row(
        self, layer: Layer, row: int, outlook: Outlook, heads: tuple[int, ...]
    ) -> tuple[KeyIndex, Run]:
        """Return the index over a row, and the chunks that it covers."""
        assert self.indexes is not None
        queries = self._queries.get((layer.index, row), self._store.layout.num_kv_heads)
        if queries is not None:
            queries = queries[list(heads)]
        holder = Holder(layer.owner, layer.index, row)
        ripe, covered = outlook.ripe, outlook.covered
        chunks = layer.rows[row][ripe.start : ripe.stop]
        recipe = self.plan.recipe(layer.number)
        assert recipe is not None
        version = (layer.version, ripe)
        index = self.indexes.over(holder, version, chunks, heads, recipe, queries)
        chunks = layer.rows[row][covered.start : covered.stop]
        assert index.num_tokens == len(chunks) * self._store.layout.chunk_tokens
        run_version = (layer.version, covered.start, covered.stop)
        return index, Run(layer.index, (layer.owner, row), run_version, chunks, heads)

    def _search(
        self,
        query: Tensor,
        index: KeyIndex,
        layer: Layer,
        past: Hits | None,
        *,
        has_spares: bool,
    ) -> tuple[Hits, Tensor]:
        """Return what to read, and the ids of that and, if asked for, of the next best tokens."""
        budget, group = self.plan.tokens(layer.num_context, layer.number), self.plan.group
        if self.plan.error is not None:
            hits = index.search(query, budget, group, past)
            least = self.plan.error * self._steering.factor
            counts = (index.expected_errors(query, hits)[:, :-1] > least).sum(1)
            chosen = hits.first(counts)
            spared = counts + counts // _SPARE_PART
            return chosen, hits.first(spared).ids if has_spares else chosen.ids
        spare = budget // _SPARE_PART if has_spares else 0
        hits = index.search(query, budget + spare, group, past)
        chosen = replace(hits, ids=hits.ids[:, :budget])
        return chosen, hits.ids if has_spares else chosen.ids

    def _count(self, hits: Hits, index: KeyIndex, expected: Ints | None) -> None:
        """Count what a search came to, and how much of it had been expected."""
        counters, num_found = self._store.counters, int(hits.found.sum())
        counters.covered_tokens += index.num_tokens * index.num_heads
        counters.retrieved_tokens += num_found
        if isinstance(hits.scanned_bytes, int):
            counters.scanned_bytes += hits.scanned_bytes
        if expected is not None:
            # The last column, which -1 names, stands for no token.
            marks = np.zeros((index.num_heads, index.num_tokens + 1), dtype=np.bool_)
            np.put_along_axis(marks, expected, values=True, axis=1)
            marks[:, -1] = False
            known = np.take_along_axis(marks, hits.ids.cpu().numpy(), axis=1)
            counters.foreseeable_rows += num_found
            counters.foreseen_rows += int(np.count_nonzero(known))

    def _observe(self, error: float) -> None:
        if self.plan.error is not None:
            self._steering.observe(error, self.plan.error)
