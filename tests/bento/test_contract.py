"""The service keeps what its OpenAPI document says, whatever it is sent: schemathesis against a real server."""

from pathlib import Path

import pytest

from tests.bento.served import Served
from tests.contract import require_kept

UNDECLARED = "positive_data_acceptance,ignored_auth"
"""Valid data is refused for what a schema cannot say: a conversation ends with the user, a prompt fits the context, a
name exists. Callers on this machine need no key."""


@pytest.mark.slow
def test_no_request_breaks_the_contract(served: Served, tmp_path: Path) -> None:
    require_kept(served.url, tmp_path, hooks="tests.bento.fuzzing", undeclared=UNDECLARED)
    assert served.server.client.get("/readyz").status_code == 200
