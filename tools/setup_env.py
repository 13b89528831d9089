"""Make .venv, or bring it up to date. Needs Python 3.11 and nothing else.

torch comes first, because the right build depends on the machine, and the wrong one brings several
gigabytes of CUDA libraries along. Then come the pins of requirements.lock, then this checkout.
Nothing outside .venv is touched, and a second run that finds nothing changed does nothing.

Environment variables
---------------------
OFFLOAD_TORCH_INDEX
    URL of a package index that serves CPU builds of torch.
OFFLOAD_ALLOW_CUDA
    ``1``: take the default build of torch on a machine without an NVIDIA GPU too.
"""

# So that an older Python gets as far as the message that says it is too old.
from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "offload-setup.stamp"
LOCK = ROOT / "requirements.lock"
TORCH_RANGE = "torch>=2.11"
TORCH_CPU = "torch==2.13.0"
NO_TORCH = f"""\
setup: no CPU build of torch was found, and the default one brings CUDA libraries (gigabytes) that
this machine, where nvidia-smi finds no GPU, cannot use. Either
  OFFLOAD_TORCH_INDEX=<URL of an index of CPU wheels> make setup   the PyTorch site names one
  OFFLOAD_ALLOW_CUDA=1 make setup                                  take the default build
or put a wheel of {TORCH_CPU} where pip's find-links setting points."""


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before any installer has looked
        print(f"setup: Python 3.11 or newer is needed, this is {platform.python_version()}")
        return 1
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    try:
        # A run that is cut short must not look like one that finished.
        STAMP.unlink(missing_ok=True)
        make_venv()
        install_torch()
        say(f"the pinned versions of {LOCK.name}")
        pip("-r", str(LOCK))
        say("this checkout, editable")
        pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    STAMP.write_text(wanted)
    say("done")
    return 0


def fingerprint() -> str:
    """Hash what decides the content of .venv."""
    digest = hashlib.sha256(f"{ROOT} {platform.python_version()}".encode())
    for file in (ROOT / "pyproject.toml", LOCK, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    if PYTHON.exists() and succeeds([str(PYTHON), "-m", "pip", "--version"]):
        return
    say(f"a virtual environment in {VENV}")
    try:
        venv.create(VENV, with_pip=True)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(
            "setup: this Python cannot make virtual environments with pip "
            "(on Debian and Ubuntu: apt install python3-venv)"
        ) from error


def install_torch() -> None:
    installed = installed_torch()
    if installed is not None:
        say(f"torch {installed} is there")
    elif has_nvidia_gpu():
        say("torch, the build with CUDA: nvidia-smi finds a GPU")
        pip("--constraint", str(LOCK), TORCH_RANGE)
    elif not install_cpu_torch():
        raise SetupError(NO_TORCH)


def install_cpu_torch() -> bool:
    """Install a build of torch without CUDA, from the first place that has one."""
    say(f"{TORCH_CPU}, a CPU build, from pip's find-links")
    if succeeds(pip_command("--no-index", "--no-deps", TORCH_CPU)):
        return True
    index = os.environ.get("OFFLOAD_TORCH_INDEX")
    if index:
        say(f"torch, a CPU build, from {index}")
        # Of one version pip prefers the CPU build, wherever else it is told to look; of a range
        # it might take a newer one with CUDA.
        pip("--no-deps", "--index-url", index, TORCH_CPU)
        return True
    if sys.platform in ("darwin", "win32") or os.environ.get("OFFLOAD_ALLOW_CUDA") == "1":
        say("torch, the default build")
        pip("--constraint", str(LOCK), TORCH_RANGE)
        return True
    return False


def installed_torch() -> str | None:
    """Return the version of torch in .venv, if it is in range."""
    code = "from importlib.metadata import version; print(version('torch'))"
    process = subprocess.run([PYTHON, "-c", code], check=False, capture_output=True, text=True)
    version = process.stdout.strip()
    if process.returncode != 0 or tuple(map(int, version.split(".")[:2])) < (2, 11):
        return None
    return version


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi runs and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    process = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
    return process.returncode == 0 and "GPU" in process.stdout


def pip(*arguments: str) -> None:
    """Run ``pip install`` in .venv."""
    process = subprocess.run(pip_command(*arguments), check=False)
    if process.returncode != 0:
        raise SetupError(f"setup: pip install {' '.join(arguments)} failed, see above")


def succeeds(command: list[str]) -> bool:
    """Run a command whose failure is an ordinary answer."""
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def pip_command(*arguments: str) -> list[str]:
    options = ["--quiet", "--disable-pip-version-check"]
    return [str(PYTHON), "-m", "pip", "install", *options, *arguments]


def say(what: str) -> None:
    print(f"setup: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
