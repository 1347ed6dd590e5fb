"""How long a training takes and how much memory it needs, from counts of its operations; pure arithmetic, no torch.

A training's floating-point operations, memory traffic and kernel calls are counted on a shortened model. Rates
measured on this machine turn them into seconds; one factor and a start-up time are then fitted to recorded runs
(Huber-like loss, normal priors in the logarithm), so that with no run at all the measured rates speak alone. Intervals
come from Student's t with the residuals of the recorded runs and a prior worth two of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.stats import t as student

CONFIDENCE = 0.8
PRIOR_WEIGHT = 2
"""Runs that the prior spread counts as much as."""
TIME_SPREAD, MEMORY_SPREAD = 0.35, 0.12
"""Prior standard deviations of log(measured / predicted)."""
SAME_BASE, OTHER_BASE = 0.1, 0.25
"""Standard deviations with which a recorded run of the same base model, or of another one, counts."""


@dataclass(frozen=True)
class Interval:
    """An expected value and where it lies with 80 % probability."""

    expected: float
    low: float
    high: float

    def times(self, factor: float) -> "Interval":
        return Interval(self.expected * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Counts:
    """What some computation does."""

    flops: float = 0.0
    """Floating-point operations of matrix products and attention."""
    traffic: float = 0.0
    """Bytes that all other operations read and write."""
    calls: float = 0.0
    """Operations started."""
    shapes: float = 0.0
    """Matrix products of a shape not seen before, for which a kernel has to be made."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.flops + other.flops, self.traffic + other.traffic, self.calls + other.calls, self.shapes + other.shapes
        )

    def times(self, factor: float) -> "Counts":
        return Counts(self.flops * factor, self.traffic * factor, self.calls * factor, self.shapes * factor)


@dataclass(frozen=True)
class Rates:
    """Seconds for each floating-point operation, each byte moved, each call and each new shape."""

    flop: float
    byte: float
    call: float
    shape: float

    def seconds(self, counts: Counts) -> float:
        return (
            self.flop * counts.flops
            + self.byte * counts.traffic
            + self.call * counts.calls
            + self.shape * counts.shapes
        )


def rates(measured: Sequence[tuple[Counts, float]]) -> Rates:
    """Rates that give the measured seconds with the least squared relative error, none of them negative.

    Args:
        measured: Counts and seconds of at least one computation, all seconds above 0.
    """
    rows = np.array([[one.flops, one.traffic, one.calls, one.shapes] for one, _ in measured])
    rows /= np.array([seconds for _, seconds in measured])[:, None]
    scale = np.maximum(rows.max(0), 1e-300)
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    return Rates(*(found / scale).tolist())


@dataclass(frozen=True)
class Observation:
    """A recorded run beside what is computed for it without calibration."""

    same_base: bool
    """Whether it trained the base model that is planned for."""
    work_seconds: float
    """By the measured rates, without start-up."""
    seconds: float
    """Recorded wall seconds."""
    memory_bytes: float
    """Computed peak."""
    peak_bytes: float
    """Recorded peak."""


@dataclass(frozen=True)
class Calibration:
    """Computed values to expected ones."""

    start_seconds: float
    time_factor: float
    time_spread: float
    memory_factor: float
    memory_spread: float
    runs: int

    def seconds(self, work_seconds: float) -> Interval:
        """Of a whole training."""
        return self._interval(self.start_seconds + self.time_factor * work_seconds, self.time_spread)

    def memory(self, computed_bytes: float) -> Interval:
        """Peak, in bytes."""
        return self._interval(self.memory_factor * computed_bytes, self.memory_spread)

    def _interval(self, expected: float, spread: float) -> Interval:
        width = math.exp(float(student.ppf((1 + CONFIDENCE) / 2, PRIOR_WEIGHT + self.runs)) * spread)
        return Interval(expected, expected / width, expected * width)


def calibrate(observations: Sequence[Observation], start_seconds: float) -> Calibration:
    """Fit start-up time and factors to recorded runs; with none, `start_seconds` and factors of one.

    Args:
        start_seconds: Measured time of a worker's start, the prior of its start-up time.
    """
    weight = np.array([SAME_BASE if one.same_base else OTHER_BASE for one in observations])
    work = np.array([one.work_seconds for one in observations])
    seconds = np.array([one.seconds for one in observations])
    memory = np.log([one.peak_bytes / one.memory_bytes for one in observations])

    def time_residuals(logs: np.ndarray) -> np.ndarray:
        start, factor = np.exp(logs)
        return np.log((start + factor * work) / seconds)

    start, factor = least_squares(
        lambda logs: np.concatenate(
            [time_residuals(logs) / weight, (logs - [math.log(start_seconds), 0.0]) / [0.5, 0.7]]
        ),
        [math.log(start_seconds), 0.0],
        loss="soft_l1",
    ).x
    (offset,) = least_squares(
        lambda log: np.concatenate([(log - memory) / (weight / 2), log / 0.15]), [0.0], loss="soft_l1"
    ).x
    return Calibration(
        math.exp(start),
        math.exp(factor),
        _spread(time_residuals(np.array([start, factor])), TIME_SPREAD),
        math.exp(offset),
        _spread(memory - offset, MEMORY_SPREAD),
        len(observations),
    )


def _spread(residuals: np.ndarray, prior: float) -> float:
    total = PRIOR_WEIGHT * prior**2 + float(np.square(residuals).sum())
    return math.sqrt(total / (PRIOR_WEIGHT + len(residuals)))
