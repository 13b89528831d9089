"""Fault plans as text, and the draws that follow from a seed."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError, DiskFull, StorageError
from offload.tiers.fault_dice import Damage, Draw, FaultDice
from offload.tiers.faults import KINDS, FaultCounts, FaultPlan
from offload.types import PAGE_BYTES

_RATES = st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0])
_SECONDS = st.sampled_from([0.0, 0.005, 2.5])


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("none", FaultPlan()),
        ("flip=0", FaultPlan()),
        ("fail=1", FaultPlan(fail=1.0)),
        (" flip = 0.01 , full=2e-3", FaultPlan(flip=0.01, full=0.002)),
        ("delay=0.1", FaultPlan(delay=0.1)),
        (
            "flip=0.01,fail=0.02,delay=0.1:0.005",
            FaultPlan(flip=0.01, fail=0.02, delay=0.1, delay_s=0.005),
        ),
        ("hang=0.5:30,truncate=0.25", FaultPlan(hang=0.5, hang_s=30.0, truncate=0.25)),
    ],
)
def test_parse_of_a_plan_reads_every_part(text: str, plan: FaultPlan) -> None:
    assert FaultPlan.parse(text) == plan
    assert FaultPlan.parse(text, seed=7) == dataclasses.replace(plan, seed=7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is no fault"),
        ("flip", "'flip' is no fault"),
        ("flip=", "'flip=' is no fault"),
        ("flip=often", "'flip=often' is no fault"),
        ("=0.1", "'=0.1' is no fault"),
        ("melt=0.1", "'melt=0.1' is no fault"),
        ("seed=1", "'seed=1' is no fault"),
        ("fail=0.1,", "'' is no fault"),
        ("fail=0.1:2", "'fail=0.1:2' is no fault"),
        ("delay=0.1:2:3", "'delay=0.1:2:3' is no fault"),
        ("delay=0.1:soon", "'delay=0.1:soon' is no fault"),
        ("flip=0.1,none", "'none' is no fault"),
        ("flip=0.1,flip=0.2", "flip is given twice in 'flip=0.1,flip=0.2'"),
        ("flip=1.5", "the rate of flip is 1.5, not from 0 to 1"),
        ("flip=-0.1", "the rate of flip is -0.1, not from 0 to 1"),
        ("flip=nan", "the rate of flip is nan, not from 0 to 1"),
        ("hang=0.1:-1", "a hang of -1.0 s is impossible"),
        ("hang=0.1:inf", "a hang of inf s is impossible"),
        ("delay=0.1:nan", "a delay of nan s is impossible"),
    ],
)
def test_parse_of_nonsense_is_refused_and_says_which_part(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        FaultPlan.parse(text)
    assert reason in str(refused.value)


@given(st.fixed_dictionaries(dict.fromkeys(KINDS, _RATES)), _SECONDS, _SECONDS)
def test_text_of_a_plan_parses_to_the_same_faults(
    rates: dict[str, float], delay_s: float, hang_s: float
) -> None:
    seconds = {"delay_s": delay_s} if rates["delay"] else {}
    seconds |= {"hang_s": hang_s} if rates["hang"] else {}
    plan = FaultPlan(**rates, **seconds)  # type: ignore[arg-type]
    assert FaultPlan.parse(str(plan)) == plan


@pytest.mark.parametrize("kind", KINDS)
def test_only_flip_and_truncate_damage_records(kind: str) -> None:
    plan = FaultPlan.parse(f"{kind}=0.5")
    assert plan.damages_records == (kind in ("flip", "truncate"))


_MIX = FaultPlan(1, delay=0.3, hang=0.1, fail=0.3, full=0.2, truncate=0.3, flip=0.3)


def draws(plan: FaultPlan, n: int = 200) -> list[Draw]:
    """Draw a read and a write in turn."""
    dice = FaultDice(plan)
    return [dice.draw("it", num_written=i % 4 if i % 2 else None) for i in range(n)]


def facts(draw: Draw) -> tuple[Any, ...]:
    """Errors are equal if they say the same."""
    return draw.late_s, repr(draw.error), draw.damages


def test_draws_of_the_same_seed_are_the_same() -> None:
    assert [*map(facts, draws(_MIX))] == [*map(facts, draws(_MIX))]


def test_draws_of_another_seed_are_others() -> None:
    other = dataclasses.replace(_MIX, seed=2)
    assert [*map(facts, draws(_MIX))] != [*map(facts, draws(other))]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_other_kinds_stay_the_same_when_a_rate_changes(kind: str) -> None:
    alone = FaultPlan(1, **{kind: getattr(_MIX, kind)})
    changes: dict[str, Any] = {kind: 0.0}
    others = dataclasses.replace(_MIX, **changes)
    for before, after, only in zip(draws(_MIX), draws(others), draws(alone), strict=True):
        if facts(only) == (0.0, "None", {}):
            assert facts(before) == facts(after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_fault_strikes_as_often_as_its_rate_says(kind: str, rate: float) -> None:
    dice, n = FaultDice(FaultPlan(**{kind: rate})), 2000  # type: ignore[arg-type]
    struck = [dice.draw("it", num_written=1) for _ in range(n)]
    for draw in struck:
        for damage in draw.damages.values():
            dice.count_damage(damage)
    found = getattr(dice.counts, kind)
    assert dice.counts.total == found == sum(facts(d) != (0.0, "None", {}) for d in struck)
    assert abs(found - rate * n) <= 4 * (rate * (1 - rate) * n) ** 0.5


@pytest.mark.parametrize(
    ("plan", "error", "code"),
    [
        (FaultPlan(fail=1.0), StorageError, errno.EIO),
        (FaultPlan(full=1.0), DiskFull, errno.ENOSPC),
        (FaultPlan(fail=1.0, full=1.0), StorageError, errno.EIO),
    ],
)
def test_drawn_error_names_the_transfer_and_has_its_number(
    plan: FaultPlan, error: type[StorageError], code: int
) -> None:
    drawn = FaultDice(plan).draw("write of this", num_written=1).error
    assert type(drawn) is error
    assert drawn.errno == code
    assert str(drawn).endswith(f"write of this: {os.strerror(code)} (injected)")


def test_draw_of_a_read_is_never_disk_full_and_damages_nothing() -> None:
    dice = FaultDice(FaultPlan(full=1.0, flip=1.0, truncate=1.0))
    assert facts(dice.draw("it")) == (0.0, "None", {})
    assert dice.counts == FaultCounts()


def test_counts_add_up_by_kind() -> None:
    added = FaultCounts(1, 2, 3, 4, 5, 6) + FaultCounts(flip=10, delay=1)
    assert added == FaultCounts(2, 2, 3, 4, 5, 16)
    assert added.total == 32


_NUM_BYTES = 3 * PAGE_BYTES


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A file of three records, of which the second will be damaged."""
    path = tmp_path / "records"
    path.write_bytes(b"\xff" * 3 * _NUM_BYTES)
    return path


