"""An idle GPU is given back after a suspicion and its confirmation, never for what works or speaks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.training.engine.checkpoints import Checkpoints
from ft_assets.training.idle import BUSY_PERCENT, QUIET_SECONDS, IdleWatch
from ft_resources.environments import REPOSITORY
from ft_resources.lake import Lake


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def verdict_after(watch: IdleWatch, clock: Clock, seconds: float, utilisation: float | None) -> str:
    """What is said after that time, with a look every minute."""
    while seconds > 0:
        step = min(60.0, seconds)
        clock.now, seconds = clock.now + step, seconds - step
        watch.sample(utilisation)
        verdict = watch.verdict()
    return verdict


def test_one_confirmation_is_not_enough(clock: Clock) -> None:
    watch = IdleWatch(clock)
    assert verdict_after(watch, clock, QUIET_SECONDS - 1, 0.0) == "busy"
    assert verdict_after(watch, clock, 1, 0.0) == "suspected"
    assert verdict_after(watch, clock, QUIET_SECONDS - 1, BUSY_PERCENT - 0.1) == "suspected"
    assert verdict_after(watch, clock, 1, 0.0) == "idle"


def test_a_clock_that_jumps_gives_no_confirmation(clock: Clock) -> None:
    watch = IdleWatch(clock)
    clock.now += 10 * QUIET_SECONDS  # the machine was asleep
    watch.sample(0.0)
    assert watch.verdict() == "suspected"


@pytest.mark.parametrize("sign", ["line", "work"])
def test_a_sign_of_life_between_suspicion_and_confirmation_clears_it(clock: Clock, sign: str) -> None:
    watch = IdleWatch(clock)
    assert verdict_after(watch, clock, QUIET_SECONDS + 60, 0.0) == "suspected"
    if sign == "line":
        watch.output()
    else:
        watch.sample(BUSY_PERCENT)
    assert watch.verdict() == "busy"
    assert verdict_after(watch, clock, QUIET_SECONDS, 0.0) == "suspected"
    assert verdict_after(watch, clock, QUIET_SECONDS, 0.0) == "idle"


@pytest.mark.parametrize("utilisation", [BUSY_PERCENT, 100.0, None])
def test_what_works_or_has_no_gpu_is_left_alone(clock: Clock, utilisation: float | None) -> None:
    assert verdict_after(IdleWatch(clock), clock, 10 * QUIET_SECONDS, utilisation) == "busy"


@pytest.mark.parametrize("utilisation", [0.0, 50.0])
@pytest.mark.slow
def test_a_training_that_stands_still_is_saved_and_ended(
    utilisation: float, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("idle_training.py")
    lake = tmp_path / "lake"
    done = subprocess.run(
        [sys.executable, str(script), tiny("bert"), str(lake), str(tmp_path / "adapter"), str(utilisation)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "FT_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    if utilisation:
        assert said == ["trained"]
        return
    assert ["suspected" if "ends" in line and "still so" in line else line.split()[0] for line in said] == [
        "suspected",
        "the",
        "TrainingError",
    ]
    assert "saved at step 3 of 12" in said[-1]
    saved = Checkpoints(Lake(lake), "t", "key").latest()
    assert saved is not None and saved.progress["step"] == 3
