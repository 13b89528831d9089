"""``offload eval``: small runs of both kinds, their files, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from offload.cli import main
from offload.evals import plots, records
from offload.recall_model import load_recall_model
from tools import dump_qkv


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command; return what it wrote as JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "new" / "rows.json"
        outputs = ["--json", str(file), "--report", str(tmp_path / "report"), "--threads", "1"]
        assert main(["eval", *arguments, *outputs]) == 0
        data: dict[str, Any] = json.loads(file.read_text())
        return data

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that reads bytes."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    load_recall_model()[1].save_pretrained(path)
    return path


def test_eval_tasks_on_records_gives_exact_full_marks_on_a_single_needle(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    data = evaluate(
        *("tasks", "--tokens", "2048", "--samples", "1", "--tasks", "single_needle"),
        *("--policies", "adaptive:0.05", "streaming:256", "--disk-path", str(tmp_path)),
    )
    exact, adaptive, streaming = data["rows"]
    assert [row["policy"] for row in data["rows"]] == ["exact", "adaptive:0.05", "streaming:256"]
    assert (exact["accuracy"], exact["share_read"], exact["agreement"]) == (1.0, 1.0, 1.0)
    assert exact["num_answers"] == 1
    assert adaptive["accuracy"] == 1.0
    assert streaming["accuracy"] == 0.0
    assert streaming["points"] == -100.0
    assert streaming["divergence"] > adaptive["divergence"] >= 0.0
    assert 256 <= streaming["tokens_read"] <= 256 + 3 * 64
    assert streaming["tokens_read"] < adaptive["tokens_read"] < exact["tokens_read"]
    assert data["notes"][0].startswith("Protocol B: the document is processed exactly")


def test_eval_tasks_of_protocol_a_counts_only_what_answers_read(
    evaluate: Callable[..., dict[str, Any]],
) -> None:
    arguments = ("tasks", "--tokens", "2048", "--tasks", "single_needle", "--documents", "1")
    policies = ("--policies", "streaming:256")
    rows = {name: evaluate(*arguments, *policies, "--protocol", name)["rows"] for name in "AB"}
    assert rows["A"][1]["tokens_read"] < 256 + 3 * 64
    # The question sees the needle, so at least its first token is that of exact attention.
    assert rows["A"][1]["divergence"] == pytest.approx(0, abs=1e-4)
    assert rows["B"][1]["divergence"] > 0.1


def test_eval_tasks_on_records_runs_every_task(
    evaluate: Callable[..., dict[str, Any]],
) -> None:
    data = evaluate(
        *("tasks", "--tokens", "1024", "--samples", "1", "--documents", "1"),
        *("--policies", "retroinfer:0.2"),
    )
    exact = [row for row in data["rows"] if row["policy"] == "exact"]
    assert [row["task"] for row in exact] == list(records.TASKS)
    assert {row["accuracy"] for row in exact if "values" not in row["task"]} == {1.0}
    assert all(row["exact_accuracy"] == row["accuracy"] for row in exact)


def test_eval_tasks_on_a_folder_asks_in_english(
    evaluate: Callable[..., dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["multi_turn", "common_words"]
    data = evaluate(
        *("tasks", "--model", str(folder), "--tokens", "2500", "--samples", "1"),
        *("--tasks", *tasks, "--documents", "1", "--policies", "adaptive:0.02"),
    )
    assert list(dict.fromkeys(row["task"] for row in data["rows"])) == tasks
    assert {row["accuracy"] for row in data["rows"]} == {0.0}
    assert all(0 < row["share_read"] <= 1 for row in data["rows"])
    assert "exact" in capsys.readouterr().out


def test_eval_report_has_origin_notes_tables_and_plots(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    evaluate("fidelity", "--num-keys", "1024", "--queries", "2", "--temperatures", "24")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "torch" in page
    assert "sinks and window" in page
    assert "## 1024 keys, flat heads (temperature 24, seed 0)" in page
    assert page.count("| adaptive |") == 4
    drawn = sorted(file.name for file in (tmp_path / "report").glob("*.svg"))
    expected = ["error_median_1024_flat.svg", "error_p95_1024_flat.svg"]
    assert drawn == (expected if plots.can_draw() else [])
    assert all(name in page for name in drawn)


def test_eval_report_without_matplotlib_says_how_to_get_it(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    evaluate("fidelity", "--num-keys", "1024", "--queries", "2", "--methods", "retroinfer")
    assert 'pip install "kv-offload[plot]"' in (tmp_path / "report" / "report.md").read_text()
    assert not list((tmp_path / "report").glob("*.svg"))


def test_eval_fidelity_of_a_dump_has_the_heads_of_the_model(
    evaluate: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    dump, text = tmp_path / "dump", tmp_path / "text"
    text.write_text("All work and no play. " * 100)
    assert (
        dump_qkv.main(
            [
                *(str(dump), "--model", str(folder), "--text", str(text), "--layers", "1"),
                *("--tokens", "1500", "--queries", "3", "--train-queries", "40"),
            ]
        )
        == 0
    )
    arguments = ("fidelity", "--dump", str(dump), "--methods", "adaptive", "--budgets", "1.0")
    rows = evaluate(*arguments)["rows"]
    assert [row["head"] for row in rows] == [f"layer 1, head {number}" for number in range(4)]
    assert {row["num_keys"] for row in rows} == {1500}
    assert max(row["error_p95"] for row in rows) < 1e-5


def test_dump_has_the_keys_and_values_of_the_models_cache(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.arange(600) % 256
    kept = dump_qkv.dump(model, ids.tolist(), num_queries=4, num_train_queries=16).kept
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[None, :596], past_key_values=cache)
    layers: list[Any] = cache.layers
    for layer, own in enumerate(layers):
        torch.testing.assert_close(kept[layer]["keys"], own.keys[0])
        torch.testing.assert_close(kept[layer]["values"], own.values[0])
        assert kept[layer]["queries"].shape == (4, 4, 8)
        assert kept[layer]["train_queries"].shape == (4, 16, 8)


def test_dump_of_the_recall_model_finds_the_retrieval_heads(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    dump = tmp_path / "dump"
    arguments = ("--tokens", "2048", "--queries", "11", "--train-queries", "64")
    assert dump_qkv.main([str(dump), *arguments]) == 0
    few = ("--methods", "adaptive", "--budgets", "0.05", "--heads", "8")
    rows = evaluate("fidelity", "--dump", str(dump), *few)["rows"]
    assert len({row["head"] for row in rows}) == 8
    assert "sharp" in {row["head_class"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "9", "--tokens", "512"], "no full attention in layers [9]; it is in []"),
        (["--tokens", "512", "--train-queries", "600"], "too few for 32 and 600 queries"),
        (["--text", "nowhere"], "nowhere cannot be read"),
        (["--model", "nowhere"], "'nowhere' needs a --text"),
    ],
)
def test_dump_of_what_cannot_be_says_so_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--train-queries", "8"]
    assert dump_qkv.main([str(tmp_path / "dump"), *few, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dump").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", "--methods", "best"], "unknown method 'best'; known: oracle"),
        (["fidelity", "--budgets", "0"], "budget 0.0 is no share"),
        (["fidelity", "--dump", "nowhere"], "nowhere cannot be read as a dump"),
        (["fidelity", "--num-keys", "100"], "100 keys are too few"),
        (["tasks", "--tasks", "common_words"], "'recall' has no task 'common_words'"),
        (["tasks", "--policies", "fast"], "unknown policy 'fast'"),
        (["tasks", "--model", "nowhere"], "'nowhere': no such folder"),
        (["tasks", "--tokens", "20"], "multi_needle: 20 tokens are too few"),
        (["tasks", "--tokens", "100", "--tasks", "common_values"], "do not make 100 tokens"),
    ],
)
def test_eval_of_what_cannot_be_prints_one_line_and_returns_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_eval_with_a_report_that_cannot_be_written_says_so_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    report = str(tmp_path / "file" / "report")
    assert main(["eval", "fidelity", "--report", report]) == 2
    assert "the results cannot be written" in capsys.readouterr().err
