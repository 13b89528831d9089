"""Run transformers' own generation tests, unmodified, on OffloadedCache.

    python tools/run_transformers_tests.py CHECKOUT [--models llama qwen3] [--json result.json]

CHECKOUT is a git checkout of transformers at the tag of the installed version, for its ``tests``
folder. Every test runs twice: with DynamicCache, and with OffloadedCache in its place (see
``tools/route_dynamic_cache.py``). It passes if what fails on OffloadedCache fails on DynamicCache
too. Takes a minute for the four models of the default.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_ROOT = Path(__file__).resolve().parents[1]
_MODELS = ("llama", "qwen3", "mistral", "gemma3")
_NEEDED = {"parameterized": "parameterized", "requests": "requests", "PIL": "pillow"}
_SELECTED = (
    "greedy_generate",
    "sample_generate",
    "beam_search_generate",
    "beam_sample_generate",
    "assisted_decoding",
    "prompt_lookup_decoding",
    "left_padding_compatibility",
    "past_key_values_format",
    "generate_continue_from",
    "generate_from_inputs_embeds",
    "custom_4d_attention_mask",
    "logits_to_keep",
    "with_and_without_position_ids",
    "recurrent_layers_mask_padding",
)
"""Parts of the names of tests that generate and need no network."""


@dataclass(frozen=True, slots=True)
class Result:
    """How one test ended."""

    outcome: str
    message: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run of all tests.

    Attributes
    ----------
    results : dict of str to Result
        By test id.
    routed : dict of str to int
        What the routed caches did; empty for a run on DynamicCache.
    """

    results: dict[str, Result]
    routed: dict[str, int]


def run_tests(checkout: Path, models: list[str], keyword: str, *, routed: bool) -> Run:
    """Run the selected tests of some models once, in a process of their own."""
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in models]
    with tempfile.TemporaryDirectory() as folder:
        junit, report = Path(folder, "junit.xml"), Path(folder, "routed.json")
        command = [sys.executable, "-m", "pytest", *files, "-k", keyword, "-q", "-W", "ignore"]
        command += ["-p", "no:cacheprovider", "-o", "log_cli=false", f"--junitxml={junit}"]
        if routed:
            command += ["-p", "tools.route_dynamic_cache", f"--routed-report={report}"]
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            command,
            cwd=checkout,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise SystemExit(f"pytest ended with {done.returncode} in {checkout}:\n{tail}")
        counts = json.loads(report.read_text()) if routed else {}
        return Run(read_junit(junit), counts)


def read_junit(path: Path) -> dict[str, Result]:
    """Read outcome and message of every test from a JUnit file."""
    results = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = (child.get("message") or "").partition("\n")[0]
        results[name] = Result(outcome, message)
    return results


def new_failures(stock: Run, ours: Run) -> dict[str, str]:
    """Return the tests that did not fail on DynamicCache and do on OffloadedCache, with messages.

    A test that only one of the runs skipped, or did not have, counts too.
    """
    lost = {name: "did not run" for name in stock.results if name not in ours.results}
    for name, result in ours.results.items():
        before = stock.results.get(name, Result("missing", "")).outcome
        if result.outcome != before and before != "failed":
            lost[name] = f"{before} before, now {result.outcome}: {result.message}"
    return lost


def print_table(models: list[str], stock: Run, ours: Run) -> None:
    """Print what passed, failed and was skipped, by model."""
    print(f"{'model':<16}{'DynamicCache':>28}{'OffloadedCache':>28}")
    print(f"{'':<16}" + 2 * f"{'pass':>10}{'fail':>9}{'skip':>9}")
    for model in [*models, "total"]:
        line = f"{model:<16}"
        for run in (stock, ours):
            counts = Counter(
                result.outcome
                for name, result in run.results.items()
                if model == "total" or f".models.{model}." in name
            )
            line += f"{counts['passed']:>10}{counts['failed']:>9}{counts['skipped']:>9}"
        print(line)


def check_needs(checkout: Path) -> None:
    """Exit with what is missing, if something is."""
    missing = [package for name, package in _NEEDED.items() if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"transformers' tests need: pip install {' '.join(missing)}")
    if not (checkout / "tests" / "generation" / "test_utils.py").is_file():
        raise SystemExit(
            f"{checkout} has no tests/generation/test_utils.py: it must be a git checkout of "
            "transformers, the source archive lacks these files"
        )


def main() -> int:
    """Run both, print the table, and return 1 if OffloadedCache fails more."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--models", nargs="+", default=list(_MODELS))
    parser.add_argument("--keyword", default=" or ".join(_SELECTED), help="as pytest's -k")
    parser.add_argument("--json", type=Path, help="where to write every outcome")
    arguments = parser.parse_args()
    check_needs(arguments.checkout)
    runs = [
        run_tests(arguments.checkout, arguments.models, arguments.keyword, routed=routed)
        for routed in (False, True)
    ]
    stock, ours = runs
    lost = new_failures(stock, ours)
    print_table(arguments.models, stock, ours)
    print("\nwhat the offloaded caches did:", json.dumps(ours.routed))
    for name, message in lost.items():
        print(f"NEW FAILURE {name}\n    {message}")
    if arguments.json is not None:
        outcomes = {
            name: [run.results[name].outcome if name in run.results else "missing" for run in runs]
            for name in sorted(stock.results.keys() | ours.results.keys())
        }
        report = {"outcomes": outcomes, "new_failures": lost, "routed": ours.routed}
        arguments.json.write_text(json.dumps(report, indent=1))
    return 1 if lost or not ours.routed.get("updates") else 0


if __name__ == "__main__":
    sys.exit(main())
