"""What the tests of archives start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.sessions.store import SessionStore
from tests.support.archives import export_tiny, occupied_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    with occupied_store(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("good"))


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Where a test puts its archive."""
    return tmp_path / "bad.kv.tar.zst"
