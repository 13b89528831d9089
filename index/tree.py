"""Boxes around keys in a tree, looked into where it matters: LeoAM's importance-aware selection.

LeoAM (arXiv 2506.20187) keeps the smallest and the largest key of each chunk as its abstract, in
the first layers of smaller chunks than in the others, and evaluates large chunks before small ones.
What its text leaves open is ours: levels of fixed fan-out, rejection and acceptance by both bounds,
one softmax that scores of all levels and queries are shares of, the slack by which parents count
less, and the frontier. Unlike the paper's code, which sums scores over all heads, each KV head has
tokens of its own by default. What is not read is forgotten, as in the paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from torch import Tensor

from offload.errors import ConfigError
from offload.index.base import Combine, Hits, KeyIndex, agreed, require_finite
from offload.index.boxes import Leaves
from offload.index.frontier import Frontier
from offload.kernels import box_search, dispatch
from offload.kernels.boxes import BoxHits, BoxRules, BoxTree, Scope

_MOST_TOKENS = (1 << 15) - 1
"""Of one node."""


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """How a tree is built and searched; see ``BoxRules``.

    Attributes
    ----------
    leaf_tokens : int
    fanout : int
        Children of a node.
    num_levels : int
        The leaves are one.
    bits : {8, None}
        Of the numbers of boxes; None: as the keys have them.
    over, flat_from, scope, patience, lost_mass, lean
    """

    leaf_tokens: int = 32
    fanout: int = 4
    num_levels: int = 2
    bits: int | None = None
    over: float = 3.0
    flat_from: float = 0.2
    scope: Scope = "kv_head"
    patience: int | None = None
    lost_mass: float | None = None
    lean: float = 1.0

    def __post_init__(self) -> None:
        if self.leaf_tokens < 1 or self.fanout < 2 or self.num_levels < 1:
            raise ConfigError(
                f"no tree has leaves of {self.leaf_tokens} tokens, a fan-out of {self.fanout} and "
                f"{self.num_levels} levels; the least are 1, 2 and 1"
            )
        if (most := self.leaf_tokens * self.fanout ** (self.num_levels - 1)) > _MOST_TOKENS:
            raise ConfigError(f"nodes of {most} tokens; at most {_MOST_TOKENS} are possible")
        if self.bits not in (8, None):
            raise ConfigError(f"bits={self.bits!r} is neither 8 nor None")
        if self.scope not in ("kv_head", "layer"):
            raise ConfigError(f"scope={self.scope!r} is neither 'kv_head' nor 'layer'")
        if not self.over >= 1:
            raise ConfigError(f"over={self.over!r}; what is looked into holds at least the budget")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience={self.patience!r} is no number of steps")
        if not 0.5 <= self.lean <= 1:
            raise ConfigError(f"lean={self.lean!r} is not from 0.5 to 1")
        if self.lost_mass is not None and not 0 < self.lost_mass < 1:
            raise ConfigError(f"lost_mass={self.lost_mass!r} is no share, above 0 and below 1")

    def rules(self) -> BoxRules:
        """Return how to search."""
        return BoxRules(
            self.over, self.flat_from, self.scope, self.patience, self.lost_mass, self.lean
        )


@dataclass(frozen=True, slots=True)
class TreeState:
    """What a search tells besides its hits.

    Attributes
    ----------
    frontier : Frontier or None
        Where the next search begins; None: at the top.
    certified : Tensor, bool [num_sets]
        For which sets of tokens no query loses more than ``lost_mass`` of its softmax, for sure.
    num_scored : int
        Boxes that were looked at.
    """

    frontier: Frontier | None
    certified: Tensor
    num_scored: int


@dataclass(frozen=True)
class TreeIndex(KeyIndex):
    """Boxes around the keys of leaves, and of their parents.

    Attributes
    ----------
    leaves : Leaves
    settings : TreeSettings
    """

    follows_searches: ClassVar[bool] = True
    is_abstract: ClassVar[bool] = True

    leaves: Leaves
    settings: TreeSettings

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, **options: Any) -> Self:  # noqa: D102
        settings = TreeSettings(**options)
        require_finite(keys, values)
        coded = settings.bits is not None
        return cls(Leaves.build(keys, settings.leaf_tokens, coded=coded), settings)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        settings = agreed([part.settings for part in parts])
        return cls(Leaves.join([part.leaves for part in parts]), settings)

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        return type(self)(self.leaves.prefix(num_tokens), self.settings)

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.leaves.lower.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.leaves.cuts.num_tokens

    @cached_property
    def tree(self) -> BoxTree:
        """The leaves with their parents, which are derived when they are first asked for."""
        return self.leaves.tree(self.settings.fanout, self.settings.num_levels)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        parents = (part for level in self.tree.levels[1:] for part in (level.lower, level.upper))
        return super().num_bytes + sum(part.nbytes for part in parents)

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        leaves = self.leaves
        named = {"lower": leaves.lower, "upper": leaves.upper}
        if self.settings.bits is not None:
            named |= {"scale": leaves.scale, "offset": leaves.offset}
        return named

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"settings": asdict(self.settings), "runs": self.leaves.cuts.runs}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        settings = TreeSettings(**meta["settings"])
        none = tensors["lower"][:, :0].float()
        scale, offset = tensors.get("scale", none), tensors.get("offset", none)
        rows = (tensors["lower"], tensors["upper"], scale, offset)
        return cls(Leaves.restore(*rows, settings.leaf_tokens, meta["runs"]), settings)

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        sizes = [level.num_nodes for level in self.tree.levels]
        num_sets = self.num_heads if self.settings.scope == "kv_head" else 1
        last = None if past is None else past.state
        frontier = last.frontier if isinstance(last, TreeState) else None
        begin = None if frontier is None else frontier.over(sizes, num_sets)
        rules = self.settings.rules()
        fast = dispatch.compiled("cpu_boxes")
        if fast is None or not fast.supports(self.tree, query, rules):
            fast = box_search
        found: BoxHits = fast.search_boxes(self.tree, query, budget, group, rules, begin)
        left = None if rules.patience is None else Frontier.of(found.cut, sizes)
        ids = found.ids if num_sets == self.num_heads else found.ids.repeat(self.num_heads, 1)
        state = TreeState(left, found.certified, found.num_scored)
        return Hits(ids, self._scanned_bytes(found), state)

    def _scanned_bytes(self, found: BoxHits) -> int:
        """Return the bytes of the boxes that were looked at, and of all scales."""
        scales = 2 * self.leaves.scale.nbytes
        return found.num_scored * 2 * self.leaves.lower[0, 0].nbytes + scales
