"""Every endpoint and every role; what a refusal says; nothing secret is handed on."""

from typing import Any

import pytest

from ft_resources.ledger import Ledger
from tests.api.conftest import ENDED, OUTSIDE, Api, bearer
from tests.contract import unasked

JSON = {"content-type": "application/json"}
NO_RUN = "4d2fe0ea-9a3c-4f0e-a3c6-000000000000"
ALL = {"reader of mail", "reader", "owner of mail", "owner", "admin", "environment"}
NOT_MAIL = {"reader", "owner", "admin", "environment"}
KEEPERS = {"owner of mail", "owner", "admin", "environment"}
CALLERS = ("nobody", "stranger", "revoked", "expired", *sorted(ALL))
MATRIX: dict[str, tuple[str, str, Any, set[str]]] = {
    "train mail": ("POST", "/train", {"task": "mail"}, KEEPERS),
    "train news": ("POST", "/train", {"task": "news"}, {"owner", "admin", "environment"}),
    "runs": ("GET", "/runs", None, ALL),
    "runs of news": ("GET", "/runs?task=news", None, NOT_MAIL),
    "run of news": ("GET", f"/runs/{ENDED}", None, NOT_MAIL),
    "task of news": ("GET", f"/task/{ENDED}", None, NOT_MAIL),
    "events of news": ("GET", f"/runs/{ENDED}/events", None, NOT_MAIL),
    "cancel news": ("POST", f"/runs/{ENDED}/cancel", None, {"owner", "admin", "environment"}),
    "deploy mail": ("POST", "/deployments", {"task": "mail"}, KEEPERS),
    "deploy news": ("POST", "/deployments", {"task": "news"}, {"owner", "admin", "environment"}),
    "undeploy": ("DELETE", "/deployments", None, {"owner", "admin", "environment"}),
    "experiments": ("GET", "/experiments", None, ALL),
    "experiments of news": ("GET", "/experiments?task=news", None, NOT_MAIL),
    "statistics": ("GET", "/experiments/statistics", None, ALL),
    "statistics of news": ("GET", "/experiments/statistics?task=news", None, NOT_MAIL),
    "mlflow": ("GET", "/mlflow", None, ALL),
    "mlflow run": ("GET", f"/experiments/mlflow/{'0' * 32}", None, ALL),
    "adapters": ("GET", "/adapters", None, ALL),
    "adapters of news": ("GET", "/adapters?task=news", None, NOT_MAIL),
    "adapter": ("GET", f"/adapters/{'0' * 64}", None, ALL),
    "documentation": ("GET", "/docs", None, ALL),
    "openapi": ("GET", "/openapi.json", None, ALL),
    "token": ("POST", "/auth/token", None, ALL),
    "list keys": ("GET", "/auth/keys", None, KEEPERS),
    "make an admin": ("POST", "/auth/keys", {"name": "made", "role": "admin"}, {"admin", "environment"}),
    "revoke a key": ("DELETE", "/auth/keys/nothing", None, KEEPERS),
}
"""`mail` and `news` have no task file and no release, the run is over: nothing is started, deployed or canceled."""


@pytest.mark.parametrize("name", MATRIX)
def test_each_role_may_what_it_may_and_nothing_else(api: Api, shown: dict[str, str], ledger: Ledger, name: str) -> None:
    method, path, body, allowed = MATRIX[name]
    for caller in CALLERS:
        response = api.client.request(method, path, json=body, headers=bearer(shown[caller]))
        if caller in allowed:
            assert response.status_code not in (401, 403), (caller, response.text)
            assert response.status_code < 500, (caller, response.text)
            if name == "make an admin":
                ledger.revoke_key("made", "test")
            continue
        expected = (403, "forbidden") if caller in ALL else (401, "unauthorized")
        assert (response.status_code, response.json()["error_code"]) == expected, caller
    for probe in ("/livez", "/readyz"):
        assert api.client.get(probe, headers=OUTSIDE).status_code == 200


def test_every_endpoint_stands_in_the_matrix(api: Api) -> None:
    assert unasked(api.client.get("/openapi.json").json(), [row[:2] for row in MATRIX.values()]) == []


