"""``offload generate --session``: a text that several runs write, end to end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from offload.cli import main
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from tests.support.continuation import NEW_TOKENS, continued
from tests.support.models import make_model
from tests.support.sessions import make_content, save, small_store

_CHUNK_TOKENS = 64

Generate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Real text with records, in two parts, each with the start of one of them again."""
    document = build_document(512, 6, seed=3)
    text = bytes(document.token_ids[1:]).decode()
    return [text + document.facts[2].prompt, f". {document.facts[4].prompt}"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Callable[..., int]:
    """Run the command on the shipped model, unless told otherwise."""

    def run(*arguments: str, model: str = "recall") -> int:
        always = ["--disk-path", str(tmp_path / "disk"), "--root", str(root), "--threads", "1"]
        count = ["--max-new-tokens", str(NEW_TOKENS)]
        return main(["generate", "--model", model, *count, *always, *arguments])

    return run


@pytest.fixture
def generate(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Generate:
    """Run the command, and return what it prints as JSON."""

    def generate(prompt: str, session: str, *arguments: str, **kwargs: str) -> dict[str, Any]:
        capsys.readouterr()
        assert run("--prompt", prompt, "--session", session, "--json", *arguments, **kwargs) == 0
        data: dict[str, Any] = json.loads(capsys.readouterr().out)
        return data

    return generate


@pytest.mark.parametrize("capacity", ["", "gpu=512KiB,cpu=512KiB,disk=64MiB"])
def test_generate_with_a_session_goes_on_where_the_last_run_ended(
    generate: Generate, prompts: list[str], capacity: str
) -> None:
    first = generate(prompts[0], "chat", "--capacity", capacity)
    assert first["text"] == continued(prompts[0])
    assert (first["prompt_tokens"], first["resumed_tokens"]) == (len(prompts[0]), 0)
    text = prompts[0] + first["text"]
    second = generate(prompts[1], "chat", "--capacity", capacity)
    assert second["text"] == continued(text + prompts[1])
    assert second["resumed_tokens"] == len(text)
    assert second["prompt_tokens"] == len(text + prompts[1])


def test_generate_with_a_new_session_reuses_what_other_sessions_begin_with(
    generate: Generate, prompts: list[str]
) -> None:
    generate(prompts[0], "first")
    second = generate(prompts[0] + prompts[1], "second")
    assert second["resumed_tokens"] == len(prompts[0]) // _CHUNK_TOKENS * _CHUNK_TOKENS > 0
    assert second["text"] == continued(prompts[0] + prompts[1])


def test_generate_keeps_a_session_pinned_and_lets_it_expire_as_before(
    generate: Generate, root: Path
) -> None:
    generate("In the beginning", "chat")
    with small_store(root) as store:
        before = store.info("chat")
        assert (before.is_pinned, before.expires_at) == (False, None)
        store.pin("chat")
        store.set_ttl("chat", 5000)
        expires_at = store.info("chat").expires_at
    generate(" and then", "chat")
    with small_store(root) as store:
        after = store.info("chat")
    assert after.is_pinned
    assert after.expires_at == pytest.approx(expires_at, abs=0.1)


def test_generate_leaves_the_token_that_ended_a_text_out_of_the_session(
    generate: Generate, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    load_recall_model()[1].save_pretrained(folder)
    GenerationConfig(eos_token_id=list(range(256))).save_pretrained(folder)  # any token ends it
    assert generate("IN THE", "chat", model=str(folder))["new_tokens"] == 1
    with small_store(root) as store:
        found = store.describe("chat").token_ids
    assert found is not None
    assert bytes(found[0].tolist()) == b"IN THE"


def test_generate_with_stats_says_how_much_was_resumed(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "In the beginning", "--session", "chat") == 0
    assert run("--prompt", " and then", "--session", "chat", "--stats") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert f"resumed {len('In the beginning') + NEW_TOKENS} tokens" in lines
    assert any(line.startswith("prompt 9 tokens in ") for line in lines)


def test_generate_with_the_session_of_another_model_names_what_differs(
    generate: Generate, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    generate("In the beginning", "chat")
    assert run("--prompt", "x", "--session", "chat", "--dtype", "bfloat16") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("offload: session 'chat' does not fit the model: ")


def test_generate_prints_the_text_before_it_finds_no_room_to_save_it(
    run: Callable[..., int], root: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small_store(root, quota="9MiB").close()
    assert run("--prompt", prompts[0] * 2, "--session", "chat") == 2
    printed = capsys.readouterr()
    assert len(printed.out) > NEW_TOKENS
    assert "used of the quota of 9 MiB" in printed.err.splitlines()[-1]
    with small_store(root) as store:
        assert store.list() == []


@pytest.mark.parametrize("options", [[], ["--json", "--stats"]])
def test_generate_saves_the_whole_text_though_nobody_reads_it(
    options: list[str], root: Path, tmp_path: Path, prompts: list[str]
) -> None:
    """Scenario: ``offload generate ... | head``, and head is gone before the first word."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--model", "recall", "--session", "chat", "--prompt", prompts[0], *options]
    folders = ["--root", str(root), "--disk-path", str(tmp_path / "disk"), "--threads", "1"]
    count = ["--max-new-tokens", str(NEW_TOKENS)]
    command = [sys.executable, "-m", "offload.cli", "generate", *arguments, *folders, *count]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is kept back is written at exit
    with open(writer, "wb") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.PIPE, text=True, check=True, env=buffered
        )
    assert "Error" not in done.stderr
    assert "Exception" not in done.stderr
    with small_store(root) as store:
        ids = store.describe("chat").token_ids
    assert ids is not None
    assert bytes(ids[0].tolist()).decode() == prompts[0] + continued(prompts[0])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "is where sessions are; name one with --session"),
        (["--session", "../chat"], "'../chat' is no name for a session"),
        (["--session", "a", "--tiers", "gpu,cpu"], "add 'disk' to --tiers gpu,cpu"),
        (["--session", "rows"], "session 'rows' has 2 rows; one can be continued"),
        (["--session", "unknown"], "session 'unknown' was saved without its tokens"),
    ],
)
def test_generate_with_an_impossible_session_says_why_before_a_model_is_loaded(
    arguments: list[str],
    reason: str,
    run: Callable[..., int],
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with small_store(root) as store:
        save(store, "rows", make_content(1, 1, rows=2))
        save(store, "unknown", make_content(1, 1))
    assert run("--prompt", "a", *arguments, model="nowhere") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line
