"""The tests of the scan in Triton, against its definition; subclasses name the device."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.index.residual import ResidualIndex
from offload.kernels import codes
from offload.kernels.scan import DEVIATIONS, Combine, Scan, ScanTables
from offload.kernels.scan import scan as defined_scan
from tests.support.triton_tables import draw, make_tables

# First the module that makes kernels run where there is no device.
import tests.support.triton_cases  # isort: skip  # noqa: F401
from offload.kernels import triton_scan  # isort: skip
from offload.kernels.triton_clusters import choose_clusters, score_clusters, supports  # isort: skip
from offload.kernels.triton_places import score_places  # isort: skip


def on_device(tables: ScanTables, device: str) -> ScanTables:
    fields = tables._asdict()
    return tables._replace(**{name: _move(field, device) for name, field in fields.items()})


def _move(field: Any, device: str) -> Any:
    return field.to(device) if isinstance(field, Tensor) else field


def cluster_logits(tables: ScanTables, query: Tensor) -> Tensor:
    means = tables.centroids.double() * tables.centroid_scale.double().unsqueeze(-1)
    return query.double() @ means.mT


def make_index(lengths: tuple[int, ...], num_bits: int, key_dim: int) -> ResidualIndex:
    """Return an index of segments of such lengths over two heads, with keys in loose clusters."""
    parts = []
    for number, num_tokens in enumerate(lengths):
        about = draw(2, 9, key_dim, seed=number).repeat(1, -(-num_tokens // 9), 1)
        keys = about[:, :num_tokens] + draw(2, num_tokens, key_dim, seed=30 + number) / 2
        values = draw(2, num_tokens, 48, seed=60 + number)
        options = {"num_bits": num_bits, "tokens_per_cluster": 12, "scan": 0.4}
        parts.append(ResidualIndex.build(keys, values, **options))
    return ResidualIndex.join(parts)


def round_queries(num_queries: int, dim: int) -> Tensor:
    """Return queries that lose nothing when they are rotated and rounded to 8 bits."""
    turned = (draw(2, num_queries, dim, seed=28) * 40).round().clamp(-127, 127)
    turned[..., 0] = 127
    return turned @ codes.rotation(dim).mT / 100


def check_scan(found: Scan, expected: Scan) -> None:
    """Compare with the definition's, hits in any order; weights of values have 11 bits."""
    places, clusters, logits = (x.cpu() for x in found[:3])
    order, expected_order = places.argsort(1), expected.places.argsort(1)
    assert torch.equal(places.gather(1, order), expected.places.gather(1, expected_order))
    assert (clusters >= 0).all()  # of no hit, too: they are looked up
    expected_clusters = expected.clusters.gather(1, expected_order)
    has_hit = expected.places.gather(1, expected_order) >= 0
    assert torch.equal(clusters.gather(1, order)[has_hit], expected_clusters[has_hit])
    assert int(found.num_scanned) == expected.num_scanned
    _check_close(_in_order(logits, order), _in_order(expected.logits, expected_order), 2e-3)
    _check_close(found.rest.lse, expected.rest.lse, 2e-3)
    _check_close(found.rest.out, expected.rest.out, 5e-3)
    _check_close(found.squares, expected.squares, 1e-6)


def _in_order(logits: Tensor, order: Tensor) -> Tensor:
    return logits.gather(2, order.unsqueeze(1).expand_as(logits))


def _check_close(found: Tensor, expected: Tensor, limit: float) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=5e-3, atol=limit)


