"""``offload generate`` on the shipped model and on a folder, end to end."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.cli import main
from offload.cli_generate import parse_capacity, read_prompt
from offload.errors import ConfigError
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from tests.support.continuation import NEW_TOKENS, continued
from tests.support.models import make_model


@pytest.fixture(scope="module")
def prompt() -> str:
    """Real text with records, and the start of one of them again."""
    document = build_document(1024, 10, seed=3)
    text = bytes(document.token_ids[1:]).decode()
    return text + document.facts[2].prompt


@pytest.fixture(scope="module")
def expected(prompt: str) -> str:
    """What the shipped model makes of the prompt on a DynamicCache."""
    return continued(prompt)


@pytest.fixture
def generate(tmp_path: Path) -> Callable[..., int]:
    """Run the command on the shipped model, unless told otherwise."""

    def run(*arguments: str, model: str = "recall") -> int:
        disk = [] if "--tiers" in arguments else ["--disk-path", str(tmp_path / "disk")]
        count = ["--max-new-tokens", str(NEW_TOKENS), "--threads", "1"]
        return main(["generate", "--model", model, *count, *disk, *arguments])

    return run


def test_generate_streams_the_text_of_dynamic_cache(
    generate: Callable[..., int], prompt: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--prompt", prompt) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected}\n"
    assert "prefetch hit rate" not in printed.err


def test_generate_on_a_cache_that_does_not_fit_gives_the_same_text_through_the_disk(
    generate: Callable[..., int], prompt: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capacity = "gpu=512KiB,cpu=512KiB,disk=64MiB"
    assert generate("--prompt", prompt, "--capacity", capacity, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["text"] == expected
    assert data["prompt_tokens"] == len(prompt)
    assert data["new_tokens"] == NEW_TOKENS
    assert data["stats"]["num_tokens"] == len(prompt) + NEW_TOKENS - 1
    assert data["stats"]["tiers"]["disk"]["loaded_bytes"] > 0
    assert data["stats"]["tiers"]["gpu"]["capacity_bytes"] == 512 * 1024


@pytest.mark.parametrize("size", ["1", "100", "100000"])
def test_generate_with_a_prompt_read_in_pieces_gives_the_same_text(
    generate: Callable[..., int],
    prompt: str,
    size: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = prompt[-200:]
    assert generate("--prompt", short) == 0
    whole = capsys.readouterr().out
    assert generate("--prompt", short, "--prefill-chunk-size", size, "--tiers", "gpu") == 0
    assert capsys.readouterr().out == whole


def test_generate_with_stats_prints_them_to_standard_error(
    generate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--prompt", "In the beginning", "--stats", "--tiers", "gpu, cpu") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "tokens 27" in lines
    assert any(line.startswith("gpu │") for line in lines)
    assert not any(line.startswith("disk │") for line in lines)


def test_generate_with_a_sparse_policy_prints_what_was_read(
    generate: Callable[..., int], prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = ["--policy", "adaptive", "--budget", "0.5"]
    assert generate("--prompt", prompt + prompt, "--stats", *sparse) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    [read] = [line for line in lines if line.startswith("read sparsely")]
    assert read.endswith("% of what is indexed")


def test_generate_with_a_file_and_a_text_continues_the_file_followed_by_the_text(
    generate: Callable[..., int],
    prompt: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(prompt[:-7])
    assert generate("--prompt-file", str(file), "--prompt", prompt[-7:]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_generate_with_a_dash_reads_the_prompt_from_standard_input(
    generate: Callable[..., int],
    prompt: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert generate("--prompt-file", "-") == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_generate_with_a_temperature_depends_on_the_seed_alone(
    generate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        how = ["--temperature", "2", "--top-p", "0.9", "--seed", seed]
        assert generate("--prompt", "In the", *how) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_with_a_one_token_prompt_on_a_folder_works(
    generate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    load_recall_model()[1].save_pretrained(folder)
    assert generate("--prompt", "A", "--json", model=str(folder)) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["prompt_tokens"], data["new_tokens"]) == (1, NEW_TOKENS)


def test_generate_with_a_missing_folder_says_so_in_one_line_and_leaves_nothing(
    generate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--prompt", "a", model="nowhere") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "offload: model 'nowhere': no such folder; give a local folder or 'recall'"
    assert not any(path.is_dir() for path in (tmp_path / "disk").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no prompt; give --prompt-file, --prompt, or both"),
        (["--prompt", " \n"], "the prompt is empty (2 characters"),
        (["--prompt-file", "nowhere.txt"], "cannot read prompt file 'nowhere.txt': No such file"),
        (["--prompt", "a", "--tiers", "gpu,tape"], "unknown tier 'tape'"),
        (["--prompt", "a", "--tiers", ""], "unknown tier ''"),
        (["--prompt", "a", "--capacity", "gpu"], "capacity 'gpu' is not of the form tier=size"),
        (["--prompt", "a", "--capacity", "gpu=much"], "'much' (str) is not a size"),
        (["--prompt", "a", "--policy", "best"], "unknown policy 'best'"),
        (["--prompt", "a", "--budget", "9"], "policy 'exact' reads everything; it takes no budget"),
        (["--prompt", "a", "--policy", "quest", "--error", "0.1"], "policy 'quest' cannot tell"),
        (["--prompt", "a", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_generate_with_a_bad_argument_says_why_in_one_line(
    generate: Callable[..., int],
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(*arguments) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"offload: {reason}")
    assert printed.out == ""
    assert not any(path.is_dir() for path in (tmp_path / "disk").glob("*"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "hot"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--max-new-tokens", "0"),
        ("--prefill-chunk-size", "1.5"),
    ],
)
def test_generate_with_a_number_out_of_range_is_refused(
    generate: Callable[..., int],
    option: str,
    value: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        generate("--prompt", "a", option, value)
    assert refused.value.code == 2
    assert f"argument {option}: {value!r} is not a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "capacity"),
    [
        ("", {}),
        ("gpu=2GiB", {"gpu": "2GiB"}),
        ("gpu=2GiB, disk = 1.5 TB", {"gpu": "2GiB", "disk": "1.5 TB"}),
    ],
)
def test_capacity_as_text_is_read_by_tier(text: str, capacity: dict[str, str]) -> None:
    assert parse_capacity(text) == capacity


@pytest.mark.parametrize("text", ["gpu", "gpu=", "=2GiB", "gpu=1,gpu=2"])
def test_capacity_that_names_no_tier_or_no_size_or_one_twice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form tier=size|twice"):
        parse_capacity(text)


def test_prompt_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin-1.txt"
    file.write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin-1.txt' is not UTF-8: .*position 1"):
        read_prompt(str(file), None)
