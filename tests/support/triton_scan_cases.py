"""The tests of the scan in Triton, against plain loops; subclasses name the device."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.kernels import codes
from offload.kernels.scan import DEVIATIONS, Combine, ScanTables
from tests.support.triton_tables import draw, make_tables

# First the module that makes kernels run where there is no device.
import tests.support.triton_cases  # isort: skip  # noqa: F401
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


class ScanCases:
    """Both passes and the choice between them."""

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
        found = score_places(
            on_device(tables, self.device),
            owner.to(self.device),
            *(x.to(self.device) for x in (query, logits, chosen.to(torch.int8))),
        ).cpu()
        is_token = owner >= 0
        touched = chosen.gather(1, owner.clamp_min(0).long()) & is_token
        blocks = touched.unflatten(1, (-1, 16)).any(-1).repeat_interleave(16, 1)
        scanned = (blocks & is_token).unsqueeze(1).expand_as(found)
        assert torch.equal(found > -torch.inf, scanned)
        turned = query.double() @ codes.rotation(dim).double()
        levels = codes.unpack(tables.key_bits, num_bits, dim).double()
        scale = tables.key_scale.double().unsqueeze(1)
        of_cluster = logits.gather(2, owner.clamp_min(0).long().unsqueeze(1).expand_as(found))
        expected = of_cluster + turned @ levels.mT * scale
        step = turned.abs().amax(-1, keepdim=True) / 127
        limit = step / 2 * levels.abs().sum(-1).unsqueeze(1) * scale.abs() + 1e-3
        assert ((found - expected).abs() <= limit)[scanned].all()

    @pytest.mark.parametrize(("num_queries", "taken"), [(16, True), (17, False)])
    def test_passes_take_sixteen_queries_of_a_head_and_no_more(
        self, num_queries: int, taken: bool
    ) -> None:
        tables, _ = make_tables(64, 2)
        assert supports(tables, torch.zeros(len(tables.counts), num_queries, 64)) is taken
