"""A real server as callers from other machines see it: roles, keys, tokens, rates, and what it lets through."""

import pickle
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from ft_resources import api_keys
from tests.bento.servers import Server, end, start
from tests.contract import unasked

JWT_SECRET = "a secret of the test, longer than 32 bytes"
ORIGIN = "https://shop.example"
OUTSIDE = {"x-forwarded-for": "10.1.2.3"}
"""Behind a proxy nobody is from this machine."""


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    world = make_world(tmp_path_factory.mktemp("access"))
    world.release("t1", world.first, "1")
    world.release("t2", world.other, "1")
    yield world
    world.ledger.close()


def add(world: Any, name: str, role: str = "reader", **more: Any) -> str:
    key, shown = api_keys.make(name, role, created_by="test", **more)
    world.ledger.add_key(key)
    return shown


@pytest.fixture(scope="module")
def shown(world: Any) -> dict[str, str]:
    """What each kind of caller shows."""
    keys = {
        "nobody": "",
        "stranger": "ft_0123456789ab_" + "x" * 43,
        "reader of t1": add(world, "reader-t1", tasks=["t1"]),
        "reader": add(world, "reader"),
        "owner of t1": add(world, "owner-t1", "owner", tasks=["t1"]),
        "owner": add(world, "owner", "owner"),
        "admin": add(world, "admin", "admin"),
        "environment": "key-of-the-test",
        "revoked": add(world, "revoked", "admin"),
        "expired": add(world, "expired", "admin", expires_at=datetime.now(UTC) + timedelta(seconds=0.01)),
    }
    world.ledger.revoke_key("revoked", "test")
    return keys


