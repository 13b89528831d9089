"""Build the sdist and the wheel, and look at what someone who installs the wheel gets.

The build uses the setuptools of this environment, the installation takes no dependencies, and the
clean environment borrows this one's, so nothing is downloaded.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path
from subprocess import PIPE, STDOUT

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "results")
BARE_NAMES = ("tiers", "index", "prefetch", "kernels")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="offload-wheel-") as temporary:
        wheel = build(Path(temporary))
        problems = look_inside(wheel)
        python = install(wheel, Path(temporary) / "venv")
        problems += try_imports(python)
    for problem in problems:
        print(f"wheel: {problem}")
    print(f"wheel: {wheel.name}: {'not good' if problems else 'good'}")
    return 1 if problems else 0


def build(temporary: Path) -> Path:
    """Build an sdist, and from it a wheel, so that the sdist is known to be complete."""
    # From a copy: setuptools also ships what an earlier build in the same tree has listed.
    source, destination = temporary / "source", temporary / "dist"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(destination)]
    process = subprocess.run(
        [*command, str(source)], check=False, stdout=PIPE, stderr=STDOUT, text=True
    )
    if process.returncode != 0:
        sys.exit(f"{process.stdout}\nwheel: the build failed")
    return next(destination.glob("*.whl"))


def look_inside(wheel: Path) -> list[str]:
    """Compare the content of the wheel with the files of the packages on disk."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    problems = [f"{name} is outside offload/" for name in names if not name.startswith("offload/")]
    missing = shipped_files() - names
    return problems + [f"{name} is missing" for name in sorted(missing)]


def shipped_files() -> set[str]:
    """Name every file of the packages as a wheel would: modules, data and ``py.typed``."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = set()
    for package, folder in settings["package-dir"].items():
        inside = package.replace(".", "/")
        files |= {f"{inside}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    data = [file for file in (ROOT / "offload" / "assets").rglob("*") if file.is_file()]
    return files | {str(file.relative_to(ROOT)) for file in data} | {"offload/py.typed"}


def install(wheel: Path, environment: Path) -> Path:
    """Install the wheel alone; what it depends on is borrowed from this environment."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-I", "-c", code], text=True).strip())
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
    # A .pth file adds the folder but does not run the .pth files in it, so the editable
    # installation of this checkout stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def try_imports(python: Path) -> list[str]:
    """Import the package, and fail to import its folders, from a directory that has neither."""
    problems = []
    found = run(python, "import offload; print(offload.__file__)")
    if not found.stdout.startswith(str(python.parent.parent)):
        problems.append(f"import offload found {found.stdout or found.stderr}")
    command = [str(python.parent / "offload"), "--version"]
    version = subprocess.run(command, cwd="/", check=False, capture_output=True, text=True)
    print(f"wheel: offload --version: {version.stdout.strip()}")
    if version.returncode != 0:
        problems.append(f"offload --version failed: {version.stderr}")
    for name in BARE_NAMES:
        bare = run(python, f"import {name}")
        print(f"wheel: python -c 'import {name}': {bare.stderr.strip().splitlines()[-1:]}")
        if bare.returncode == 0:
            problems.append(f"the bare name {name} can be imported")
    return problems


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-c", code], cwd="/", check=False, capture_output=True, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
