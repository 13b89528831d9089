import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config import format_size, parse_size
from offload.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (1, 1),
        (4096, 4096),
        ("4096", 4096),
        ("100 B", 100),
        ("64k", 64_000),
        ("64KiB", 65_536),
        ("64Ki", 65_536),
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        (" 2GiB ", 2 << 30),
        ("1.5 GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("1TiB", 1 << 40),
        # Not exact as a float.
        ("1.1 GB", 1_100_000_000),
    ],
)
def test_parse_size_of_a_size_returns_bytes(value: int | str, num_bytes: int) -> None:
    assert parse_size(value) == num_bytes


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        2**63,
        True,
        1.5,
        float("nan"),
        None,
        "",
        "GiB",
        "0",
        "0.0 GB",
        "0.1 B",
        "-1GiB",
        "nan",
        "inf",
        "1e9",
        "2 GiB 3",
        "2 XiB",
        "2  GiB",
        "1,5 GB",
        ".5 GB",
        "٣ GB",
        "9999999 TiB",
    ],
)
def test_parse_size_of_something_else_raises_and_names_it(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(value)  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)
    assert "2GiB" in str(caught.value)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (100, "100 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1 MiB"),
        (512 << 20, "512 MiB"),
        (24_699_305_984, "23 GiB"),
        (5 << 40, "5 TiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_format_size_of_bytes_is_short(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(min_value=1, max_value=2**62))
def test_format_size_read_back_is_within_its_rounding(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == pytest.approx(num_bytes, rel=0.051)
