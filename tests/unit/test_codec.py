"""Byte planes come back as they were, and are used where they help."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.tiers.codec import gains, shuffle, unshuffle
from offload.types import ChunkLayout
from tests.support.sessions import make_payload


def as_bytes(values: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(values, np.uint8)


@given(st.binary(max_size=300), st.integers(1, 9))
def test_unshuffle_after_shuffle_gives_the_same_bytes(values: bytes, size: int) -> None:
    values = values[: len(values) // size * size]
    planes, back = np.zeros(len(values), np.uint8), np.zeros(len(values), np.uint8)
    shuffle(as_bytes(values), size, planes)
    unshuffle(planes, size, back)
    assert planes.tobytes() == b"".join(values[i::size] for i in range(size))
    assert back.tobytes() == values


@pytest.mark.parametrize(("num_bytes", "size", "room"), [(7, 2, 7), (8, 2, 10), (8, 0, 8)])
def test_shuffle_of_sizes_that_do_not_fit_is_refused(num_bytes: int, size: int, room: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_bytes} bytes in elements of {size}"):
        shuffle(np.zeros(num_bytes, np.uint8), size, np.zeros(room, np.uint8))


@pytest.mark.parametrize(
    ("dtype", "noise", "expected"),
    [
        (torch.bfloat16, False, True),
        (torch.float16, False, True),
        (torch.float32, False, True),
        (torch.bfloat16, True, False),
        (torch.int8, False, False),
    ],
)
def test_gains_of_normal_numbers_and_of_noise(
    dtype: torch.dtype, noise: bool, expected: bool
) -> None:
    payload = make_payload(b"x", ChunkLayout(4, 64, 64, 64, dtype), noise=noise)
    assert gains(as_bytes(payload), dtype.itemsize) is expected


@pytest.mark.parametrize("num_bytes", [0, 1, 3])
def test_gains_of_less_than_one_element_is_false(num_bytes: int) -> None:
    assert not gains(np.zeros(num_bytes, np.uint8), 4)


def test_gains_judges_by_the_middle() -> None:
    payload = np.frombuffer(
        make_payload(b"x", ChunkLayout(4, 64, 64, 64, torch.bfloat16), noise=True), np.uint8
    ).copy()
    assert not gains(payload, 2)
    payload[20_000:-20_000] = 0
    assert gains(payload, 2)
