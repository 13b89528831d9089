"""What every test runs under: one thread, a hypothesis profile, and the checks behind markers."""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.leaks import no_leaks
from tests.support.remote import folder_bucket

_FAULT_TESTS = Path(__file__).parent / "fault"

# Derandomised, so that a push never fails on luck; the nightly run is the one that explores.
settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("nightly", max_examples=500, deadline=None)
settings.load_profile("ci")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.getoption("markexpr"):
        soaks = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]
    for item in items:
        if item.path.is_relative_to(_FAULT_TESTS):
            item.add_marker(pytest.mark.leaks)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@functools.cache
def _start_shared_threads() -> None:
    """Have obstore open what it keeps open for all of the process."""
    with tempfile.TemporaryDirectory() as folder:
        folder_bucket(Path(folder)).list("nothing")


@pytest.fixture(autouse=True)
def _check_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("leaks") is None:
        yield
        return
    _start_shared_threads()
    temporary_files = request.getfixturevalue("tmp_path") / "temporary-files"
    temporary_files.mkdir()
    with no_leaks(temporary_files):
        yield
