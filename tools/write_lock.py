"""Write requirements.lock: what this environment holds of our dependencies, and of theirs.

torch is left out. Which build fits depends on the machine (tools/setup_env.py chooses), but what
torch itself needs is in the lock, so that installing it can bring nothing else along.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Written by `make lock`; do not edit. Everything the project and its development tools need, with
# what those need in turn. torch is chosen by tools/setup_env.py.
"""

MARKERS = {"triton": "; sys_platform == 'linux' and platform_machine == 'x86_64'"}
"""Of what is not to be had everywhere, as in pyproject.toml."""


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    versions = resolve([Requirement(text) for text in wanted])
    pins = [
        f"{name}=={version}{MARKERS.get(name, '')}"
        for name, version in sorted(versions.items())
        if name != "torch"
    ]
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{LOCK.name}: {len(pins)} pins")
    return 0


def resolve(wanted: list[Requirement]) -> dict[str, str]:
    """Follow requirements through the installed distributions to their versions."""
    versions: dict[str, str] = {}
    extras_seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        extras = frozenset(requirement.extras)
        if (name, extras) in extras_seen:
            continue
        extras_seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        versions[name] = distribution.version
        wanted += needs(distribution, extras)
    return versions


def needs(
    distribution: importlib.metadata.Distribution, extras: frozenset[str]
) -> Iterator[Requirement]:
    """Yield what a distribution requires on this machine, with the given extras."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        markers = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(map(requirement.marker.evaluate, markers)):
            yield requirement


if __name__ == "__main__":
    sys.exit(main())
