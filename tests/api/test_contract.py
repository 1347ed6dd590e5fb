"""The API keeps what its OpenAPI document says, whatever it is sent: schemathesis against a real process."""

from pathlib import Path

import pytest

from tests.api.conftest import Api
from tests.contract import require_kept

UNDECLARED = "positive_data_acceptance,ignored_auth"
"""Valid data is refused for what a schema cannot say: a task exists and is idle. Callers here need no key."""


@pytest.mark.slow
def test_no_request_breaks_the_contract(api: Api, tmp_path: Path) -> None:
    require_kept(str(api.client.base_url), tmp_path, hooks="tests.api.fuzzing", undeclared=UNDECLARED)
    assert api.client.get("/readyz").status_code == 200
    assert "Traceback" not in api.log
