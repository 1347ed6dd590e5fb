"""Epochs: which is kept, which checkpoints, and how a training lives with the memory there is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ft_assets.training.engine.body import Body
from ft_assets.training.engine.checkpoints import Checkpoints, Snapshot
from ft_assets.training.engine.choosing import clearly_worse
from ft_assets.training.engine.examples import Example
from ft_assets.training.engine.learners import ClassLearner
from ft_assets.training.engine.runs import TaskRows
from ft_assets.training.jobs import checkpoint_of
from ft_assets.training.relief import Relief
from ft_resources.base_models import resolve
from ft_resources.errors import OutOfMemory
from ft_resources.lake import Lake
from tests.training.small import Died, dies_at, digests, settings, texts, train

Tiny = Callable[[str], str]


def test_the_best_last_and_fastest_checkpoints_are_kept(tmp_path: Path) -> None:
    """Five epochs, the third is the best and the second took the least time."""
    lake = Lake(tmp_path)
    checkpoints = Checkpoints(lake, "t", "key")
    seconds = [5.0, 3.0, 4.0, 6.0, 7.0]
    for epoch in range(1, 6):
        place = {"epoch": epoch, "batch": 0, "step": epoch * 10}
        snapshot = Snapshot(place, {"weight": torch.full((3,), float(epoch))})
        checkpoints.save(snapshot, epoch_seconds=seconds[epoch - 1], best=epoch <= 3)
        checkpoints.save(Snapshot({**place, "batch": 4, "step": epoch * 10 + 4}, {"weight": torch.zeros(3)}))
    checkpoints.save(Snapshot({"epoch": 5, "batch": 0, "step": 50}, {"weight": torch.full((3,), 5.0)}))
    stored = {role: lake.open(digest).json("progress.json") for role, digest in checkpoints.kept.items()}
    kept = {role: one["progress"]["epoch"] for role, one in stored.items()}
    assert kept == {"last": 5, "best": 3, "fastest": 2}
    assert len(list((tmp_path / "objects").glob("*/*"))) == 3
    again = Checkpoints(lake, "t", "key")
    latest = again.latest()
    assert latest is not None and latest.progress["step"] == 50
    assert again.kept == checkpoints.kept
    assert again.best().tensors["weight"].tolist() == [3.0, 3.0, 3.0]


def test_the_best_epoch_by_validation_is_what_is_saved(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    worse_later = TaskRows("text-classification", texts(16, 1), texts(30, 5).assign(label="warm"), ["cold", "warm"])
    measured = list[dict[str, float]]()
    trained = train(
        worse_later,
        settings(tiny("bert"), training={"epochs": 4, "warmup_share": 0.0, "learning_rate": 2e-2}),
        tmp_path / "one",
        on_epoch=lambda epoch, figures: measured.append(figures),
    )
    scores = [(figures["macro_f1"], -figures["loss"]) for figures in measured]
    assert trained.history.best_epoch == scores.index(max(scores)) + 1
    assert trained.outputs.shape == (30, 2)


def test_the_last_epoch_that_is_not_clearly_worse_is_kept(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    worse_later = TaskRows("text-classification", texts(16, 1), texts(30, 5).assign(label="warm"), ["cold", "warm"])
    kept = {}
    for name, rows in (("as good", classes), ("worse", worse_later)):
        for choice in ("best", "last_as_good"):
            options = {"epochs": 5, "warmup_share": 0.0, "learning_rate": 2e-2, "kept_epoch": choice}
            kept[name, choice] = train(rows, settings(tiny("bert"), training=options), tmp_path / f"{name} {choice}")
    epochs = {key: trained.history.best_epoch for key, trained in kept.items()}
    figures = {key: trained.history.validation for key, trained in kept.items()}
    assert figures["as good", "best"] == figures["as good", "last_as_good"]
    assert epochs["as good", "best"] < epochs["as good", "last_as_good"] == 5
    assert epochs["worse", "best"] == epochs["worse", "last_as_good"] < 5


def test_an_epoch_that_loses_a_rare_class_is_clearly_worse(tiny: Tiny, classes: TaskRows) -> None:
    """Of 1,000 rows four of the common class are wrong before, and all five of the rare one after."""
    body = Body(resolve(tiny("bert")), settings(tiny("bert")), torch.device("cpu"), torch.float32, causal=False)
    learner = ClassLearner(body, settings(tiny("bert")), 2, [0, 1])
    examples = [Example(number, [1], int(number < 5)) for number in range(1000)]
    right = np.eye(2, dtype=np.float32)[[one.target for one in examples]]
    before, after = right.copy(), right.copy()
    before[100:104], after[:5] = [0, 1], [1, 0]
    errors = [learner.errors(outputs, examples) for outputs in (after, before)]
    assert clearly_worse(*errors)
    assert not clearly_worse(*reversed(errors))
    assert errors[0].mean() == pytest.approx(0.5), "a class of two is wrong"


def test_clearly_worse_is_by_more_than_two_standard_errors() -> None:
    def wrong(*rows: int) -> np.ndarray:
        return np.isin(np.arange(1000), rows).astype(np.float32)

    assert not clearly_worse(wrong(), wrong())
    assert not clearly_worse(wrong(1, 2, 3), wrong())
    assert clearly_worse(wrong(1, 2, 3, 4, 5), wrong())
    assert not clearly_worse(wrong(1, 2, 3, 4, 5), wrong(6, 7))
    assert not clearly_worse(wrong(), wrong(1, 2, 3, 4, 5))
    assert clearly_worse(wrong() * np.nan, wrong())


def test_training_stops_early(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    patient = settings(tiny("bert"), training={"epochs": 30, "early_stopping": 2, "schedule": "constant"})
    trained = train(classes, patient, tmp_path / "one")
    epochs = len(trained.history.validation)
    assert epochs < 30 and epochs == trained.history.best_epoch + 2


@pytest.mark.parametrize(("schedule", "last"), [("linear", 1 / 11), ("cosine", 0.02), ("constant", 1.0)])
def test_the_rate_warms_up_and_falls(schedule: str, last: float, tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    rates = list[float]()
    chosen = settings(tiny("bert"), training={"schedule": schedule, "warmup_share": 0.25})
    train(classes, chosen, tmp_path / "one", on_step=lambda step: rates.append(step.learning_rate / 5e-3))
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[-1] == pytest.approx(last, abs=0.1)


def test_more_memory_than_there_is_is_a_typed_error(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="needs more memory") as caught:
        train(classes, settings(tiny("bert")), tmp_path / "one", memory=1_000_000)
    assert caught.value.used > caught.value.total == 1_000_000


def test_a_training_goes_on_in_smaller_parts(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    """Out of memory after step 4: the same losses up to rounding, and the same bytes however it came to step 4."""
    told = settings(tiny("bert"), training={"checkpoint_minutes": 1e-9})
    whole = train(classes, told, tmp_path / "whole")
    relief = [Relief(after_step=4, micro_batch_tokens=24, gradient_checkpointing=True)]
    at_once = train(classes, told, tmp_path / "at-once", relief=relief)
    lake = Lake(tmp_path / "lake")
    with pytest.raises(Died):
        train(classes, told, tmp_path / "none", checkpoints=Checkpoints(lake, "t", "before"), on_step=dies_at(5))
    saved = lake.require("t", checkpoint_of("before"))
    lake.set_head("t", checkpoint_of("after"), saved.digest, "after")
    resumed = train(classes, told, tmp_path / "on", checkpoints=Checkpoints(lake, "t", "after"), relief=relief)
    assert resumed.steps_now == len(resumed.history.loss) - 4
    assert digests(tmp_path / "on") == digests(tmp_path / "at-once")
    assert lake.require("t", checkpoint_of("before")) == saved, "with more memory it can go on from there as it was"
    assert at_once.history.loss[:4] == whole.history.loss[:4]
    assert at_once.history.loss != whole.history.loss
    np.testing.assert_allclose(at_once.history.loss, whole.history.loss, rtol=2e-5)


def test_smaller_parts_from_the_first_step_are_a_setting(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    parts = settings(tiny("bert"), training={"micro_batch_tokens": 24})
    relief = [Relief(after_step=0, micro_batch_tokens=24, gradient_checkpointing=False)]
    train(classes, parts, tmp_path / "parts")
    train(classes, settings(tiny("bert")), tmp_path / "relieved", relief=relief)
    one, other = digests(tmp_path / "parts"), digests(tmp_path / "relieved")
    assert {name for name in one if one[name] != other[name]} == {"adapter.json"}  # it tells the settings


def test_memory_held_before_a_training_does_not_count(tiny: Tiny, classes: TaskRows, tmp_path: Path) -> None:
    """What a process held before a training does not count as the training's."""
    ballast = bytearray(600_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    del ballast
    from ft_resources.usage import peak_memory

    limit = peak_memory() - 300_000_000
    trained = train(classes, settings(tiny("bert")), tmp_path / "one", memory=limit)
    assert trained.steps_now == 12 and peak_memory() < limit