def damaged(path: Path, damage: Damage) -> bytes:
    """Damage the second record; return it, the others are whole."""
    with path.open("r+b") as file:
        damage.apply(file.fileno(), _NUM_BYTES, _NUM_BYTES)
    content = path.read_bytes()
    assert content[:_NUM_BYTES] + content[2 * _NUM_BYTES :] == b"\xff" * 2 * _NUM_BYTES
    return content[_NUM_BYTES : 2 * _NUM_BYTES]


@pytest.mark.parametrize(
    ("where", "position", "byte"),
    [(0.0, 0, 0xFE), (0.5, _NUM_BYTES // 2, 0xFE), (1 - 2**-53, _NUM_BYTES - 1, 0x7F)],
)
def test_flip_inverts_one_bit_of_the_record(
    record: Path, where: float, position: int, byte: int
) -> None:
    expected = bytearray(b"\xff" * _NUM_BYTES)
    expected[position] = byte
    assert damaged(record, Damage("flip", where)) == expected


@pytest.mark.parametrize(("where", "pages"), [(0.0, 0), (0.34, 1), (0.99, 2)])
def test_truncation_zeroes_the_record_from_a_page_on(
    record: Path, where: float, pages: int
) -> None:
    kept = pages * PAGE_BYTES
    found = damaged(record, Damage("truncate", where))
    assert found == b"\xff" * kept + bytes(_NUM_BYTES - kept)