def test_a_token_stands_for_its_key(api: Api, shown: dict[str, str]) -> None:
    given = api.client.post("/auth/token", headers=bearer(shown["reader of mail"])).json()["access_token"]
    assert len(api.client.get("/experiments", headers=bearer(given)).json()["data"]) == 3
    refused = api.client.post("/train", json={"task": "mail"}, headers=bearer(given))
    assert (refused.status_code, refused.json()["error_code"]) == (403, "forbidden")
    assert "owner" in refused.json()["mend"]


@pytest.mark.parametrize(
    ("request_", "status", "code", "where"),
    [
        (("POST", "/train", {"content": b"{", "headers": JSON}), 400, "invalid_request", ""),
        (("POST", "/train", {"content": b'{"task": "weather"}'}), 422, "invalid_request", ""),
        (("POST", "/train", {"json": {"task": "weather", "because": "a\0b"}}), 422, "invalid_request", "because"),
        (("POST", "/train", {"json": {"task": "weather", "epochs": 3}}), 422, "invalid_request", "epochs"),
        (("POST", "/train", {"json": {"task": "weather", "only": ["adaptr"]}}), 422, "invalid_spec", "only"),
        (("POST", "/train", {"json": {"task": "wether"}}), 404, "unknown_task", "task"),
        (("POST", "/deployments", {"json": {"task": "wether"}}), 404, "unknown_task", "task"),
        (("POST", "/deployments", {"json": {"task": "weather"}}), 409, "nothing_live", "task"),
        (("POST", "/deployments", {"json": {"task": "weather", "port": 1}}), 422, "invalid_request", "port"),
        (("GET", "/runs/adapter", {}), 404, "unknown_run", "run_id"),
        (("GET", f"/task/{NO_RUN}", {}), 404, "unknown_run", "run_id"),
        (("POST", f"/runs/{NO_RUN}/cancel", {}), 404, "unknown_run", "run_id"),
        (("GET", "/nothing", {}), 404, "invalid_request", ""),
        (("PUT", "/train", {}), 405, "invalid_request", ""),
    ],
)
def test_a_refusal_says_what_where_and_how_to_mend_it(
    api: Api, request_: tuple[str, str, dict[str, Any]], status: int, code: str, where: str
) -> None:
    method, path, more = request_
    response = api.client.request(method, path, **more)
    refusal = response.json()
    assert (response.status_code, refusal["error_code"], refusal["where"]) == (status, code, where)
    assert refusal["message"] and refusal["mend"]
    assert refusal["trace_id"] == response.headers["x-trace-id"]


def test_a_method_that_a_path_lacks_is_answered_with_those_it_has(api: Api) -> None:
    for path, methods in (("/deployments", "DELETE, POST"), ("/auth/keys", "GET, POST"), ("/train", "POST")):
        refused = api.client.put(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, methods)


def test_who_may_use_some_tasks_is_not_told_of_others(api: Api, shown: dict[str, str]) -> None:
    refused = api.client.post("/train", json={"task": "mail"}, headers=bearer(shown["owner of mail"]))
    assert refused.status_code == 404
    assert "drizzle" not in refused.text
    assert "drizzle" in api.client.post("/train", json={"task": "mail"}).text


def test_the_documentation_names_every_field_and_works_without_a_network(api: Api) -> None:
    schema = api.client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert "Validation Error" not in str(operation["responses"]), path
    assert schema["components"]["schemas"]["TrainingRun"]["properties"]["tokens"]["description"]
    assert "text/event-stream" in schema["paths"]["/runs/{run_id}/events"]["get"]["responses"]["200"]["content"]
    page = api.client.get("/docs").text
    assert "https://" not in page
    assert api.client.get("/static_content/swagger-ui.css").status_code == 200


def test_a_page_of_another_site_does_not_borrow_the_trust_in_this_machine(api: Api) -> None:
    refused = api.client.post("/train", json={"task": "weather"}, headers={"origin": "https://evil.example"})
    assert refused.status_code == 401


def test_no_secret_is_in_the_log(api: Api, shown: dict[str, str]) -> None:
    for secret in filter(None, shown.values()):
        assert secret.split("_", 2)[-1] not in api.log
