"""The tests of Triton kernels, for whatever device a subclass names.

On a machine without a CUDA device, importing this module makes the kernels run under Triton's
interpreter, wherever in a session that happens.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")


def _load_interpreted() -> None:
    """Make kernels that are imported from now on run on the CPU.

    Triton decides when a function is decorated. Another test may have imported its library before
    (transformers does), so what that decorated is decorated again.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    for module in (tl, tl.standard):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(member.fn))
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _with_index(patch: Any) -> Any:
    """Triton 3.6 keeps scalars in arrays of one element, of which numpy 2.4 takes no ``int``."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


if not torch.cuda.is_available():
    _load_interpreted()

from offload.errors import ConfigError  # noqa: E402
from offload.kernels import reference  # noqa: E402
from offload.kernels.quantised import Bits, Quantised, dequantise, quantise  # noqa: E402
from offload.kernels.triton_bounds import bound_chunks, score_boxes  # noqa: E402
from offload.kernels.triton_chunks import attend_chunks  # noqa: E402
from offload.kernels.triton_gather import gather_rows  # noqa: E402
from offload.kernels.triton_merge import merge_splits  # noqa: E402
from offload.kernels.triton_quantised import attend_quantised  # noqa: E402
from offload.kernels.triton_rows import addresses_of, attend_rows  # noqa: E402
from offload.types import Partial  # noqa: E402
from tests.support.triton_tables import draw  # noqa: E402

# Weights are rounded to the dtype of the query before they multiply values.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SCALE = 0.11

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def attend(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> Partial:
    """Return the answer in float64; ``hidden`` is bool [batch, num_kv_heads, num_keys]."""
    bias = None
    if hidden is not None:
        group = query.shape[1] // keys.shape[2]
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        bias = bias.repeat_interleave(group, 1).unsqueeze(2)
    wide = (x.double() for x in (query, keys, values))
    return reference.partial_attention(*wide, scale=SCALE, bias=bias)


def check(found: Partial, expected: Partial, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=limit, atol=limit)


class AttentionCases:
    """Attention of every kind against the reference; subclasses name the device."""

    device: str

    @every_dtype
    @pytest.mark.parametrize("group", [1, 7])
    @pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (32, 48)])
    def test_attention_over_chunks_of_any_shape_is_the_reference(
        self, dtype: torch.dtype, group: int, key_dim: int, value_dim: int
    ) -> None:
        query = draw(2, 2 * group, 1, key_dim, seed=1, dtype=dtype)
        rows = draw(2, 3, 2, 24, key_dim + value_dim, seed=2, dtype=dtype)
        device = rows.to(self.device)
        found = attend_chunks(
            query.to(self.device), device[..., :key_dim], device[..., key_dim:], scale=SCALE
        )
        check(found, attend(query, rows[..., :key_dim], rows[..., key_dim:]), dtype)

    @pytest.mark.parametrize("num_keys", [1, 63, 64, 130])
    @pytest.mark.parametrize("num_queries", [1, 5])
    def test_attention_over_slots_of_a_pool_reads_the_named_ones_in_order(
        self, num_keys: int, num_queries: int
    ) -> None:
        slots = torch.tensor([[5, 0, 3], [2, 2, 6]])
        pool = draw(1, 7, 2, 64, 64, seed=3)
        query = draw(2, 4, num_queries, 32, seed=4)
        device = pool.to(self.device)
        found = attend_chunks(
            query.to(self.device),
            device[..., :32],
            device[..., 32:],
            scale=SCALE,
            slots=slots.to(self.device),
            num_keys=num_keys,
        )
        rows = pool[0][slots]
        hidden = (torch.arange(192) >= num_keys).expand(2, 2, -1)
        check(found, attend(query, rows[..., :32], rows[..., 32:], hidden), torch.float32)

    @every_dtype
    @pytest.mark.parametrize("num_hits", [1, 70, 300])
    def test_attention_over_addresses_skips_those_that_are_zero(
        self, dtype: torch.dtype, num_hits: int
    ) -> None:
        query = draw(2, 8, 1, 64, seed=5, dtype=dtype)
        rows = draw(2, 2, num_hits, 128, seed=6, dtype=dtype).to(self.device)
        addresses = addresses_of(rows)
        addresses[0, :, ::3] = 0
        addresses[1, 1] = 0
        found = attend_rows(query.to(self.device), addresses.to(self.device), 64, scale=SCALE)
        chunks = rows.cpu().unsqueeze(1)
        expected = attend(query, chunks[..., :64], chunks[..., 64:], addresses == 0)
        check(found, expected, dtype)
        assert (found.lse[1, 4:] == -torch.inf).all()
        assert (found.out[1, 4:] == 0).all()

    @every_dtype
    @pytest.mark.parametrize("num_bits", [8, 4])
    @pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_attention_over_quantised_chunks_is_that_over_what_they_stand_for(
        self, dtype: torch.dtype, num_bits: Bits, scale_dtype: torch.dtype
    ) -> None:
        query = draw(1, 4, 1, 128, seed=7, dtype=dtype)
        chunks = draw(2, 1, 3, 2, 40, 128, seed=8)
        packed = [quantise(rows, num_bits, scale_dtype) for rows in chunks]
        found = attend_quantised(
            query.to(self.device),
            *(Quantised(*(part.to(self.device) for part in own)) for own in packed),
            scale=SCALE,
        )
        check(found, attend(query, *(dequantise(own) for own in packed)), dtype)

    @every_dtype
    @pytest.mark.parametrize("num_bits", [8, 4])
    def test_attention_over_quantised_values_that_are_small_keeps_their_digits(
        self, dtype: torch.dtype, num_bits: Bits
    ) -> None:
        query, chunks = draw(1, 2, 1, 64, seed=18, dtype=dtype), draw(2, 1, 1, 2, 48, 64, seed=19)
        packed = [
            quantise(rows * size, num_bits) for rows, size in zip(chunks, (1, 1e-3), strict=True)
        ]
        found = attend_quantised(
            query.to(self.device),
            *(Quantised(*(part.to(self.device) for part in own)) for own in packed),
            scale=SCALE,
        )
        expected = attend(query, *(dequantise(own) for own in packed))
        error = (found.out.cpu() - expected.out).norm() / expected.out.norm()
        assert error < TOLERANCE[dtype]

    @pytest.mark.parametrize("num_bits", [8, 4])
    def test_attention_over_slots_of_a_quantised_pool_reads_the_named_ones(
        self, num_bits: Bits
    ) -> None:
        slots = torch.tensor([[4, 1], [0, 4]])
        query, pool = draw(2, 4, 1, 64, seed=9), draw(2, 1, 5, 2, 32, 64, seed=10)
        packed = [quantise(rows, num_bits) for rows in pool]
        found = attend_quantised(
            query.to(self.device),
            *(Quantised(*(part.to(self.device) for part in own)) for own in packed),
            scale=SCALE,
            slots=slots.to(self.device),
            num_keys=50,
        )
        hidden = (torch.arange(64) >= 50).expand(2, 2, -1)
        keys, values = (dequantise(own)[0][slots] for own in packed)
        check(found, attend(query, keys, values, hidden), torch.float32)

    def test_attention_over_quantised_chunks_of_an_odd_width_is_refused(self) -> None:
        packed = quantise(draw(1, 1, 1, 16, 96, seed=11), 4)
        with pytest.raises(ConfigError, match="96 channels in 4 bits"):
            attend_quantised(draw(1, 1, 1, 96, seed=12), packed, packed, scale=SCALE)

    @pytest.mark.parametrize("num_splits", [1, 2, 5])
    def test_merge_of_splits_is_the_reference_and_ignores_empty_ones(self, num_splits: int) -> None:
        out, lse = draw(1, 3, 2, num_splits, 24, seed=13), draw(1, 3, 2, num_splits, seed=14)
        lse[0, 0] = -torch.inf
        lse[0, 1, 0, 0] = -torch.inf
        out[lse == -torch.inf] = 0
        found = merge_splits(out.to(self.device), lse.to(self.device))
        parts = zip(out.double().unbind(3), lse.double().unbind(3), strict=True)
        check(found, reference.merge([Partial(*part) for part in parts]), torch.float32)


class RowCases:
    """Gathers and bounds; subclasses name the device."""

    device: str

    @pytest.mark.parametrize("row_bytes", [16, 48, 512, 4112])
    @pytest.mark.parametrize("num_rows", [1, 40])
    def test_gather_writes_the_named_rows_and_nothing_else(
        self, row_bytes: int, num_rows: int
    ) -> None:
        generator = torch.Generator().manual_seed(row_bytes)
        rows = torch.randint(0, 256, (num_rows, row_bytes), generator=generator).to(torch.uint8)
        before = torch.randint(0, 256, (50, row_bytes), generator=generator).to(torch.uint8)
        slots = torch.randperm(50, generator=generator)[:num_rows]
        slots[1::5] = -1
        source, out = rows.to(self.device), before.to(self.device)
        addresses = addresses_of(source)
        addresses[2::5] = 0
        gather_rows(addresses.to(self.device), slots.to(self.device), out)
        copied = (slots >= 0) & (addresses != 0)
        before[slots[copied]] = rows[copied]
        assert torch.equal(out.cpu(), before)

    def test_gather_into_rows_of_no_whole_units_is_refused(self) -> None:
        numbers, out = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 24, dtype=torch.uint8)
        with pytest.raises(ConfigError, match="got 24 bytes"):
            gather_rows(numbers, numbers, out)

    @every_dtype
    @pytest.mark.parametrize(("num_keys", "chunk_tokens"), [(1, 16), (100, 16), (128, 64), (50, 7)])
    def test_bounds_of_chunks_are_their_smallest_and_largest_keys(
        self, dtype: torch.dtype, num_keys: int, chunk_tokens: int
    ) -> None:
        rows = draw(num_keys, 3, 80, seed=15, dtype=dtype).transpose(0, 1)
        lower, upper = bound_chunks(rows.to(self.device), chunk_tokens)
        chunks = rows.split(chunk_tokens, 1)
        assert torch.equal(lower.cpu(), torch.stack([chunk.amin(1) for chunk in chunks], 1))
        assert torch.equal(upper.cpu(), torch.stack([chunk.amax(1) for chunk in chunks], 1))

    @every_dtype
    @pytest.mark.parametrize("num_queries", [1, 5])
    def test_score_of_a_box_is_its_best_corner(self, dtype: torch.dtype, num_queries: int) -> None:
        query, keys = draw(2, num_queries, 80, seed=16), draw(2, 700, 80, seed=17, dtype=dtype)
        lower, upper = bound_chunks(keys.to(self.device), 16)
        found = score_boxes(query.to(self.device), lower, upper).cpu()
        corners = torch.stack([lower, upper], -1).cpu().double().unsqueeze(1)
        products = corners * query.double()[:, :, None, :, None]
        expected = products.amax(-1).sum(-1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
