from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from offload.errors import ConfigError
from offload.evals.fidelity import METHODS, by_class, measure
from offload.evals.heads import Head, dumped_heads, parametric_heads, write_dump
from offload.evals.parametric import Shape, make_head
from offload.evals.problem import Problem, class_of


@pytest.fixture(scope="module")
def head() -> Head:
    """Two thousand keys in float32."""
    made = make_head(Shape(2048, num_queries=4, num_train_queries=256))
    problem = Problem(made.keys, made.values, made.queries, made.train_queries, dtype=torch.float32)
    return Head("a head", "medium", problem)


@pytest.mark.parametrize("method", METHODS)
def test_fidelity_of_reading_everything_is_that_of_full_attention(head: Head, method: str) -> None:
    [row] = measure(head, [method], [1.0])
    assert row.error_p95 < 1e-5
    assert row.mass_error < 1e-5
    assert row.recall == 1.0
    assert row.fetched_share == pytest.approx((2048 - 68) / 2048)


@pytest.mark.parametrize("method", METHODS)
def test_fidelity_of_reading_little_has_an_error_that_reading_more_makes_smaller(
    head: Head, method: str
) -> None:
    little, more = measure(head, [method], [0.02, 0.5])
    assert little.error_median > more.error_median > 0
    assert little.mass < more.mass < 1
    assert little.recall < more.recall
    assert little.fetched_share <= 0.02


def test_fidelity_of_the_oracle_has_more_mass_than_any_method(head: Head) -> None:
    oracle, *others = measure(head, ["oracle, renormalised", *METHODS], [0.05])
    assert oracle.mass >= max(row.mass for row in others) - 1e-6
    assert oracle.recall == 1.0


def test_parametric_heads_are_the_same_again_and_classed_by_temperature() -> None:
    made, again = (list(parametric_heads([512], [24, 36, 52], 2, num_heads=2)) for _ in range(2))
    assert [head.head_class for head in made] == ["flat"] * 2 + ["medium"] * 2 + ["sharp"] * 2
    for one, other in zip(made, again, strict=True):
        assert torch.equal(one.problem.keys, other.problem.keys)
        assert torch.equal(one.problem.queries, other.problem.queries)
    assert not torch.equal(made[0].problem.keys, made[1].problem.keys)


def test_parametric_heads_concentrate_the_more_the_higher_the_temperature() -> None:
    heads = parametric_heads([4096], [24, 36, 52], 8)
    shares = [head.problem.concentration() for head in heads]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("share", "name"), [(0.9, "sharp"), (0.73, "sharp"), (0.5, "medium"), (0.1, "flat")]
)
def test_class_of_a_head_follows_its_concentration(share: float, name: str) -> None:
    assert class_of(share) == name


def test_problem_of_too_few_keys_is_refused() -> None:
    keys = torch.zeros(168, 8)
    with pytest.raises(ConfigError, match="168 keys are too few to compare; at least 169"):
        Problem(keys, keys, keys[:1])


def test_by_class_averages_the_heads_of_a_class(head: Head) -> None:
    [row] = measure(head, ["retroinfer"], [0.05])
    [mean] = by_class([row, row])
    assert asdict(mean) | {"head": row.head} == pytest.approx(asdict(row))
    assert mean.head == "2 heads"


def dump(file: Path) -> dict[str, torch.Tensor]:
    """Write a layer of four query and two KV heads; return its tensors."""
    torch.manual_seed(0)
    shapes = {"keys": (2, 300, 8), "values": (2, 300, 16), "queries": (4, 3, 8)}
    layer = {name: torch.randn(shape) for name, shape in shapes.items()}
    layer["train_queries"] = torch.randn(4, 5, 8)
    write_dump(file, {7: layer}, {7: 0.5}, "a test")
    return layer


def test_dumped_heads_are_those_written_each_with_its_kv_head(tmp_path: Path) -> None:
    layer = dump(tmp_path / "dump")
    heads = list(dumped_heads(tmp_path / "dump"))
    assert [head.name for head in heads] == [f"layer 7, head {number}" for number in range(4)]
    for number, head in enumerate(heads):
        problem = head.problem
        assert torch.equal(problem.keys[0], layer["keys"][number // 2])
        assert torch.equal(problem.values[0], layer["values"][number // 2])
        assert torch.equal(problem.queries, layer["queries"][number] * 0.5)
        assert problem.train_queries is not None
        assert problem.train_queries.shape == (1, 10, 8)


def test_dumped_heads_of_which_some_are_wanted_are_spread_over_all(tmp_path: Path) -> None:
    dump(tmp_path / "dump")
    heads = list(dumped_heads(tmp_path / "dump", 2))
    assert [head.name for head in heads] == ["layer 7, head 0", "layer 7, head 2"]


@pytest.mark.parametrize("content", [b"", b"no safetensors at all"])
def test_dumped_heads_of_a_file_that_is_no_dump_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dump").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as a dump"):
        next(dumped_heads(tmp_path / "dump"))


def test_dumped_heads_of_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a dump"):
        next(dumped_heads(tmp_path / "dump"))
