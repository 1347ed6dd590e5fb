"""Choosing an adapter: shares, stickiness, versions, nearest names."""

import json
from collections import Counter
from pathlib import Path

import pytest

from bento.routing import Route, RouteEntry, RouteTable, read_baked, read_plan, released_entries
from ft_resources.errors import RequestError, ServiceError

OLD, NEW = "a1" * 32, "a1b2" * 16


def entry(adapter: str, share: float, version: str = "1") -> RouteEntry:
    return RouteEntry(adapter=adapter, model_version=version, release_id=f"rel-{version}", share=share)


def table(*entries: RouteEntry, released: tuple[RouteEntry, ...] = ()) -> RouteTable:
    return RouteTable({"mail-triage": Route("mail-triage", 1, entries, released)})


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_shares_are_kept_within_a_point(share: float) -> None:
    routes = table(entry(OLD, 1 - share), entry(NEW, share, "2"))
    counts = Counter(routes.choose("mail-triage", f"user {n}", "").adapter for n in range(10_000))
    assert counts[NEW] / 10_000 == pytest.approx(share, abs=0.01)


def test_a_user_keeps_the_adapter_and_a_growing_canary_gives_no_one_back() -> None:
    users = [f"user {n}" for n in range(2000)]
    small, large = (table(entry(OLD, 1 - share), entry(NEW, share, "2")) for share in (0.1, 0.3))
    on_new = {user for user in users if small.choose("mail-triage", user, "any").adapter == NEW}
    assert on_new == {user for user in users if small.choose("mail-triage", user, "other").adapter == NEW}
    assert on_new < {user for user in users if large.choose("mail-triage", user, "").adapter == NEW}


def test_without_a_user_the_prediction_decides() -> None:
    routes = table(entry(OLD, 0.5), entry(NEW, 0.5, "2"))
    assert {routes.choose("mail-triage", None, str(n)).adapter for n in range(100)} == {OLD, NEW}


def test_an_adapter_without_a_share_gets_no_traffic() -> None:
    routes = table(entry(OLD, 0.0), entry(NEW, 2.0, "2"))
    assert {routes.choose("mail-triage", None, str(n)).adapter for n in range(1000)} == {NEW}


def test_versions_are_found_by_number_and_by_digest() -> None:
    released = released_entries(
        [{"adapter": OLD, "model_version": "1", "id": "r1"}, {"adapter": NEW, "model_version": "2", "id": "r2"}]
    )
    routes = table(entry(NEW, 1.0, "2"), released=released)
    choose = routes.choose
    assert choose("mail-triage", None, "", "champion").adapter == NEW
    assert choose("mail-triage", None, "", "1").adapter == OLD
    assert choose("mail-triage", None, "", OLD[:8]).release_id == "r1"
    assert choose("mail-triage", None, "", NEW.upper()).adapter == NEW
    for wanted in ("3", "a1", "a1b2a1", "f" * 8, "latest"):
        with pytest.raises(RequestError, match="version") as caught:
            choose("mail-triage", None, "", wanted)
        assert caught.value.error_code == "unknown_version"
        assert "1, 2" in caught.value.mend


def test_an_ambiguous_digest_names_no_version() -> None:
    twin = OLD[:10] + "f" * 54
    routes = table(entry(OLD, 0.5), entry(twin, 0.5, "2"))
    with pytest.raises(RequestError):
        routes.choose("mail-triage", None, "", OLD[:8])
    assert routes.choose("mail-triage", None, "", OLD[:11]).adapter == OLD


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="mail-triag'") as caught:
        table(entry(OLD, 1.0)).choose("mail-triag", None, "")
    assert caught.value.error_code == "unknown_task"
    assert "Did you mean 'mail-triage'?" in caught.value.mend


def test_a_task_that_could_not_be_loaded_is_not_unknown() -> None:
    with pytest.raises(RequestError) as caught:
        RouteTable({}, {"mail-triage": "its adapter is damaged"}).route("mail-triage")
    assert (caught.value.error_code, caught.value.status) == ("not_ready", 503)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"shares": []},
        {"shares": [{"adapter": OLD, "model_version": "1", "release_id": "r", "share": 0}]},
        {"shares": [{"adapter": OLD, "model_version": "1", "release_id": "r", "share": -1}]},
        {"shares": [{"adapter": OLD, "model_version": "1", "release_id": "r", "share": float("nan")}]},
        {"shares": [{"adapter": OLD, "share": 1}]},
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(plan: dict[str, object]) -> None:
    with pytest.raises(ServiceError, match="cannot be followed"):
        read_plan("mail-triage", plan)


def test_a_folder_without_a_release_bakes_none(tmp_path: Path) -> None:
    assert read_baked(tmp_path) is None
    (tmp_path / "release.json").write_text(json.dumps({"task": "t1"}))
    with pytest.raises(ServiceError, match=r"release\.json"):
        read_baked(tmp_path)


def test_a_refusal_tells_of_the_tasks_it_may_tell_of() -> None:
    entry = RouteEntry(adapter=OLD, model_version="1", release_id="r", share=1)
    table = RouteTable({name: Route(name, 1, (entry,)) for name in ("mail-triage", "mail-secret")})
    for told, named in ((None, {"mail-triage", "mail-secret"}), ({"mail-triage", "gone"}, {"mail-triage"})):
        with pytest.raises(RequestError) as caught:
            table.route("mail-secre", told)
        assert {name for name in table.routes if name in caught.value.mend} == named


def test_an_entry_says_in_which_precision_it_is_served() -> None:
    share = {"adapter": OLD, "model_version": "1", "release_id": "r", "share": 1}
    assert read_plan("mail-triage", {"shares": [share]}).shares[0].precision == "auto"
    assert read_plan("mail-triage", {"shares": [{**share, "precision": "int8"}]}).shares[0].precision == "int8"
    with pytest.raises(ServiceError, match=r"cannot be followed: .*precision"):
        read_plan("mail-triage", {"shares": [{**share, "precision": "int4"}]})
    release = {"adapter": OLD, "model_version": "1", "id": "r1"}
    rows = [release, {**release, "decision": {}}, {**release, "decision": {"precision": "bf16"}}]
    assert [one.precision for one in released_entries(rows)] == ["auto", "auto", "bf16"]
