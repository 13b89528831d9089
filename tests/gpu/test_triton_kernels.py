"""Triton kernels, compiled and run on the device: the tests that run under the interpreter too."""

import pytest
import torch

from offload.kernels import dispatch, reference
from offload.kernels import scan as defined
from tests.support.triton_cases import SCALE, AttentionCases, RowCases, attend, check
from tests.support.triton_scan_cases import (
    ScanCases,
    check_scan,
    make_index,
    on_device,
    round_queries,
)
from tests.support.triton_tables import draw

# After the module that decides how kernels run.
from offload.kernels.triton_gather import gather_rows  # isort: skip
from offload.kernels.triton_rows import addresses_of, attend_rows  # isort: skip

pytestmark = pytest.mark.gpu


class TestCompiledAttention(AttentionCases):
    device = "cuda"


class TestCompiledRows(RowCases):
    device = "cuda"


class TestCompiledScan(ScanCases):
    device = "cuda"


def test_attention_reads_rows_of_device_and_page_locked_memory_in_one_pass() -> None:
    query = draw(1, 8, 1, 128, seed=1, dtype=torch.bfloat16)
    rows = draw(1, 2, 600, 256, seed=2, dtype=torch.bfloat16)
    pinned, device = rows.pin_memory(), rows.cuda()
    is_near = torch.arange(600) % 3 == 0
    addresses = torch.where(is_near, addresses_of(device), addresses_of(pinned))
    pinned[:, :, is_near] = torch.nan
    device[:, :, ~is_near] = torch.nan
    found = attend_rows(query.cuda(), addresses.cuda(), 128, scale=SCALE)
    chunks = rows.unsqueeze(1)
    check(found, attend(query, chunks[..., :128], chunks[..., 128:]), torch.bfloat16)


@pytest.mark.parametrize("row_bytes", [512, 64 << 10])
def test_gather_from_page_locked_memory_brings_the_named_rows(row_bytes: int) -> None:
    rows = torch.randint(0, 256, (300, row_bytes)).to(torch.uint8).pin_memory()
    slots = torch.randperm(300)
    out = torch.zeros(300, row_bytes, dtype=torch.uint8, device="cuda")
    gather_rows(addresses_of(rows).cuda(), slots.cuda(), out)
    assert torch.equal(out.cpu()[slots], rows)


def test_dispatch_on_the_device_scans_with_the_kernels_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables, query = make_index((3000, 200), 2, 128).tables(), round_queries(4, 128)
    expected = defined.scan(tables, query, 30, "max")
    own, asked = on_device(tables, "cuda"), query.cuda()
    dispatch.scan(own, asked, 30, "max")  # compiles, and brings there what is kept
    monkeypatch.setattr(dispatch, "reference_scan", None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = dispatch.scan(own, asked, 30, "max")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_scan(found, expected)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_scan_by_a_graph_follows_the_query(num_queries: int) -> None:
    tables = make_index((3000, 200), 2, 128).tables()
    own, asked = on_device(tables, "cuda"), round_queries(num_queries, 128).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dispatch.scan(own, asked, 30, "max")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = dispatch.scan(own, asked, 30, "max")
    asked.neg_()
    graph.replay()
    check_scan(found, defined.scan(tables, asked.cpu(), 30, "max"))


def test_dispatch_on_the_device_attends_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    query = draw(1, 8, 1, 128, seed=3, dtype=torch.bfloat16).cuda()
    rows = draw(1, 4, 2, 64, 256, seed=4, dtype=torch.bfloat16).cuda()
    keys, values = rows.split(128, -1)
    expected = dispatch.partial_attention(query, keys, values, scale=SCALE)
    monkeypatch.setattr(reference, "partial_attention", None)
    found = dispatch.partial_attention(query, keys, values, scale=SCALE)
    assert torch.equal(found.out, expected.out)
