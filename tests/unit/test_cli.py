import argparse
import json
from pathlib import Path

import pytest

from offload import cli, cli_doctor
from offload.bandwidth import DiskBandwidth
from offload.errors import ConfigError
from offload.machine import Disk, Machine, Memory


def test_cli_version_prints_the_distribution_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "offload 0.1.0\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["doctor", "--unknown"]])
def test_cli_with_arguments_that_do_not_parse_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: offload" in capsys.readouterr().err


def test_cli_parser_without_a_command_module_leaves_the_command_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_COMMANDS", ("doctor", "not_written_yet"))
    help_text = cli.build_parser().format_help()
    assert "doctor" in help_text
    assert "not_written_yet" not in help_text


def test_cli_command_that_raises_an_offload_error_prints_one_line_and_returns_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "directory"
    assert cli.main(["doctor", "--dir", str(directory)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"offload: {directory} cannot be a directory: {tmp_path / 'file'} is a file\n"
    )


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (KeyboardInterrupt(), 130, "offload: interrupted\n"),
        (ConfigError("no such size"), 2, "offload: no such size\n"),
    ],
)
def test_cli_command_that_raises_returns_the_status_of_the_error(
    error: BaseException,
    status: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli_doctor, "run", run)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == printed


def test_cli_command_that_fails_otherwise_is_not_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli_doctor, "run", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_doctor_json_holds_every_field_in_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", "--probe", "4MiB", "--dir", str(tmp_path / "later")]
    assert cli.main(["doctor", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["kv-offload"] == "0.1.0"
    assert report["machine"]["disk"]["directory"] == str(tmp_path / "later")
    assert set(report["default_capacities"]) == {"gpu", "cpu", "disk"}
    assert report["disk_bandwidth"]["read_bytes_per_s"] > 0
    assert report["memory_read_bytes_per_s"] > 0
    forecast = report["forecast"]
    assert forecast["model"]["costs"]["search"]["unit_s"] > 0
    assert [step["num_tokens"] for step in forecast["steps"]] == sorted(
        step["num_tokens"] for step in forecast["steps"]
    )
    assert list(tmp_path.iterdir()) == []


def test_doctor_table_has_a_row_for_everything_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--probe", "4MiB", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = ("memory", "cgroup limit", "O_DIRECT", "disk read", "default capacity, disk")
    for row in (*found, "disk latency", "memory read", "dense up to", "128K tokens, a layer"):
        assert row in printed


@pytest.mark.parametrize(
    ("file_system", "is_direct", "said"),
    [
        ("tmpfs", True, "is in memory"),
        ("overlay", False, "O_DIRECT is refused"),
    ],
)
def test_doctor_notes_about_the_disk_say_what_is_wrong_with_it(
    file_system: str, is_direct: bool, said: str
) -> None:
    machine = Machine(Memory(1, 1, None), (), Disk(Path("cache"), 1, 1, file_system))
    bandwidth = DiskBandwidth(1.0, 1.0, is_direct, 1.0, 1.0)
    assert any(said in note for note in cli_doctor.find_notes(machine, bandwidth))
