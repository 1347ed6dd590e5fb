"""Runs over HTTP: submitted, followed through a lost connection, refused, canceled, by whom."""

import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from ft_resources.ledger import Ledger
from tests.api.conftest import Api, bearer

pytestmark = pytest.mark.timeout(180)
Event = tuple[str, str, dict[str, Any]]


def events(api: Api, run_id: str, last: str = "") -> Iterator[Event]:
    """Name, id and data of the events of a run, as they come."""
    headers = {"last-event-id": last} if last else {}
    with api.client.stream("GET", f"/runs/{run_id}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                fields[name] = value
            elif "data" in fields:
                yield fields["event"], fields["id"], json.loads(fields["data"])
                fields = {}


def asked(api: Api, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.client.get(f"/task/{run_id}").json()
    return found


def over(api: Api, run_id: str) -> dict[str, Any]:
    while (state := asked(api, run_id))["succeeded"] is None:
        time.sleep(0.05)
    return state


def test_a_submitted_run_answers_at_once_is_followed_through_a_lost_connection_and_ends(
    api: Api, shown: dict[str, str], ledger: Ledger
) -> None:
    owner = bearer(shown["owner of mail"])
    took, canceled = [], []
    for _ in range(3):  # two are canceled at once: the machine may be busy, so the best time of three counts
        began = time.monotonic()
        answer = api.client.post("/train", json={"task": "weather", "only": ["raw_dataset"]}, headers=owner)
        took.append(time.monotonic() - began)
        assert answer.status_code == 202, answer.text
        run_id = answer.json()["run_id"]
        assert answer.json() == asked(api, run_id) | {"state": "SUBMITTED"}
        assert answer.headers["location"] == f"/runs/{run_id}"
        if len(took) < 3:
            canceled.append(run_id)
            refused = api.client.post(f"/runs/{run_id}/cancel", headers=bearer(shown["reader of mail"]))
            assert refused.status_code == 403
            assert api.client.post(f"/runs/{run_id}/cancel", headers=owner).json()["state"] in ("CANCELING", "CANCELED")
            ended = over(api, run_id)
            assert (ended["state"], ended["failure"]) == ("CANCELED", "canceled by owner-mail before it began")
            again = api.client.post(f"/runs/{run_id}/cancel", headers=owner)
            assert (again.status_code, again.json()["error_code"]) == (409, "cannot_cancel")
    assert min(took) < 0.3, took
    busy = api.client.post("/train", json={"task": "weather"}, headers=owner)
    assert (busy.status_code, busy.json()["error_code"]) == (409, "busy")
    assert run_id in busy.json()["message"]
    other = api.client.post("/train", json={"task": "drizzle"}).json()["run_id"]

    began = time.monotonic()
    asked(api, run_id)
    assert time.monotonic() - began < 0.3 or sorted(took)[1] > 0.3, "an answer waits for the run"
    first: list[Event] = []
    for event in events(api, run_id):
        first.append(event)
        if [name for name, *_ in first].count("line") == 2:
            break
    rest = list(events(api, run_id, last=first[-1][1]))
    whole = list(events(api, run_id))
    lines = [data for name, _, data in whole if name == "line"]
    assert [data for name, _, data in first + rest if name == "line"] == lines
    assert {("made", "raw_dataset"), ("passed", "raw_dataset.enough_rows")} <= {
        (line["kind"], line["subject"]) for line in lines
    }
    assert {data["state"] for name, _, data in first + rest if name == "progress"} >= {"SUBMITTED", "SUCCESS"}
    assert rest[-1][:2] == ("end", "end")
    assert rest[-1][2] == whole[-1][2] == asked(api, run_id)
    assert rest[-1][2]["succeeded"] is True
    assert api.client.get(f"/runs/{run_id}/events", headers={"last-event-id": "end"}).status_code == 204

    refused = over(api, other)
    assert (refused["state"], refused["succeeded"]) == ("FAILURE", False)
    assert any(reason.startswith("raw_dataset.enough_rows: 10 rows") for reason in refused["refusals"])

    newest = api.client.get("/runs").json()["data"]
    assert {one["run_id"] for one in newest} >= {run_id, other, *canceled}
    of_weather = api.client.get("/runs", params={"task": "weather", "limit": 2}, headers=owner).json()["data"]
    assert [one["run_id"] for one in of_weather] == [run_id, canceled[1]]
    assert {one["task"] for one in api.client.get("/runs", headers=owner).json()["data"]} == {"weather"}

    done = [(one["actor"], one["action"], one["task"]) for one in ledger.audit_events() if one["subject"] == run_id]
    assert done == [("owner-mail", "submit", "weather")]
    assert [one["actor"] for one in ledger.audit_events() if one["subject"] == other] == ["ada"]


def test_what_is_submitted_inherits_no_key(api: Api) -> None:
    run_id = api.client.post("/train", json={"task": "weather", "only": ["raw_dataset"]}).json()["run_id"]
    told = json.loads((api.home / "submitted" / run_id / "request.json").read_text())
    variables = psutil.Process(told["pid"]).environ()
    api.client.post(f"/runs/{run_id}/cancel")
    over(api, run_id)
    assert variables["FT_ACTOR"] == "ada"
    assert not {"FT_API_KEYS", "FT_JWT_SECRET"} & variables.keys()
