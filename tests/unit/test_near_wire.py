"""What crosses the bus arrives as it was sent, whatever the shapes, in the room it was given."""

import pytest
import torch

from offload.tiers.near.wire import CallFormat
from offload.types import Partial

SHAPES = [(1, 1, 1), (4, 64, 64), (3, 7, 9), (2, 16, 5), (8, 128, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), SHAPES)
def test_queries_and_answers_come_back_as_they_were_put(
    heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, num_rows: int
) -> None:
    fmt = CallFormat(heads, key_dim, value_dim, dtype)
    frame = torch.full((num_rows * fmt.row_bytes + 16,), 0xA5, dtype=torch.uint8)
    query = draw(num_rows, heads, key_dim).to(dtype)
    answer = Partial(draw(num_rows, heads, value_dim, seed=1), draw(num_rows, heads, seed=2))
    fmt.put_query(frame, query)
    for row in reversed(range(num_rows)):
        fmt.put_answer(frame, num_rows, row, Partial(answer.out[row], answer.lse[row]))
    assert torch.equal(fmt.query(frame, num_rows, 0.5), query.float() * 0.5)
    found = fmt.answer(frame, num_rows)
    assert torch.equal(found.lse, answer.lse)
    # Half a step of 1 / 32767 of the largest value of a head, where answers travel short.
    steps = answer.out.abs().amax(-1, keepdim=True) / 32767 if fmt.is_short else torch.zeros(1)
    assert bool(((found.out - answer.out).abs() <= 0.501 * steps).all())
    assert bool((frame[num_rows * fmt.row_bytes :] == 0xA5).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_answer_of_nothing_is_nothing(dtype: torch.dtype) -> None:
    fmt = CallFormat(2, 4, 3, dtype)
    frame = torch.full((fmt.row_bytes,), 0xA5, dtype=torch.uint8)
    fmt.put_answer(frame, 1, 0, Partial(torch.zeros(2, 3), torch.full((2,), -torch.inf)))
    found = fmt.answer(frame, 1)
    assert not found.out.any()
    assert bool((found.lse == -torch.inf).all())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_short_answers_keep_heads_of_very_different_size_apart(size: float) -> None:
    fmt = CallFormat(2, 4, 8, torch.bfloat16)
    frame = torch.zeros(fmt.row_bytes, dtype=torch.uint8)
    out = draw(2, 8) * torch.tensor([[1.0], [size]])
    fmt.put_answer(frame, 1, 0, Partial(out, torch.zeros(2)))
    assert torch.allclose(fmt.answer(frame, 1).out[0], out, rtol=0, atol=float(out.abs().max()))
    error = (fmt.answer(frame, 1).out[0] - out).abs().amax(-1) / out.abs().amax(-1)
    assert bool((error <= 2e-5).all())


def test_answer_is_a_copy_that_the_next_call_does_not_touch() -> None:
    fmt = CallFormat(2, 4, 3, torch.float32)
    frame = torch.zeros(fmt.row_bytes, dtype=torch.uint8)
    fmt.put_answer(frame, 1, 0, Partial(torch.ones(2, 3), torch.ones(2)))
    found = fmt.answer(frame, 1)
    frame.fill_(0)
    assert bool((found.out == 1).all())
    assert bool((found.lse == 1).all())


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, (16384, 16384, 128)), (torch.bfloat16, (8192, 8192, 256))]
)
def test_bytes_of_a_call_are_those_of_its_numbers(
    dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    fmt = CallFormat(32, 128, 128, dtype)
    assert fmt.query_bytes == sizes[0]
    assert fmt.answer_bytes == sizes[1] + sizes[2]
    assert fmt.row_bytes == sum(sizes)
    assert fmt.num_rows(3 * fmt.row_bytes + 1) == 3