class ScanCases:
    """The passes, the choice between them, and the whole."""

    device: str

    @pytest.mark.parametrize("dim", [80, 128])
    @pytest.mark.parametrize("num_queries", [1, 16])
    def test_logit_of_a_cluster_is_that_of_its_mean(self, dim: int, num_queries: int) -> None:
        tables, _ = make_tables(dim, 2)
        query = draw(len(tables.counts), num_queries, dim, seed=23)
        found, hoped = score_clusters(on_device(tables, self.device), query.to(self.device))
        expected = cluster_logits(tables, query)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=2e-3)
        reach = tables.radius.double().unsqueeze(1) * query.double().norm(dim=-1, keepdim=True)
        expected += tables.counts.double().log().unsqueeze(1) + DEVIATIONS / math.sqrt(dim) * reach
        torch.testing.assert_close(hoped.cpu().double(), expected, rtol=1e-4, atol=2e-3)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
    @pytest.mark.parametrize("group", ["max", "sum"])
    def test_choice_is_the_best_clusters_that_have_enough_tokens(
        self, share: float, group: Combine
    ) -> None:
        tables, _ = make_tables(64, 2, share=share)
        hoped = draw(len(tables.counts), 3, tables.counts.shape[1], seed=24)
        own = on_device(tables, self.device)
        found = choose_clusters(own, hoped.to(self.device), 5, group).cpu()
        shares = hoped.log_softmax(-1)
        shares = shares.amax(1) if group == "max" else shares.logsumexp(1)
        for head in range(len(tables.counts)):
            order = shares[head].argsort(descending=True).tolist()
            held = itertools.accumulate(tables.counts[head, order].tolist(), initial=0)
            taken = {c for c, before in zip(order, held, strict=False) if before < tables.wanted(5)}
            assert set(found[head].nonzero().flatten().tolist()) == taken

    def test_choice_of_more_tokens_than_there_are_takes_every_cluster(self) -> None:
        tables, _ = make_tables(64, 2)
        hoped = draw(len(tables.counts), 1, tables.counts.shape[1], seed=25)
        own = on_device(tables, self.device)
        assert choose_clusters(own, hoped.to(self.device), 1000, "max").cpu().eq(1).all()

    @pytest.mark.parametrize("num_bits", [1, 2])
    @pytest.mark.parametrize("dim", [64, 80, 128])
    @pytest.mark.parametrize("num_queries", [1, 4])
    def test_logit_of_a_place_is_off_by_no_more_than_the_rounding_of_the_query(
        self, num_bits: int, dim: int, num_queries: int
    ) -> None:
        tables, owner = make_tables(dim, num_bits)
        query = draw(len(tables.counts), num_queries, dim, seed=26)
        chosen = draw(*tables.counts.shape, seed=27) > 0
        logits = cluster_logits(tables, query).float()
        raw, seen = score_places(
            on_device(tables, self.device),
            owner.to(self.device),
            *(x.to(self.device) for x in (query, logits, chosen.to(torch.int8))),
        )
        found = raw.cpu()
        is_token = owner >= 0
        touched = chosen.gather(1, owner.clamp_min(0).long()) & is_token
        is_block = touched.unflatten(1, (-1, 16)).any(-1)
        assert torch.equal(seen.cpu().bool(), is_block)
        blocks = is_block.repeat_interleave(16, 1).unsqueeze(1).expand_as(found)
        scanned = blocks & is_token.unsqueeze(1)
        assert torch.equal((found > -torch.inf) & blocks, scanned)
        turned = query.double() @ codes.rotation(dim).double()
        levels = codes.unpack(tables.key_bits, num_bits, dim).double()
        scale = tables.key_scale.double().unsqueeze(1)
        of_cluster = logits.gather(2, owner.clamp_min(0).long().unsqueeze(1).expand_as(found))
        expected = of_cluster + turned @ levels.mT * scale
        step = turned.abs().amax(-1, keepdim=True) / 127
        limit = step / 2 * levels.abs().sum(-1).unsqueeze(1) * scale.abs() + 1e-3
        assert ((found - expected).abs() <= limit)[scanned].all()

    @pytest.mark.parametrize(
        ("num_bits", "num_queries", "group"),
        [(1, 1, "max"), (2, 1, "sum"), (1, 3, "sum"), (2, 16, "max"), (1, 16, "sum")],
    )
    def test_scan_finds_and_estimates_what_its_definition_does(
        self, num_bits: int, num_queries: int, group: Combine
    ) -> None:
        tables = make_index((170, 37), num_bits, 64).tables()
        found, expected = self._scan_both(tables, round_queries(num_queries, 64), 9, group)
        check_scan(found, expected)
        assert torch.equal(found.places.cpu(), expected.places)  # best first

    @pytest.mark.parametrize("key_dim", [80, 128])
    @pytest.mark.parametrize("lengths", [(1,), (16, 1), (330,)])
    def test_scan_of_segments_of_any_length_is_that_of_its_definition(
        self, lengths: tuple[int, ...], key_dim: int
    ) -> None:
        tables = make_index(lengths, 2, key_dim).tables()
        check_scan(*self._scan_both(tables, round_queries(2, key_dim), 5, "max"))

    @pytest.mark.parametrize("budget", [0, 150, 1000])
    def test_scan_with_a_budget_takes_so_many_or_all(self, budget: int) -> None:
        tables = make_index((200, 40), 2, 64).tables()
        found, expected = self._scan_both(tables, round_queries(2, 64), budget, "max")
        assert found.places.shape == (2, min(budget, 240))
        check_scan(found, expected)

    def test_scan_that_finds_fewer_than_its_budget_fills_up_with_minus_one(self) -> None:
        # Filling is no token, and only three places in four of a head hold one.
        tables = make_index((3, 9), 2, 64).tables()
        found, expected = self._scan_both(tables, round_queries(1, 64), 12, "max")
        check_scan(found, expected)
        assert sorted(found.places[0].tolist()) == [0, 1, 2, *range(16, 25)]

    def test_scan_of_the_beginning_of_an_index_ignores_what_follows(self) -> None:
        lengths, query = (90, 50, 70), round_queries(2, 64)
        tables = make_index(lengths, 2, 64).prefix(140).tables()
        assert not tables.key_bits.is_contiguous()
        check_scan(*self._scan_both(tables, query, 9, "max"))
        alone = make_index(lengths[:2], 2, 64).tables()
        check_scan(self._scan(tables, query, 9, "max"), defined_scan(alone, query, 9, "max"))

    def test_scan_reads_no_logit_that_was_not_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tables, query = make_index((300, 37), 2, 64).tables(), round_queries(2, 64)

        def spoil_rest(*args: Any) -> tuple[Tensor, Tensor]:
            raw, seen = score_places(*args)
            assert not seen.all()
            unwritten = seen.eq(0).repeat_interleave(16, 1).unsqueeze(1)
            return raw.masked_fill(unwritten, torch.nan), seen

        monkeypatch.setattr(triton_scan, "score_places", spoil_rest)
        check_scan(*self._scan_both(tables, query, 9, "max"))

    def test_scan_of_hits_that_outweigh_all_else_estimates_the_rest_all_the_same(self) -> None:
        tables, query = make_index((200,), 2, 64).tables(), round_queries(1, 64)
        found, expected = self._scan_both(tables, query * 100, 20, "max")
        assert (found.rest.lse.cpu() < found.lse().cpu() - 100).any()
        assert found.rest.lse.isfinite().all()
        torch.testing.assert_close(found.rest.lse.cpu(), expected.rest.lse, rtol=1e-3, atol=0.5)

    def _scan(self, tables: ScanTables, query: Tensor, budget: int, group: Combine) -> Scan:
        own = on_device(tables, self.device)
        return triton_scan.scan(own, query.to(self.device), budget, group)

    def _scan_both(
        self, tables: ScanTables, query: Tensor, budget: int, group: Combine
    ) -> tuple[Scan, Scan]:
        assert triton_scan.supports(tables, query)
        expected = defined_scan(tables, query, budget, group)
        return self._scan(tables, query, budget, group), expected

    @pytest.mark.parametrize(("num_queries", "taken"), [(16, True), (17, False)])
    def test_passes_take_sixteen_queries_of_a_head_and_no_more(
        self, num_queries: int, taken: bool
    ) -> None:
        tables, _ = make_tables(64, 2)
        assert supports(tables, torch.zeros(len(tables.counts), num_queries, 64)) is taken
