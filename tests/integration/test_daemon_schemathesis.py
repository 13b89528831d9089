"""What OpenAPI says of the daemon is true, whatever clients send."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.daemon_http import ALICE, RunningDaemon, running_daemon

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    folder = tmp_path_factory.mktemp("daemon")
    # Good requests ask for any number of tokens; they get what fits.
    settings = {"max_context_tokens": 256}
    with running_daemon(
        folder, settings=settings, accept_any_model=True, default_max_tokens=4
    ) as running:
        yield running


def operations(daemon: RunningDaemon) -> list[Any]:
    schema = schemathesis.openapi.from_dict(daemon.app.openapi())
    schema.config.update(base_url=daemon.url)
    found: list[Any] = list(schema.get_all_operations())
    return [result.ok() for result in found]


def try_operation(operation: Any, daemon: RunningDaemon, num_cases: int) -> int:
    """Send so many cases of an operation, good ones and bad; return how many were sent."""
    count = 0
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @settings(
            max_examples=num_cases,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            nonlocal count
            count += 1
            headers = {"Authorization": f"Bearer {ALICE}"}
            response = case.call(headers=headers, timeout=30)
            case.validate_response(response, checks=CHECKS)

        with suppress(Unsatisfiable):  # some operations take whatever there is
            send()
    return count


def test_short_run_over_every_operation_finds_no_fault(daemon: RunningDaemon) -> None:
    found = operations(daemon)
    assert len(found) > 40
    for operation in found:
        assert try_operation(operation, daemon, num_cases=1) > 0


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_long_run_over_every_operation_finds_no_fault(daemon: RunningDaemon) -> None:
    total = sum(try_operation(operation, daemon, 40) for operation in operations(daemon))
    print(f"{total} cases")
    assert total >= 2000
