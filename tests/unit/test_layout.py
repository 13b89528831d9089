"""The shape of the repository: folders, links, imports and file lengths."""

import ast
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("kernels", "tiers", "index", "prefetch")
SUBPACKAGES = (
    *("bench", "evals", "plugins", "sessions", "sparse", "video"),
    *("daemon", "daemon/http", "daemon/ops", "daemon/sharing", "daemon/work"),
)
"""Folders inside ``offload/`` itself."""
NESTED = {"tiers": ("near",)}
"""Folders inside root folders; setuptools has to be told of each."""
ALL_FOLDERS = ("offload", *FOLDERS, "tests", "tools", "benchmarks", "examples")
NOUNS = {"offload.errors", "offload.types"}
SHARED = NOUNS | {"offload.config", "offload.stats"}

# What each folder may import from the rest of the package. Siblings are not in the list: `prefetch`
# sees the tiers through protocols of its own.
MAY_IMPORT = {
    "kernels": {"offload.kernels"} | NOUNS,
    "tiers": {"offload.tiers", "offload.kernels"} | SHARED,
    "index": {"offload.index", "offload.kernels"} | SHARED,
    "prefetch": {"offload.prefetch"} | SHARED,
}

# The Hugging Face side: the only modules that know transformers exists, on top of all others.
HUGGING_FACE = {
    "__init__",
    "_compat",
    "attention",
    "bench",
    "cache",
    "cli_bench",
    "cli_demo",
    "cli_doctor",
    "cli_eval",
    "cli_generate",
    "cli_resume",
    "cli_serve",
    "cli_text",
    "cli_video",
    "daemon",
    "demo",
    "demo_report",
    "evals",
    "generate",
    "hybrid",
    "identity",
    "layers",
    "local_model",
    "lookahead",
    "masks",
    "micro_batches",
    "packaged_model",
    "weights",
    "prefill",
    "recall_data",
    "recall_model",
    "resume",
    "support",
    "video",
}

# Imported where they are found, and done without where they are not.
OPTIONAL = {"PIL", "av", "llvmlite", "matplotlib", "numba", "triton"} | {
    # The daemon.
    "aiofiles",
    "anyio",
    "fastapi",
    "httpx",
    "jsonschema",
    "llguidance",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "starlette",
    "structlog",
    "uvicorn",
    "yaml",
    # Encryption.
    "cryptography",
    # The remote tier.
    "obstore",
    # Replicas of the daemon.
    "ray",
    # Engines that load a plug-in.
    "sglang",
    "vllm",
}

MAX_LINES = 400
MAX_MEDIAN_LINES = 150


def python_files(*folders: str) -> list[Path]:
    """List the files of root folders, each under its real path."""
    return sorted({file.resolve() for name in folders for file in (ROOT / name).rglob("*.py")})


def runtime_files() -> list[Path]:
    """List the files of the package that are not on the Hugging Face side."""
    face = [f"offload.{name}" for name in HUGGING_FACE]
    files = python_files("offload", *FOLDERS)
    return [file for file in files if not any(is_inside(module_name(file), name) for name in face)]


def module_name(file: Path) -> str:
    return relative(file).removesuffix(".py").replace("/", ".")


def imported_modules(file: Path) -> Iterator[str]:
    """Name every module that a file may import, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from offload import x` may name a module; `from offload.x import y` names offload.x.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "offload" else [node.module]


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_package_dir_of_every_folder_matches_its_link() -> None:
    mapping = {f"offload.{name}": name for name in FOLDERS} | {"offload": "offload"}
    inner = [(outer, name) for outer, names in NESTED.items() for name in names]
    mapping |= {f"offload.{outer}.{name}": f"{outer}/{name}" for outer, name in inner}
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == mapping
    packages = {*mapping, *(f"offload.{name.replace('/', '.')}" for name in SUBPACKAGES)}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("name", FOLDERS)
def test_link_in_the_package_leads_to_the_root_folder(name: str) -> None:
    assert str((ROOT / "offload" / name).readlink()) == f"../{name}"


def test_links_in_the_package_are_the_known_folders_and_no_others() -> None:
    links = {entry.name for entry in (ROOT / "offload").iterdir() if entry.is_symlink()}
    assert links == set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_root_folder_has_no_init_file(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", ["offload", *FOLDERS])
def test_folder_of_modules_has_no_folders_of_modules_inside(name: str) -> None:
    # setuptools ships the packages that are listed, and a nested one would be left out in silence.
    depths = {file.relative_to(ROOT / name).parent for file in python_files(name)}
    inner = SUBPACKAGES if name == "offload" else NESTED.get(name, ())
    allowed = {Path(), *map(Path, inner)}
    assert depths <= allowed


def test_every_folder_with_python_files_is_known_here() -> None:
    found = {
        entry.name
        for entry in ROOT.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and any(entry.rglob("*.py"))
    }
    assert found - {"build", "dist"} <= set(ALL_FOLDERS)


def test_every_folder_with_python_files_is_type_checked() -> None:
    reached = {*PYPROJECT["tool"]["mypy"]["files"], *FOLDERS}
    assert reached == set(ALL_FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_from_a_folder_point_down(folder: str) -> None:
    wrong = [
        f"{relative(file)} imports {module}"
        for file in python_files(folder)
        for module in imported_modules(file)
        if is_inside(module, "offload")
        and not any(is_inside(module, name) for name in MAY_IMPORT[folder])
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(SHARED))
def test_import_from_a_shared_module_is_nouns_only(name: str) -> None:
    file = ROOT / f"{name.replace('.', '/')}.py"
    ours = {module for module in imported_modules(file) if is_inside(module, "offload")}
    assert ours <= NOUNS - {name}


def test_imports_from_the_runtime_do_not_reach_hugging_face() -> None:
    barred = {"transformers"} | {f"offload.{name}" for name in HUGGING_FACE}
    wrong = [
        f"{relative(file)} imports {module}"
        for file in runtime_files()
        for module in imported_modules(file)
        if any(is_inside(module, name) for name in barred)
    ]
    assert not wrong


def test_imports_of_other_distributions_are_declared() -> None:
    declared = {Requirement(text).name for text in PYPROJECT["project"]["dependencies"]}
    known = declared | OPTIONAL | sys.stdlib_module_names | {"offload"}
    wrong = [
        f"{relative(file)} imports {module}"
        for file in python_files("offload", *FOLDERS)
        for module in imported_modules(file)
        if module.partition(".")[0] not in known
    ]
    assert not wrong


def test_file_lengths_are_at_most_the_limit() -> None:
    lengths = {
        relative(file): len(file.read_text().splitlines()) for file in python_files(*ALL_FOLDERS)
    }
    assert not {file: length for file, length in lengths.items() if length > MAX_LINES}


def test_file_length_median_is_at_most_the_limit() -> None:
    lengths = [len(file.read_text().splitlines()) for file in python_files(*ALL_FOLDERS)]
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_dev_extra_and_dev_group_are_the_same() -> None:
    group = PYPROJECT["dependency-groups"]["dev"]
    assert PYPROJECT["project"]["optional-dependencies"]["dev"] == group
