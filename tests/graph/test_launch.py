"""Before and after a launch: what the built service is asked, and whom a release is told to."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ft_assets.platform import Platform
from tests.graph.small_task import TASK
from tests.receiver import Receiver, receiving
from tests.resources.recording import release as record


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """The webhook of every run that is started meanwhile."""
    with receiving() as made:
        monkeypatch.setenv("FT_NOTIFY_URL", made.url)
        yield made


@pytest.fixture
def platform(copied: Callable[[], Platform], receiver: Receiver) -> Platform:
    """A copy of the built home, whose task is live; the receiver is its webhook."""
    made = copied()
    made.environment = replace(made.environment, notify_urls=(receiver.url,))
    return made


def forget_releases(platform: Platform) -> None:
    """Nothing is live: the ledger is new."""
    platform.ledger.close()
    for file in platform.environment.home.glob("ledger.db*"):
        file.unlink()
    del platform.ledger


def metadata(platform: Platform, run_id: str, asset: str) -> dict[str, Any]:
    """What a run said of an asset that it materialised."""
    events = platform.instance.all_logs(run_id)
    materialised = [event.asset_materialization for event in events if event.asset_materialization]
    return next(one.metadata for one in materialised if one.asset_key.to_user_string() == asset)


def republish(platform: Platform, asset: str, scratch: Path, change: Callable[[Path], None]) -> str:
    """The newest artefact of an asset with other content, under a digest of its own and as the newest; the digest."""
    old, folder = platform.lake.require(TASK, asset), scratch / asset
    shutil.copytree(old.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    change(folder)
    new = platform.lake.publish(asset, folder, {**old.made_from, "changed": asset})
    platform.lake.set_head(TASK, asset, new.digest, "by hand")
    return new.digest


@pytest.mark.slow
def test_a_test_request_that_is_answered_wrongly_blocks_the_release_until_the_file_is_mended(
    platform: Platform, receiver: Receiver
) -> None:
    first = platform.live(TASK)
    assert first is not None
    answers = platform.lake.require(TASK, "eval_report").parquet("predictions.parquet")
    spam = answers[answers["candidate_label"] == "spam"].nlargest(1, "candidate_confidence")["text"].item()
    path = platform.environment.home / "tasks" / "small-mail.yaml"
    before = path.read_text(encoding="utf-8").replace("alpha: 8", "alpha: 16")
    asked = {"text": spam, "label": "ham"}

    path.write_text(f"{before}serving:\n  test_requests: [{json.dumps(asked)}]\n", encoding="utf-8")
    outcome = platform.materialise(TASK, because="a stronger update")
    assert len(outcome.refusals) == 1, outcome
    (refusal,) = outcome.refusals
    assert refusal.startswith("bento_service.answers_golden_requests: 10 of 10 golden requests answered as evaluated")
    assert f"test request {spam[:60]!r}"[:-1] in refusal
    assert "answered 'spam', expected ham" in refusal
    assert "Correct serving.test_requests" in refusal
    again = platform.materialise(TASK, only=["release"])
    assert "answered 'spam', expected ham" in again.failure and "Correct serving.test_requests" in again.failure
    assert platform.live(TASK) == first
    assert receiver.asked == []

    asked["label"] = "spam"
    path.write_text(f"{before}serving:\n  test_requests: [{json.dumps(asked)}]\n", encoding="utf-8")
    assert "not asked the test requests that the task file lists now" in (
        platform.materialise(TASK, only=["release"]).failure
    )
    outcome = platform.materialise(TASK, because="a stronger update", only=["bento_service", "release"])
    assert outcome.succeeded, outcome
    assert "spam" in metadata(platform, outcome.run_id, "bento_service")["test_requests"].value
    live = platform.live(TASK)
    assert live is not None and live["adapter"] != first["adapter"]
    (notice,) = receiver.notices
    told = notice["release"]
    assert notice["text"].startswith("small-mail: version 2 is live, in place of version 1\nrelease by tester: a")
    assert (told["id"], told["kind"], told["because"]) == (live["id"], "release", "a stronger update")
    assert told["version"] == {"new": "2", "former": "1"}
    assert told["adapter"] == {"new": live["adapter"], "former": first["adapter"]}
    assert told["settings"] == {"lora.alpha": {"new": 16, "former": 8}}
    assert told["rows"] == {"now": told["rows"]["now"], "added": 0, "removed": 0} and told["rows"]["now"] > 200
    report = platform.report(TASK)
    accuracy = told["metrics"]["accuracy"]
    assert accuracy["new"] == report.models["candidate"]["accuracy"].value
    assert accuracy["former"] == report.models["champion"]["accuracy"].value
    assert accuracy["difference"] == pytest.approx(accuracy["new"] - accuracy["former"])
    assert told["same_test_rows"] is True
    assert metadata(platform, outcome.run_id, "release")["launch_notice"].value == "1 of 1 webhooks were told"

    repeated = platform.materialise(TASK, only=["release"])
    assert repeated.succeeded
    assert "live already" in metadata(platform, repeated.run_id, "release")["launch_notice"].value
    assert len(receiver.asked) == 1

    platform.roll_back(TASK, because="it was better")
    assert len(receiver.asked) == 2
    assert receiver.notices[1]["release"]["kind"] == "rollback"
    assert receiver.notices[1]["release"]["metrics"]["accuracy"]["difference"] == pytest.approx(-accuracy["difference"])
    assert "version 1 is live again, in place of version 2" in receiver.notices[1]["text"]


def test_a_service_that_answers_otherwise_than_was_evaluated_is_not_released(
    platform: Platform, receiver: Receiver, tmp_path: Path
) -> None:
    """The stored report has another label for one row than the adapter gives it."""
    forget_releases(platform)
    surest: list[str] = []

    def relabel(folder: Path) -> None:
        answers = pd.read_parquet(folder / "predictions.parquet")
        spam = answers[answers["candidate_label"] == "spam"]["candidate_confidence"].idxmax()
        answers.loc[spam, "candidate_label"] = "ham"
        surest.append(answers.loc[spam, "row_id"])
        answers.to_parquet(folder / "predictions.parquet")

    def name_report(folder: Path) -> None:
        about = json.loads((folder / "version.json").read_text())
        (folder / "version.json").write_text(json.dumps(about | {"report": report}))

    built = platform.lake.require(TASK, "bento_service").json("service.json")["tag"]
    report = republish(platform, "eval_report", tmp_path, relabel)
    republish(platform, "model_version", tmp_path, name_report)
    outcome = platform.materialise(TASK, only=["bento_service", "release"])
    assert len(outcome.refusals) == 1, outcome
    (refusal,) = outcome.refusals
    assert refusal.startswith("bento_service.answers_golden_requests: 9 of 10 golden requests answered as evaluated")
    assert f"golden request {surest[0]}: answered 'spam'" in refusal and "evaluated was 'ham'" in refusal
    failure = platform.materialise(TASK, only=["release"]).failure
    assert "the Bento did not answer as it must" in failure and f"golden request {surest[0]}" in failure
    assert platform.lake.require(TASK, "bento_service").json("service.json")["tag"] == built
    assert platform.live(TASK) is None
    assert receiver.asked == []


def test_a_broken_webhook_leaves_the_release_standing_and_is_said_without_its_url(
    platform: Platform, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status = [500]
    forget_releases(platform)
    notes: list[str] = []
    outcome = platform.materialise(TASK, only=["release"], show=lambda line: notes.append(line.text))
    assert outcome.succeeded, outcome
    live = platform.live(TASK)
    assert live is not None
    assert [one["release"]["id"] for one in receiver.notices] == [live["id"]] * 3
    why = "webhook 1 of 1 answered 500, at attempt 3 of 3"
    logged = "\n".join(str(event) for event in platform.instance.all_logs(outcome.run_id))
    assert f"launch notice: {why}" in logged
    assert metadata(platform, outcome.run_id, "release")["launch_notice"].value == f"0 of 1 webhooks were told; {why}"

    record(platform.ledger, "c" * 64, live["id"], task=TASK, model_version="9")
    platform.roll_back(TASK, because="password=hunter2 leaked")
    now = platform.live(TASK)
    assert now is not None and now["kind"] == "rollback"
    told = receiver.notices[-1]
    assert "no longer in the store" in told["text"] and "hunter2" not in json.dumps(told)
    assert f"launch notice of {now['id']}: {why}" in caplog.text
    for said in (logged, caplog.text, "\n".join(notes)):
        assert "secret-path" not in said
    kept = [file for file in platform.environment.home.rglob("*") if file.is_file() and file.stat().st_size < 1e7]
    assert not [file for file in kept if b"a-secret-path" in file.read_bytes()]
