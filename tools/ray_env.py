"""Make .venv-ray, or bring it up to date: what .venv has, and Ray Serve on top of it.

Ray is half a gigabyte and wanted by one command and its tests, so it stays out of .venv. Nothing of
.venv is copied or changed: a .pth file names it.
"""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-ray"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "offload-setup.stamp"
LOCK = ROOT / "requirements.lock"


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = project["optional-dependencies"]["ray"]
    below = sysconfig.get_path("purelib")
    content = "\n".join([*wanted, below, LOCK.read_text()])
    if STAMP.exists() and STAMP.read_text() == content:
        return 0
    print(f"ray: a virtual environment in {VENV}", file=sys.stderr)
    STAMP.unlink(missing_ok=True)
    venv.create(VENV, with_pip=True)
    [packages] = VENV.glob("lib/python*/site-packages")
    # Not the path alone: the editable installation in there has a .pth file of its own.
    (packages / "offload-below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--constraint", str(LOCK), *wanted]
    subprocess.run(pip, check=True)
    STAMP.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
