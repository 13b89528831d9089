"""Compare OffloadedCache with DynamicCache under several transformers releases.

    python tools/check_versions.py [--versions 5.4.0 '5.6.*'] [--json result.json] [--folder DIR]

Each release is installed into an environment of its own, which sees the packages of the running
one (torch above all) through a ``.pth`` file, so that only transformers and what it pins are
downloaded. A release from before the cache interface we use has to be refused with a ConfigError.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_VERSIONS = ("5.4.0", "5.6.*", "5.10.*", "5.14.*", "5.15.*", "5.17.0", "5.18.0", "5.23.0")
_REFUSED = "5.3.0"
_ARCHITECTURES = ("llama", "gemma3", "qwen3_next", "deepseek_v3")
_MODES = ("greedy", "beams", "padded", "prompt_lookup", "three_turns", "prefix_forks", "crop")
_MAX_LOGIT_ERROR = 1e-4


def make_environment(folder: Path, version: str) -> Path:
    """Install a release into a new environment and return its interpreter."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # Comes after the environment's own folder on the path, so what is installed here wins.
    Path(own, "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"transformers=={version}"], check=True)
    return python


def check_version(python: Path) -> dict[str, Any]:
    """Run the comparison in another interpreter; return its report, or how it died."""
    done = subprocess.run(
        [python, __file__, "--smoke"],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exit|Exception)\b.*", done.stderr, re.MULTILINE)
        return {"error": errors[-1] if errors else f"ended with {done.returncode}"}
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def run_smoke() -> dict[str, Any]:
    """Compare a few cells under the installed release.

    Returns
    -------
    dict
        ``version``, and ``cells`` from ``architecture/mode`` to ``same``, ``refused`` (by
        transformers itself), or what is different.
    """
    import torch
    import transformers

    from tests.support.cells import Cell

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, architecture in enumerate(_ARCHITECTURES):
            for j, mode in enumerate(_MODES):
                cell = Cell(architecture, "sdpa", mode, (4, 8)[j % 2], with_config=(i + j) % 3 == 0)
                cells[f"{architecture}/{mode}"] = _run_cell(cell, Path(folder))
    return {"version": transformers.__version__, "cells": cells}


def _run_cell(cell: Any, folder: Path) -> str:
    from tests.support.cells import compare, expected_outcome, run_offloaded

    try:
        expected = expected_outcome(cell.architecture, cell.attention, cell.mode)
    except (ValueError, RuntimeError, AttributeError):
        return "refused"
    try:
        found, _ = run_offloaded(cell, folder)
    except Exception as error:  # any failure of ours is a result to report
        return f"{type(error).__name__}: {error}"
    comparison = compare(expected, found)
    if comparison.same_tokens and comparison.logit_error <= _MAX_LOGIT_ERROR:
        return "same"
    return f"differs: same tokens {comparison.same_tokens}, logits {comparison.logit_error:.1e}"


def print_report(version: str, report: dict[str, Any]) -> bool:
    """Print one line per release and one per difference; return whether all is well."""
    if "error" in report:
        well = version == _REFUSED and "ConfigError" in report["error"]
        print(f"{version:<10}{'refused, as it should be' if well else 'FAILED'}: {report['error']}")
        return well
    outcomes = report["cells"]
    wrong = {name: what for name, what in outcomes.items() if what not in ("same", "refused")}
    same = sum(what == "same" for what in outcomes.values())
    refused = sum(what == "refused" for what in outcomes.values())
    print(f"{report['version']:<10}{same:>4} same{len(wrong):>4} different{refused:>4} refused")
    for name, what in wrong.items():
        print(f"    {name}: {what}")
    return not wrong and version != _REFUSED


def main() -> int:
    """Check every release; return 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--versions", nargs="+", default=[*_VERSIONS, _REFUSED])
    parser.add_argument("--json", type=Path, help="where to write every outcome")
    parser.add_argument("--folder", type=Path, help="keep the environments here and reuse them")
    parser.add_argument("--smoke", action="store_true", help="compare under the installed release")
    arguments = parser.parse_args()
    if arguments.smoke:
        print(json.dumps(run_smoke()))
        return 0
    reports, well = {}, True
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.folder or Path(temporary)
        for version in arguments.versions:
            folder = base / version.replace("*", "x")
            python = folder / "bin" / "python"
            if not python.exists():
                python = make_environment(folder, version)
            reports[version] = check_version(python)
            well &= print_report(version, reports[version])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(reports, indent=1))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