@pytest.fixture(scope="module")
def server(world: Any, shown: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = tmp_path_factory.mktemp("words") / "words.txt"
    words.write_text("# not said here\nforbidden fruit\nStraße\n", encoding="utf-8")
    server = start(
        world.home,
        FT_JWT_SECRET=JWT_SECRET,
        FT_CORS_ORIGINS=ORIGIN,
        FT_CONTENT_FILTER="bento.content_filter:word_list",
        FT_CONTENT_WORDS=str(words),
        FT_REQUEST_TOKENS="2000",
    )
    yield server
    end(server)


def bearer(key: str) -> dict[str, str]:
    return OUTSIDE | ({"authorization": f"Bearer {key}"} if key else {})


def code(response: httpx.Response) -> str | None:
    return response.json().get("error_code")


CHAT = {"model": "t2", "messages": [{"role": "user", "content": "x"}]}
ALL = {"reader of t1", "reader", "owner of t1", "owner", "admin", "environment"}
NOT_T1 = {"reader", "owner", "admin", "environment"}
KEEPERS = {"owner of t1", "owner", "admin", "environment"}
NEW_KEY = {"name": "made", "role": "reader", "tasks": ["t2"]}
MATRIX: dict[str, tuple[str, str, Any, set[str]]] = {
    "predict t1": ("POST", "/predict", {"task": "t1", "inputs": ["x"]}, ALL),
    "predict t2": ("POST", "/predict", {"task": "t2", "inputs": ["x"]}, NOT_T1),
    "explain t2": ("POST", "/explain", {"task": "t2", "input": "x"}, NOT_T1),
    "feedback t2": ("POST", "/feedback", {"prediction_id": "of t2", "label": "x"}, NOT_T1),
    "embeddings t2": ("POST", "/v1/embeddings", {"model": "t2", "input": "x"}, NOT_T1),
    "chat t2": ("POST", "/v1/chat/completions", CHAT, NOT_T1),
    "completions t2": ("POST", "/v1/completions", {"model": "t2", "prompt": "x"}, NOT_T1),
    "models": ("GET", "/v1/models", None, ALL),
    "model t1": ("GET", "/v1/models/t1", None, ALL),
    "model t2": ("GET", "/v1/models/t2", None, NOT_T1),
    "documentation": ("GET", "/docs", None, ALL),
    "openapi": ("GET", "/openapi.json", None, ALL),
    "schema": ("GET", "/schema.json", None, ALL),
    "metrics": ("GET", "/metrics", None, {"owner", "admin", "environment"}),
    "token": ("POST", "/auth/token", None, ALL),
    "list keys": ("GET", "/auth/keys", None, KEEPERS),
    "make a reader of t2": ("POST", "/auth/keys", NEW_KEY, {"owner", "admin", "environment"}),
    "revoke a key": ("DELETE", "/auth/keys/nobody's", None, KEEPERS),
    "make an admin": ("POST", "/auth/keys", {"name": "made", "role": "admin"}, {"admin", "environment"}),
}
CALLERS = ("nobody", "stranger", "revoked", "expired", *sorted(ALL))


@pytest.mark.parametrize("name", MATRIX)
def test_each_role_may_what_it_may_and_nothing_else(
    world: Any, server: Server, shown: dict[str, str], name: str
) -> None:
    method, path, body, allowed = MATRIX[name]
    if body and body.get("prediction_id") == "of t2":
        body = body | {
            "prediction_id": server.ask(task="t2", inputs=["x"]).json()["results"][0]["prediction_id"],
            "label": "y",
        }
    for caller in CALLERS:
        response = server.client.request(method, path, json=body, headers=bearer(shown[caller]))
        if caller in allowed:
            assert response.status_code not in (401, 403), (caller, response.text)
            assert response.status_code < 500
        elif caller in ALL:
            assert (response.status_code, code(response)) == (403, "forbidden"), caller
        else:
            assert (response.status_code, code(response)) == (401, "unauthorized"), caller
            assert response.headers["www-authenticate"] == "Bearer"
        if name.startswith("make") and response.status_code == 200:
            world.ledger.revoke_key("made", "test")
    for probe in ("/livez", "/readyz"):
        assert server.client.get(probe, headers=OUTSIDE).status_code == 200


def test_every_endpoint_stands_in_the_matrix(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert unasked(document, [row[:2] for row in MATRIX.values()]) == []


def test_models_and_keys_show_only_what_is_the_callers(server: Server, shown: dict[str, str]) -> None:
    def names(path: str, caller: str, field: str) -> set[str]:
        return {one[field] for one in server.client.get(path, headers=bearer(shown[caller])).json()["data"]}

    assert names("/v1/models", "reader of t1", "id") == {"t1"}
    assert names("/v1/models", "reader", "id") == {"t1", "t2"}
    assert names("/auth/keys", "owner of t1", "name") == {"reader-t1"}
    assert {"reader-t1", "reader", "admin", "revoked"} <= names("/auth/keys", "admin", "name")
    listed = server.client.get("/auth/keys", headers=bearer(shown["admin"])).text
    assert "hash" not in listed and "salt" not in listed


def test_a_token_stands_for_its_key_and_ends_with_it(world: Any, server: Server, shown: dict[str, str]) -> None:
    key = add(world, "short-lived", tasks=["t1"])

    def given() -> httpx.Response:
        return server.client.post("/auth/token", headers=bearer(key))

    until(lambda: given().status_code == 200)
    answer = given().json()
    assert (answer["token_type"], answer["expires_in"]) == ("Bearer", 1800)
    token = answer["access_token"]
    ask = {"task": "t1", "inputs": ["x"]}
    assert server.client.post("/predict", json=ask, headers=bearer(token)).status_code == 200
    other = server.client.post("/predict", json=ask | {"task": "t2"}, headers=bearer(token))
    assert (other.status_code, code(other)) == (403, "forbidden")
    assert server.client.post("/auth/token", headers=bearer(token)).status_code == 401
    read = jwt.decode(token, JWT_SECRET, algorithms=["HS256"], audience="ft-service")
    assert (read["sub"], read["tasks"], read["exp"] - read["iat"]) == ("short-lived", ["t1"], 1800)
    for changed in ({"exp": 1}, {"aud": "elsewhere"}, {"role": "root"}):
        forged = jwt.encode(read | changed, JWT_SECRET, algorithm="HS256")
        assert server.client.post("/predict", json=ask, headers=bearer(forged)).status_code == 401
    forged = jwt.encode(read | {"role": "admin", "tasks": None}, JWT_SECRET[::-1], algorithm="HS256")
    assert server.client.post("/predict", json=ask, headers=bearer(forged)).status_code == 401
    world.ledger.revoke_key("short-lived", "test")
    for credential in (key, token):
        until(lambda credential=credential: server.client.get("/docs", headers=bearer(credential)).status_code == 401)


def test_a_key_made_over_http_is_shown_once_and_can_be_revoked(server: Server, shown: dict[str, str]) -> None:
    owner = bearer(shown["owner of t1"])
    body = {"name": "over-http", "tasks": ["t1"], "rate": 3}
    made = server.client.post("/auth/keys", json=body, headers=owner).json()
    key = bearer(made["key"])
    assert made["info"]["tasks"] == ["t1"]
    assert server.client.post("/auth/keys", json=body, headers=owner).status_code == 422
    until(lambda: server.client.get("/v1/models", headers=key).status_code == 200)
    for _ in range(2):
        assert server.client.get("/v1/models", headers=key).status_code == 200
    limited = server.client.get("/v1/models", headers=key)
    assert (limited.status_code, code(limited)) == (429, "rate_limited")
    assert 1 <= int(limited.headers["retry-after"]) <= 20
    assert server.client.delete("/auth/keys/reader", headers=owner).status_code == 404, "not its own"
    assert server.client.delete("/auth/keys/over-http", headers=owner).json()["revoked_at"]
    until(lambda: server.client.get("/v1/models", headers=key).status_code == 401)
    log = (server.home / "serve.log").read_text(errors="replace")
    for secret in (made["key"], *filter(None, shown.values())):
        assert secret.split("_", 2)[-1] not in log


def test_what_a_key_makes_goes_no_further_than_itself_and_ends_with_it(world: Any, server: Server) -> None:
    end = datetime.now(UTC) + timedelta(days=1)
    maker = bearer(add(world, "maker", "owner", tasks=["t1"], rate=500.0, expires_at=end))
    until(lambda: server.client.get("/docs", headers=maker).status_code == 200)

    def make(headers: dict[str, str] = maker, **more: Any) -> httpx.Response:
        return server.client.post("/auth/keys", json={"name": "child", "tasks": ["t1"], **more}, headers=headers)

    for more in ({"rate": 501}, {"expires_at": (end + timedelta(seconds=1)).isoformat()}):
        refused = make(**more)
        assert (refused.status_code, code(refused)) == (403, "forbidden")
        assert f"field '{next(iter(more))}'" in refused.json()["message"]
    token = server.client.post("/auth/token", headers=maker).json()["access_token"]
    refused = make(bearer(token))
    assert (refused.status_code, code(refused)) == (401, "unauthorized")
    made = make().json()
    assert made["info"]["rate"] == 500
    assert datetime.fromisoformat(made["info"]["expires_at"]) == end
    assert made["info"]["created_by"].startswith("maker/")
    child = bearer(made["key"])
    until(lambda: server.client.get("/docs", headers=child).status_code == 200)
    world.ledger.revoke_key("maker", "test")
    until(lambda: server.client.get("/docs", headers=child).status_code == 401)


def test_a_key_is_revoked_only_by_who_may_keep_every_key_of_its_name(
    world: Any, server: Server, shown: dict[str, str]
) -> None:
    add(world, "expired", tasks=["t1"])  # beside an admin's that has expired
    refused = server.client.delete("/auth/keys/expired", headers=bearer(shown["owner of t1"]))
    assert refused.status_code == 404
    assert server.client.delete("/auth/keys/expired", headers=bearer(shown["admin"])).status_code == 200


def test_a_caller_is_not_told_of_tasks_that_are_not_its_own(world: Any, server: Server) -> None:
    key = bearer(add(world, "curious", tasks=["t1", "t3"]))
    until(lambda: server.client.get("/docs", headers=key).status_code == 200)
    asked = [
        server.client.post("/predict", json={"task": "t3", "inputs": ["x"]}, headers=key),
        server.client.post("/v1/completions", json={"model": "t3", "prompt": "x"}, headers=key),
        server.client.get("/v1/models/t3", headers=key),
    ]
    for refused in asked:
        assert refused.status_code == 404
        assert "t1" in refused.text and "t2" not in refused.text


def test_pages_of_other_sites_are_let_in_only_by_name(server: Server, shown: dict[str, str]) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    let = server.client.options("/predict", headers=OUTSIDE | ask | {"origin": ORIGIN})
    assert (let.status_code, let.headers["access-control-allow-origin"]) == (200, ORIGIN)
    refused = server.client.options("/predict", headers=OUTSIDE | ask | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
    local = server.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert local.status_code == 401, "a page from elsewhere does not borrow the trust in this machine"


def test_a_request_is_answered_within_its_time_or_not_at_all(world: Any, server: Server) -> None:
    before = len(world.stored())
    body = {"task": "t1", "inputs": ["many words " * 20] * 40}
    late = server.client.post("/predict", json=body, headers={"x-timeout-ms": "1"})
    assert (late.status_code, code(late)) == (504, "deadline_exceeded")
    for bad in ("soon", "0", "-1", "1.5"):
        refused = server.client.post("/predict", json=body, headers={"x-timeout-ms": bad})
        assert (refused.status_code, code(refused)) == (422, "invalid_request")
    fits = server.client.post("/predict", json=body, headers={"x-timeout-ms": "60000"})
    assert fits.status_code == 200
    assert len(world.stored()) == before + 40, "an answer that nobody got is not in the log"


def test_the_largest_request_is_limited_in_tokens(server: Server) -> None:
    refused = server.ask(task="t1", inputs=["many words " * 40] * 40)
    assert (refused.status_code, code(refused)) == (413, "input_too_large")
    assert "2,000" in refused.json()["mend"]


def test_a_word_of_the_operators_list_is_not_let_through(world: Any, server: Server) -> None:
    before = len(world.stored())
    for text in ("Have some FORBIDDEN\n fruit!", "in der STRASSE", "ﬀ ｆｏｒｂｉｄｄｅｎ fruit"):
        refused = server.ask(task="t1", inputs=["fine", text])
        assert (refused.status_code, code(refused)) == (422, "content_filtered"), text
        assert text not in refused.text
    assert len(world.stored()) == before
    assert server.ask(task="t1", inputs=["forbidden fruits are no fruit", "Straßenbahn"]).status_code == 200


def test_a_pickle_is_never_loaded(server: Server, tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (trap,))

    for path in ("/predict", "/feedback", "/v1/embeddings", "/__predict__"):
        for kind in ("application/vnd.bentoml+pickle", "application/x-pickle", "multipart/form-data"):
            response = server.client.post(
                path,
                content=pickle.dumps(Trap()),
                headers={"content-type": kind, "payload-container": "DefaultContainer"},
            )
            assert 400 <= response.status_code < 500
    assert not trap.exists()


def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
